"""The real main job on the stand-in at smoke budget, and what its command promises."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from main_job import MainJob
from safetensors.torch import load_file

import experiment as ex
import plot
from lab.console import UserError
from lab.evaluations.probing import K_VALUES
from lab.results.final_info import read_result
from lab.results.tracking import Tracker
from lab.storage import Cache, digest, laboratory_digest
from lab.substrates.texts import SIZES

ROOT = Path(__file__).resolve().parent.parent
EVALUATIONS = ("reconstruction", "conditioning", "separation", "unlearning")


@pytest.fixture(scope="session")
def study(main_job):
    """A folder in which run_1 has run."""
    return main_job.folder


def read(folder):
    text = (folder / "final_info.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    return json.loads(text)


# -- What a run writes ---------------------------------------------------------------------------


def test_results_have_the_keys_of_the_given_baseline_and_their_own(study):
    info = read(study / "run_1")
    baseline = read(ROOT / "run_0")
    assert set(baseline) <= set(info)
    sizes = {"texts"}  # how many there were of each class: more than SAEBench says
    assert set(info["eval_config"]) == set(baseline["eval_config"]) | sizes
    assert set(baseline["sae_cfg_dict"]) == set(info["sae_cfg_dict"])
    for side in ("llm", "sae"):
        assert set(baseline["eval_result_metrics"][side]) == set(info["eval_result_metrics"][side])
    assert set(info["eval_result_details"][0]) == set(baseline["eval_result_details"][0]) | sizes
    own = ("run", "substrate", "budget", "config", "means", "stderrs", "seeds", "comparisons",
           "environment", "timing", "skipped", *EVALUATIONS)
    assert set(own) <= set(info)
    for name in EVALUATIONS:
        assert len(info[name]["per_seed"]) == 2


def test_results_tell_what_ran(study):
    info = read(study / "run_1")
    assert (info["run"], info["substrate"], info["budget"]) == ("run_1", "standin", "smoke")
    assert info["config"] == json.loads((study / "run_1" / "config.json").read_text())
    assert (info["config"]["alpha"], info["config"]["orthogonality"]) == (0.1, "adaptive")
    assert (info["config"]["d_in"], info["config"]["d_sae"]) == (576, 1152)
    assert {name: info["config"][name] for name in dataclasses.asdict(SIZES["smoke"])} == (
        dataclasses.asdict(SIZES["smoke"]))
    assert info["environment"]["evaluation_code"] == laboratory_digest()
    assert info["environment"]["packages"]["torch"] == torch.__version__
    phases = ("download", "activations", "training", "sparse_probing", *EVALUATIONS)
    assert {f"{phase}_seconds" for phase in phases} <= set(info["timing"])


def test_the_numbers_of_a_run_make_sense(study):
    info = read(study / "run_1")
    means = info["means"]
    assert [row["seed"] for row in info["seeds"]] == [0, 1]
    assert means["ce_score"] > 0.2
    assert means["explained_variance"] > 0.3
    assert means["llm_test_accuracy"] > 0.75
    assert means["sae_top_50_test_accuracy"] > 0.5
    assert all(f"sae_top_{k}_test_accuracy" in means for k in K_VALUES)
    assert set(info["stderrs"]) == set(means)
    assert all(error is not None for name, error in info["stderrs"].items()
               if means[name] is not None)
    for seed in (0, 1):
        unlearning = info["unlearning"]["per_seed"][seed]
        kinds = ("forget", "retain", "news", "dictionary")
        assert unlearning["contexts"] == dict.fromkeys(kinds, 4)
        assert {one["n_features"] for one in unlearning["sets"]} >= {10, 20}
        for settings in (unlearning["settings"], unlearning["control"]):
            assert 8.0 in {one["multiplier"] for one in settings}
            assert all(f"{kind}_ce_rise" in one for kind in kinds for one in settings)
    assert info["yardstick"].keys() == {"mean_difference", "logistic_regression"}
    learnt = info["environment"]["text"]["tokens"]["learn"]
    assert learnt.keys() == {"forget", "leads", "paragraphs", "how-to texts"}
    assert min(learnt.values()) > 0


def test_training_curves_have_a_line_a_logged_step_and_seed(study):
    text = (study / "run_1" / "history.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for seed in (0, 1):
        steps = [line for line in lines if line["seed"] == seed and "loss" in line]
        assert [line["step"] for line in steps] == list(range(10, 121, 10))
        assert all(line["alpha"] == 0.1 for line in steps)
        assert steps[-1]["loss"] == read(study / "run_1")["seeds"][seed]["final_loss"]


def test_a_run_says_what_came_out_and_notes_it(study, main_job):
    lines = main_job.stdout.read_text().splitlines()
    assert lines[0] == "run_1 on standin (smoke), mean ± standard error of 2 seeds"
    assert lines[-1] == "written to run_1"
    notes = (study / "notes.txt").read_text()
    assert notes.count("=== run_1 (written by experiment.py) ===") == 1
    assert all(line in notes.splitlines() for line in lines[1:-1])
    assert "Traceback" not in main_job.stderr.read_text()
    assert "Warning" not in main_job.stderr.read_text()


def test_exports_are_the_same_sae(study):
    folder = study / "run_1" / "seed_0"
    lens = load_file(folder / "sae_lens" / "sae_weights.safetensors")
    other = torch.load(folder / "dictionary_learning" / "trainer_0" / "ae.pt", weights_only=True)
    torch.testing.assert_close(lens["W_enc"], other["encoder.weight"].T)
    torch.testing.assert_close(lens["W_dec"], other["decoder.weight"].T)
    torch.testing.assert_close(lens["b_enc"], other["encoder.bias"])
    torch.testing.assert_close(lens["b_dec"], other["bias"])
    torch.testing.assert_close(lens["W_dec"].norm(dim=1), torch.ones(len(lens["W_dec"])))


def test_a_second_run_gives_the_same_numbers_and_computes_nothing(study, tmp_path):
    cache = Path(os.environ.get("SAE_CACHE_DIR", str(study / "cache")))

    def kept():
        files = (cache / "standin").rglob("*.safetensors")
        return {path: path.stat().st_mtime_ns for path in files}

    before = kept()
    again = MainJob(tmp_path, "run_1", SAE_CACHE_DIR=str(cache), OMP_NUM_THREADS="1")
    assert again.wait() == 0, again.stderr.read_text()[-1500:]
    assert kept() == before
    first, second = ({key: part for key, part in read(folder / "run_1").items()
                      if key not in small.TIMES} for folder in (study, tmp_path))
    assert first == second


def test_plot_draws_the_run(study):
    done = subprocess.run([sys.executable, ROOT / "plot.py"], cwd=study, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert (study / "figures" / "overview.png").stat().st_size > 10_000


# -- What is refused -----------------------------------------------------------------------------


def test_a_bad_row_is_named_beside_those_that_there_are_and_the_exit_code_is_1(tmp_path):
    bad = MainJob(tmp_path, "run_11", SAE_CACHE_DIR=str(tmp_path / "cache"))
    assert (bad.wait(), bad.stdout.read_text()) == (1, "")
    lines = bad.stderr.read_text().splitlines()
    assert lines[0].startswith("error: --out_dir ends in 'run_11', which is no row of the table")
    assert [line.split()[0] for line in lines[1:]] == list(ex.RUNS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "stderr", "stdout"]


@pytest.mark.parametrize(("out_dir", "environment", "reason"), [
    ("run_10", {}, "missing: run_1, run_2, run_3, run_4, run_5"),
    ("run_2", {}, "run_2 is a file; name a folder"),
    ("run_3", {"SAE_BUDGET": "nonsense"}, "SAE_BUDGET='nonsense' is unknown; use one of smoke"),
    ("run_3", {"SAE_SUBSTRATE": "gpt9"}, "SAE_SUBSTRATE='gpt9' is unknown; use auto, pythia"),
    ("run_3", {"SAE_CACHE_DIR": "run_2/x"}, "cache run_2/x cannot be written"),
])
def test_bad_input_is_one_line_and_harms_nothing(job, monkeypatch, tmp_path, capfd, out_dir,
                                                 environment, reason):
    (tmp_path / "run_2").write_text("precious")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert job(out_dir) == 1
    printed = capfd.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert errors == printed.err.splitlines()[-1:]
    assert reason in errors[0]
    assert printed.out == ""
    assert (tmp_path / "run_2").read_text() == "precious"
    assert not (tmp_path / "run_3").exists()


def test_a_second_process_on_the_same_folder_leaves(job, tmp_path, capfd):
    (tmp_path / "run_1").mkdir()
    with Cache(tmp_path / "cache").lock(f"run-{digest(str((tmp_path / 'run_1').resolve()))}"):
        assert job() == 1
    assert f"another process works on {tmp_path / 'run_1'}" in capfd.readouterr().err
    assert not list((tmp_path / "run_1").iterdir())


def test_a_row_that_cannot_be_trained_is_refused_before_anything_is_fetched(
        job, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(ex, "BUDGETS", {"smoke": {**small.TINY, "log_every": 25}})
    assert job() == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: log_every=25 in RUNS, BUDGETS or CustomSAEConfig cannot be ")
    assert line.endswith("use at most steps=24")
    assert not (tmp_path / "run_1").exists()


# -- The table -----------------------------------------------------------------------------------


def test_rows_differ_only_by_their_row(tmp_path):
    default = dataclasses.asdict(ex.CustomSAEConfig(purpose=""))
    for run, row in ex.RUNS.items():
        if run != "run_10":
            config = dataclasses.asdict(ex.resolve_config(run, "full", tmp_path))
            assert {key: value for key, value in config.items() if value != default[key]} == {
                key: value for key, value in row.items() if value != default[key]}
    alphas = {"run_1": 0.1, "run_2": 0.05, "run_3": 0.01, "run_7": 0.05, "run_8": 0, "run_9": 0.25}
    for run, alpha in alphas.items():
        assert ex.resolve_config(run, "full", tmp_path).alpha == alpha


def test_run_10_takes_the_best_of_its_candidates_on_seeds_of_its_own(tmp_path):
    for i in range(1, 6):
        with pytest.raises(UserError, match=f"missing: run_{i}"):
            ex.resolve_config("run_10", "full", tmp_path)
        config = dataclasses.asdict(ex.resolve_config(f"run_{i}", "full", tmp_path))
        info = {"means": {"unlearning_area": float(i == 4)}, "budget": "full",
                "seeds": [{"seed": 0, "unlearning_area": float(i == 4)}],
                "substrate": "standin", "config": config}
        (tmp_path / f"run_{i}").mkdir()
        (tmp_path / f"run_{i}" / "final_info.json").write_text(json.dumps(info))
    config = ex.resolve_config("run_10", "full", tmp_path)
    assert (config.alpha, config.regroup_every) == (0.05, 100)
    assert not set(config.seeds) & set(ex.resolve_config("run_1", "full", tmp_path).seeds)


# -- Machines ------------------------------------------------------------------------------------


def test_a_processor_that_has_bfloat16_is_used_in_it(processor, job):
    """The language model's products and L_dir's; nothing but rounding differs."""
    results = {}
    for has in (True, False):
        processor(bfloat16=has)
        assert job(f"{has}/run_7") == 0
        results[has] = read_result(Path(f"{has}/run_7"))
        assert results[has]["environment"]["language_model_dtype"] == (
            "bfloat16" if has else "float32")
    for name in ("ce_base", "ce_sae", "explained_variance", "l_dir"):
        with_it, without = (results[has]["means"][name] for has in (True, False))
        assert with_it == pytest.approx(without, rel=0.02)
        assert with_it != without


# -- Collapse ------------------------------------------------------------------------------------

COLLAPSED = {
    "nothing fires": dict(learning_rate=1e-12, resample_fraction=0.0),
    "everything fires": dict(learning_rate=1e-12),
    "no question": dict(question_candidates=0),
    "too few texts": dict(probe_train=4, probe_test=2),
}


@pytest.mark.parametrize("how", COLLAPSED)
def test_collapsed_runs_end_with_defined_numbers(job, monkeypatch, tmp_path, how):
    sizes = {name: value for name, value in COLLAPSED[how].items()
             if name in dataclasses.asdict(small.TINY_SIZES)}
    row = {name: value for name, value in COLLAPSED[how].items() if name not in sizes}
    monkeypatch.setattr(ex, "BUDGETS", {"smoke": {**small.TINY, **row, "n_seeds": 1}})
    monkeypatch.setattr(ex, "SIZES", {"smoke": dataclasses.replace(small.TINY_SIZES, **sizes)})
    if how.endswith("fires"):
        bias = -100.0 if how.startswith("nothing") else 100.0
        monkeypatch.setattr(ex.CustomSAE, "initialize_biases_", lambda sae, *_:
                            sae.b_enc.data.fill_(bias))
    assert job() == 0
    info = read_result(tmp_path / "run_1")
    for path in tmp_path.glob("run_1/*.json*"):
        assert "NaN" not in path.read_text()
        assert "Infinity" not in path.read_text()
    means, unlearning = info["means"], info["unlearning"]["per_seed"][0]
    if how == "nothing fires":
        assert means["l0"] == means["frac_alive"] == means["unlearning_area"] == 0
        assert means["sae_test_accuracy"] == pytest.approx(0.5, abs=0.1)
    if how == "everything fires":
        assert means["l0"] == 2 * small.WIDTH
        assert means["forget_features"] == 0
    if how == "no question":
        assert (means["unlearning_score"], unlearning["counts"]["forget"]["kept"]) == (None, 0)
    if how == "too few texts":
        assert means.get("sae_test_accuracy") is None
        assert list(info["skipped"])
    assert plot.read_study([tmp_path / "run_1"])[0]


# -- Secrets and code ----------------------------------------------------------------------------


def test_secrets_of_the_environment_are_written_nowhere(whole, tmp_path, monkeypatch):
    for name, value in {**small.SECRETS, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker("run_1", {"alpha": 0.1, "seeds": [0], "steps": 9}, "tiny", Cache(tmp_path))
    tracker.log({"seed": 0, "step": 3, "tokens": 30, "loss": 1.0})
    tracker.finish({"means": {"l0": 1.0}, "stderrs": {}, "comparisons": {}})
    written = [path for top in (whole, tmp_path) for path in top.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert any(path.name == "final_info.json" for path in written)
    for path in written:
        assert b"5ec7e7" not in path.read_bytes(), path


def test_no_code_comes_with_data():
    source = "".join(path.read_text() for path in (
        ROOT / "experiment.py", ROOT / "plot.py", *(ROOT / "lab").rglob("*.py")))
    for unsafe in ("trust_remote_code=", "torch.load(", "import pickle", "extractall"):
        assert unsafe not in source


def test_exports_hold_no_pickled_code(whole):
    folder = whole / "run_1" / "seed_0"
    lens = load_file(folder / "sae_lens" / "sae_weights.safetensors")
    other = torch.load(folder / "dictionary_learning" / "trainer_0" / "ae.pt", weights_only=True)
    assert torch.equal(other["bias"], lens["b_dec"])
