"""Data-parallel training with torchrun: two gloo processes against one."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import small
import torch
from safetensors.torch import load_file
from test_robustness import contents

LIMIT = 240  # seconds; a hang is a failure, not a long wait


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    small.local_hub(folder)
    return folder


def team(hub, folder, size, event="x", call=0, of="never", who=1):
    """The small main job as `size` processes; `event` happens to process `who` alone."""
    folder.mkdir(exist_ok=True)
    settings = {
        "SAE_SUBSTRATE": "pythia", "SAE_BUDGET": "smoke", "WANDB_MODE": "disabled",
        "SAE_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", "SMALL_RANK": str(who),
    }
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    script = [small.__file__, str(hub), event, str(call), of, "--out_dir=run_1"]
    return subprocess.run(
        [sys.executable, *(launch if size > 1 else []), *script], cwd=folder, timeout=LIMIT,
        env={**os.environ, **settings}, capture_output=True, text=True,
    )


@pytest.fixture(scope="module")
def runs(hub, tmp_path_factory):
    """Folders of the same run by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    for size in (1, 2):
        done = team(hub, folder / str(size), size, who=0)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def history(folder):
    return [json.loads(line) for line in (folder / "run_1/history.jsonl").read_text().splitlines()]


def test_two_processes_take_the_path_of_one(runs):
    one, two = history(runs / "1"), history(runs / "2")
    assert [(line["seed"], line["step"]) for line in one] == [
        (line["seed"], line["step"]) for line in two]
    for ours, theirs in zip(one, two):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5), (ours, theirs)
    for seed in (0, 1):
        weights = [load_file(runs / size / f"run_1/seed_{seed}/sae_lens/sae_weights.safetensors")
                   for size in ("1", "2")]
        for name, part in weights[0].items():
            torch.testing.assert_close(weights[1][name], part, rtol=1e-3, atol=1e-3)


def test_one_set_of_results_from_two_processes(runs):
    infos = [json.loads((runs / size / "run_1/final_info.json").read_text()) for size in "12"]
    assert [info["environment"]["processes"] for info in infos] == [1, 2]
    assert infos[0]["means"].keys() == infos[1]["means"].keys()
    for name in ("l0", "explained_variance", "l_dir", "l_use", "frac_alive"):
        assert infos[1]["means"][name] == pytest.approx(infos[0]["means"][name], rel=5e-3), name
    assert (runs / "2/notes.txt").read_text().count("=== run_1 (written") == 1


def test_a_team_that_is_stopped_continues_to_the_same_bytes(hub, runs, tmp_path):
    stopped = team(hub, tmp_path, 2, "SIGTERM", 9, "CustomTrainer.step", who=1)
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped; `python experiment.py --out_dir=run_1` continues") == 1
    shutil.rmtree(tmp_path / "run_1")
    assert team(hub, tmp_path, 2).returncode == 0
    assert contents(tmp_path / "run_1") == contents(runs / "2/run_1")


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_dies_ends_the_others_with_an_error(hub, tmp_path, who):
    done = team(hub, tmp_path, 2, "SIGKILL", 9, "CustomTrainer.step", who=who)
    assert done.returncode != 0
    assert "Signal 9" in done.stderr or done.returncode == -signal.SIGKILL
    assert f"error: process {1 - who} of 2 lost another one" in done.stderr
    assert not (tmp_path / "run_1/final_info.json").exists()


def test_a_batch_that_cannot_be_shared_is_named(hub, tmp_path):
    done = team(hub, tmp_path, 3)
    assert done.returncode != 0
    assert "error: a batch of 256 tokens cannot be divided equally among 3" in done.stderr
