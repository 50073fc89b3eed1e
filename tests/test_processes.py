"""Data-parallel training with torchrun, end to end: two gloo processes against one."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from small import contents, started

STEP = "experiment.CustomTrainer.step"


def torchrun(hub, folder, size, event="x", call=0, of="never", who=1):
    """The small main job as `size` processes; `event` happens to process `who` alone."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return started(hub, folder, event, call, of, launcher, OMP_NUM_THREADS="1",
                   SMALL_RANK=str(who))


@pytest.fixture(scope="module")
def two(small_hub, tmp_path_factory):
    """Folder of a run by two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(small_hub, folder, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def history(folder):
    return [json.loads(line) for line in (folder / "run_1/history.jsonl").read_text().splitlines()]


def test_two_processes_take_the_path_of_one(whole, two):
    ours, theirs = history(two[0]), history(whole)
    assert [(line["seed"], line["step"]) for line in ours] == [
        (line["seed"], line["step"]) for line in theirs]
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5), (one, other)
    for seed in (0, 1):
        weights = [load_file(folder / f"run_1/seed_{seed}/sae_lens/sae_weights.safetensors")
                   for folder in (two[0], whole)]
        for name, part in weights[0].items():
            torch.testing.assert_close(weights[1][name], part, rtol=1e-3, atol=1e-3)


def test_two_processes_that_stream_take_the_path_of_one(small_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALL_ROW", '{"buffer_gigabytes": 0.001, "n_seeds": 1}')
    for size in (1, 2):
        (tmp_path / str(size)).mkdir()
        done = torchrun(small_hub, tmp_path / str(size), size)
        assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = history(tmp_path / "2"), history(tmp_path / "1")
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5), (one, other)


def test_one_set_of_results_comes_from_two_processes(whole, two):
    ours, theirs = (json.loads((folder / "run_1/final_info.json").read_text())
                    for folder in (two[0], whole))
    assert (ours["environment"]["processes"], theirs["environment"]["processes"]) == (2, 1)
    assert ours["means"].keys() == theirs["means"].keys()
    for name in ("l0", "explained_variance", "l_dir", "l_use", "frac_alive"):
        assert ours["means"][name] == pytest.approx(theirs["means"][name], rel=5e-3), name
    assert (two[0] / "notes.txt").read_text().count("=== run_1 (written") == 1


def test_of_two_processes_the_first_alone_speaks(two):
    _, done = two
    assert done.stdout.count("run_1 on pythia (smoke)") == 1
    lines = [line for line in done.stderr.splitlines() if line]
    for line in ("activations: begins", "training, seed 0: begins", "training, seed 1: begins"):
        assert lines.count(line) == 1, line
    starts = ("run_1: ", "fetching texts and questions ", "data sets of probing texts: ",
              "probing set ", "download: ", "activations: ", "training, ",
              "reconstruction, ", "conditioning, ", "sparse probing, ", "separation, ",
              "unlearning, ", "yardstick: ")
    assert [line for line in lines if not line.startswith(starts)] == []


def test_processes_that_are_stopped_continue_to_the_same_bytes(small_hub, two, tmp_path):
    stopped = torchrun(small_hub, tmp_path, 2, "SIGTERM", 9, STEP, who=1)
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped; `python experiment.py --out_dir=run_1` continues") == 1
    shutil.rmtree(tmp_path / "run_1")
    assert torchrun(small_hub, tmp_path, 2).returncode == 0
    assert contents(tmp_path / "run_1") == contents(two[0] / "run_1")


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_dies_ends_the_others_with_an_error(small_hub, tmp_path, who):
    done = torchrun(small_hub, tmp_path, 2, "SIGKILL", 9, STEP, who=who)
    assert done.returncode != 0
    assert "Signal 9" in done.stderr or done.returncode == -signal.SIGKILL
    assert f"error: process {1 - who} of 2 lost another one" in done.stderr
    assert not (tmp_path / "run_1/final_info.json").exists()


def test_a_batch_that_processes_cannot_share_is_said_once(small_hub, tmp_path):
    done = torchrun(small_hub, tmp_path, 3)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: batch_size=256 in RUNS, BUDGETS or CustomSAEConfig cannot be ")
    assert line.endswith("use a multiple of the 3 processes")
