"""The budget `paper`: what it promises, and its path from text to notes at a small scale."""

import dataclasses
import json

import pytest
import small

import experiment as ex
from experiment import BUDGETS, resolve_config
from lab.substrates import Pythia
from lab.substrates.pythia import megabytes
from lab.substrates.texts import SIZES


@pytest.mark.parametrize("run", [run for run in ex.RUNS if run != "run_10"])
def test_it_trains_three_seeds_of_32768_features_on_100_million_tokens(tmp_path, run):
    config = resolve_config(run, "paper", tmp_path)
    assert config.expansion * Pythia.d_in == 32_768
    assert config.steps * config.batch_size >= 100e6
    assert len(config.seeds) == 3
    assert config.warmup_steps < 0.1 * config.steps


def test_it_keeps_what_rows_are_there_to_vary(tmp_path):
    fields = ("orthogonality", "alpha", "eta", "regroup_every")
    for run in (run for run in ex.RUNS if run != "run_10"):
        paper, full = (resolve_config(run, budget, tmp_path) for budget in ("paper", "full"))
        for field in fields:
            assert getattr(paper, field) == getattr(full, field)


def test_it_uses_no_less_text_of_any_kind_and_all_there_is_to_learn():
    paper, full = (dataclasses.asdict(SIZES[budget]) for budget in ("paper", "full"))
    assert all(paper[name] >= full[name] for name in full)
    assert paper["learn_tokens"] > 500e6  # WikiText-103 has 103 million
    assert megabytes(SIZES["paper"]) > megabytes(SIZES["full"])


def test_its_path_from_text_to_notes_with_activations_streamed(job, monkeypatch, tmp_path, capfd):
    row = dict(steps=24, batch_size=256, warmup_steps=4, n_seeds=2, resample_every=6,
               checkpoint_every=9, log_every=3, buffer_gigabytes=0.002, target_l0=10.0)
    few = dict(probe_train=40, probe_test=20, frontier_contexts=4, question_candidates=8)
    monkeypatch.setattr(ex, "BUDGETS", {"paper": {**BUDGETS["paper"], **row}})
    monkeypatch.setattr(ex, "SIZES", {"paper": dataclasses.replace(SIZES["paper"], **few)})
    monkeypatch.setenv("SAE_BUDGET", "paper")
    assert job("run_8") == 0
    info = json.loads((tmp_path / "run_8/final_info.json").read_text())
    assert info["budget"] == "paper"
    assert info["config"]["d_sae"] == 64 * small.WIDTH
    assert info["config"]["train_tokens_unique"] * 2 * small.WIDTH > 2e6  # more than memory holds
    assert None not in [info["means"][name] for name in ("explained_variance", "ce_score", "l0")]
    assert ", paper, seeds 0 1" in (tmp_path / "notes.txt").read_text()
    assert "run_8 on pythia (paper)" in capfd.readouterr().out
