"""Nothing is lost and nothing is silently wrong: kills, signals, full disks, damage on the way."""

import os
import resource
import shutil
import signal
import socket

import pytest
import small
import torch
from small import child, contents

import experiment as ex
from lab import storage
from lab.distributed import Interrupts
from lab.language_model import LanguageModel
from lab.results.final_info import read_result
from lab.substrates import standin

STOPPED = "stopped; `python experiment.py --out_dir=run_1` continues where this left off"


def test_killed_in_the_middle_of_writes_a_run_ends_with_the_same_bytes(
        small_hub, whole, job, tmp_path):
    for call, of in ((1, "write:activations"), (3, "write:trained"), (1, "write:ae.pt"),
                     (2, "write:results")):
        assert child(small_hub, tmp_path, "SIGKILL", call, of).returncode == -signal.SIGKILL, of
        assert not (tmp_path / "run_1" / "final_info.json").exists()
        parts = [part.relative_to(tmp_path) for part in tmp_path.rglob("*.part")]
        assert any(of.removeprefix("write:") in str(part) for part in parts), parts
        if of == "write:ae.pt":  # as a harness does
            shutil.rmtree(tmp_path / "run_1")
    assert job() == 0
    assert contents(tmp_path / "run_1") == contents(whole / "run_1")


def test_killed_while_its_activations_are_streamed_a_run_ends_with_the_same_bytes(
        small_hub, tmp_path):
    row = {"SMALL_ROW": '{"buffer_gigabytes": 0.001, "n_seeds": 1}'}  # of 0.0015 that there are
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    assert child(small_hub, whole, **row).returncode == 0
    for call, of in ((3, "write:activations/.forget"), (9, "experiment.StreamedBuffer.batch"),
                     (2, "write:trained"), (8, "experiment.StreamedBuffer.batch")):
        done = child(small_hub, folder, "SIGKILL", call, of, **row)
        assert done.returncode == -signal.SIGKILL, of
    assert child(small_hub, folder, **row).returncode == 0
    assert contents(folder / "run_1") == contents(whole / "run_1")


def test_signals_end_every_phase_with_one_line_and_nothing_is_lost(whole, job, tmp_path, capfd):
    phases = (
        ("lab.substrates.pythia.Pythia.corpus", "SIGTERM"),
        ("lab.language_model.LanguageModel.residual", "SIGINT"),
        ("experiment.CustomTrainer.step", "SIGTERM"),
        ("experiment.CustomTrainer.regroup_", "SIGINT"),
        ("lab.evaluations.evaluate_reconstruction", "SIGTERM"),
        ("lab.evaluations.evaluate_conditioning", "SIGINT"),
        ("lab.evaluations.probing.probe_table", "SIGTERM"),
        ("lab.evaluations.unlearning.answers", "SIGINT"),
        ("lab.evaluations.unlearning.summarize", "SIGTERM"),
    )
    for of, event in phases:
        with pytest.MonkeyPatch.context() as patch:
            small.at_call(event, 1, of, patch.setattr)
            assert job() == 128 + getattr(signal, event), of
        printed = capfd.readouterr().err
        assert printed.splitlines()[-1] == STOPPED, of
        assert "Traceback" not in printed
        assert not list(tmp_path.rglob("*.part"))
    assert job() == 0
    assert contents(tmp_path / "run_1") == contents(whole / "run_1")


def test_a_signal_after_the_last_look_is_not_lost():
    interrupts = Interrupts()
    with pytest.raises(Interrupts.Stop), interrupts.deferred():
        interrupts.handle(signal.SIGTERM, None)
    with pytest.raises(Interrupts.Stop):
        interrupts.handle(signal.SIGTERM, None)


def test_a_signal_ends_a_download_that_hangs(job, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
        monkeypatch.setenv("SAE_SUBSTRATE", "standin")
        run = standin.subprocess.run

        def start(*arguments, **options):
            small.happen("SIGTERM")
            return run(*arguments, **options)

        monkeypatch.setattr(standin.subprocess, "run", start)
        assert job() == 143
    assert capfd.readouterr().err.splitlines()[-1] == STOPPED


def test_a_disk_that_takes_no_more_is_one_line_and_damages_nothing(whole, job, tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (20_000, 100_000, 400_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert job() == 1, limit
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        lines = capfd.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        assert lines[-1].startswith(f"error: File too large: {tmp_path / 'cache'}")
        assert not list(tmp_path.rglob("*.part"))
    assert job() == 0
    assert contents(tmp_path / "run_1") == contents(whole / "run_1")


def test_a_read_only_cache_is_one_line(job, monkeypatch, capfd):
    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", refuse)
    assert job() == 1
    assert "cannot be written (Read-only file system); set SAE_CACHE_DIR" in capfd.readouterr().err


@pytest.mark.parametrize("of", ["lab.language_model.LanguageModel.residual",
                                "experiment.CustomTrainer.step",
                                "lab.evaluations.probing.probe_table"])
def test_a_cache_that_vanishes_costs_work_and_nothing_else(whole, job, of, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        small.at_call("vanish", 2, of, patch.setattr)
        assert job() == 0
    assert contents(tmp_path / "run_1") == contents(whole / "run_1")


def test_a_checkpoint_under_another_name_is_not_taken(tmp_path, capsys):
    first, second = tmp_path / "train-0.safetensors", tmp_path / "train-1.safetensors"
    for path in (first, second):
        storage.write_tensors(path, {"x": torch.ones(2)}, path.name)
    shutil.copy(second, first)
    assert storage.read_tensors(first) is None
    assert "made anew" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_kept(job, monkeypatch, tmp_path, capfd):
    step = ex.CustomTrainer.step

    def poisoned(self, *arguments):
        terms = step(self, *arguments)
        if self.step_count == 12:  # where the sparse code sees a NaN, it takes it for silence
            self.sae.W_enc.data[:, 3] = torch.nan
        return terms

    monkeypatch.setattr(ex.CustomTrainer, "step", poisoned)
    assert job() == 1
    printed = capfd.readouterr().err
    assert "error: non-finite sae.W_enc_FD at step 12, seed 0: loss " in printed
    (checkpoint,) = (tmp_path / "cache").rglob("trained/*")
    tensors, note = storage.read_tensors(checkpoint)
    assert note["step_count"] == 6
    assert not storage.non_finite(tensors)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_residuals_that_are_not_finite_are_never_kept(job, monkeypatch, tmp_path, capfd, bad):
    residual = LanguageModel.residual
    monkeypatch.setattr(LanguageModel, "residual", lambda self, tokens, layout=None: residual(
        self, tokens, layout).index_fill(1, torch.tensor([2]), bad))
    assert job() == 1
    assert "the language model gives residuals that are not finite" in capfd.readouterr().err
    assert not list((tmp_path / "cache").rglob("activations/*"))


def test_residuals_beyond_the_range_of_float16_are_trained_on_all_the_same(
        whole, job, monkeypatch, tmp_path):
    residual = LanguageModel.residual
    monkeypatch.setattr(LanguageModel, "residual", lambda self, tokens, layout=None: 1e6 * residual(
        self, tokens, layout))
    assert job() == 0
    ours, theirs = (read_result(folder / "run_1")["means"] for folder in (tmp_path, whole))
    for name in ("explained_variance", "l0", "sae_test_accuracy"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.1), name
