"""A configuration that cannot be trained with is one line before anything is fetched."""

import dataclasses
import math

import pytest
import torch

import experiment
from experiment import BUDGETS, MODES, RUNS, CustomSAEConfig, resolve_config
from lab.console import UserError
from lab.substrates import Standin
from lab.substrates.texts import SIZES

BAD_VALUES = [  # alone, whatever it is trained on: field, value, what would be right
    ("orthogonality", "strong", "use off, fixed, adaptive, max_cosine, gram_encoder"),
    *((name, 0, "use at least 1") for name in (
        "steps", "batch_size", "expansion", "group_size", "n_seeds", "log_every",
        "counted_tokens", "direction_tokens", "direction_every", "regroup_every", "resample_every",
        "checkpoint_every")),
    *((name, -1, "use at least 0") for name in ("alpha", "eta", "warmup_steps", "first_seed")),
    *((name, 0.0, "use more than 0") for name in (
        "learning_rate", "target_l0", "sparsity_penalty", "sparsity_rate", "share_even")),
    *((name, 1.5, "use a part, from 0 to 1") for name in (
        "ramp_fraction", "decay_fraction", "resample_fraction", "share_use")),
    ("log_every", 601, "use at most steps=600"),
    ("steps", 10.0, "use a whole number"), ("steps", "600", "use a whole number"),
    ("alpha", math.nan, "use a finite number"), ("alpha", "0.1", "use a finite number"),
    ("learning_rate", math.inf, "use a finite number"), ("eta", None, "use a finite number"),
]
BAD_FITS = [  # on a model of width 512 with 30,000 tokens and two processes
    ("group_size", 4096, "use fewer than F=4096"), ("target_l0", 4097.0, "use at most F=4096"),
    ("batch_size", 30_001, "use at most the 30000 tokens there are to train on"),
    ("batch_size", 2047, "use a multiple of the 2 processes"),
]


def line(name, value, right):
    return (f"{name}={value!r} in RUNS, BUDGETS or CustomSAEConfig cannot be trained with; "
            f"{right}")


@pytest.mark.parametrize(("name", "value", "right"), BAD_VALUES)
def test_a_value_that_makes_no_sense_is_named_with_what_would_be_right(name, value, right):
    with pytest.raises(UserError) as error:
        CustomSAEConfig(**{name: value})
    assert str(error.value) == line(name, value, right)


@pytest.mark.parametrize(("name", "value", "right"), BAD_FITS)
def test_a_value_that_does_not_fit_model_text_or_processes_is_named(name, value, right):
    config = CustomSAEConfig(**{name: value})
    with pytest.raises(UserError) as error:
        config.check_fits(d_in=512, tokens=30_000, n_processes=2)
    assert str(error.value) == line(name, value, right)


def test_the_largest_values_that_fit_are_taken():
    config = CustomSAEConfig(group_size=4095, target_l0=4096.0, batch_size=30_000, log_every=600)
    config.check_fits(d_in=512, tokens=30_000, n_processes=2)


def test_every_field_of_every_type_is_checked():
    """So that a new field cannot be forgotten."""
    for field in dataclasses.fields(CustomSAEConfig):
        if field.type in (int, float):
            with pytest.raises(UserError, match=f"^{field.name}="):
                CustomSAEConfig(**{field.name: "text"})


@pytest.mark.parametrize("run", [run for run in RUNS if run != "run_10"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_row_of_the_table_can_be_trained_with(tmp_path, run, budget):
    for d_in in (512, 576):
        resolve_config(run, budget, tmp_path).check_fits(d_in, SIZES[budget].learn_tokens, 1)


def test_every_budget_says_how_much_text_there_is():
    assert set(BUDGETS) == set(SIZES)


def test_rows_differ_only_by_what_they_say(tmp_path):
    default = CustomSAEConfig(**BUDGETS["smoke"])
    for run, row in RUNS.items():
        if run != "run_10":
            config = resolve_config(run, "smoke", tmp_path)
            different = {field.name for field in dataclasses.fields(config)
                         if getattr(config, field.name) != getattr(default, field.name)}
            assert different <= row.keys()
            assert config.orthogonality in MODES


def test_seeds_are_consecutive_from_the_first():
    assert CustomSAEConfig(first_seed=100, n_seeds=3).seeds == [100, 101, 102]


# -- Through the main job --------------------------------------------------------------------------


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """Runs a row with changes on the stand-in, whose texts nobody may fetch; gives the lines on
    stderr."""

    def main(run="run_2", d_in=Standin.d_in, **changes):
        monkeypatch.setitem(RUNS, run, {**RUNS.get(run, {}), **changes})
        assert experiment.main([f"--out_dir={tmp_path / run}"]) == 1
        assert not (tmp_path / run).exists()
        return capsys.readouterr().err.splitlines()

    monkeypatch.setattr(Standin, "fetch", lambda self: pytest.fail("fetched"))
    monkeypatch.setattr(experiment.Interrupts, "install", lambda self: None)
    for name, value in {"SAE_SUBSTRATE": "standin", "SAE_BUDGET": "smoke",
                        "SAE_CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return main


@pytest.mark.parametrize(("name", "value", "right"), [
    ("batch_size", 40_000, "use at most the 30000 tokens there are to train on"),
    ("group_size", 1152, "use fewer than F=1152"),
    ("log_every", 200, "use at most steps=120"), ("steps", 0, "use at least 1"),
    ("target_l0", 2000.0, "use at most F=1152")])
def test_a_bad_row_is_one_line_before_any_download(main, monkeypatch, name, value, right):
    monkeypatch.setitem(BUDGETS, "smoke", {**BUDGETS["smoke"], name: value})
    assert main() == [f"error: {line(name, value, right)}"]


def test_a_batch_that_the_processes_cannot_share_is_one_line(main, monkeypatch):
    monkeypatch.setattr(experiment.Processes, "__init__",
                        lambda self: vars(self).update(size=3, rank=0, device=torch.device("cpu")))
    assert main() == [f"error: {line('batch_size', 2048, 'use a multiple of the 3 processes')}"]


def test_a_misspelt_field_is_one_line(main):
    assert main(alhpa=0.3) == [
        "error: alhpa in RUNS or BUDGETS is no field of CustomSAEConfig"]


def test_an_unknown_budget_is_one_line_also_where_no_sizes_of_text_are_given(main, monkeypatch):
    monkeypatch.setenv("SAE_BUDGET", "huge")
    for _ in range(2):
        assert main() == ["error: SAE_BUDGET='huge' is unknown; use one of full, smoke, paper"]
        monkeypatch.setitem(BUDGETS, "huge", {})


def test_run_10_names_the_runs_that_it_needs(main):
    (said,) = main("run_10")
    assert said.startswith("error: this run repeats the best of run_1 to run_5")
    assert "missing: run_1, run_2, run_3, run_4, run_5." in said
