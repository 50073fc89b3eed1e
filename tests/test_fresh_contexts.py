"""Unlearning judged on contexts that chose nothing, against the evaluation's own measurements."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from tiny_substrate import QUESTIONS, knowing_substrate, rare_sae, tiny_substrate

import experiment
from lab import storage
from lab.evaluations import unlearning
from lab.evaluations.heldout import HeldOut
from lab.results.frontier import (
    AREAS,
    COST_GRID,
    METRICS,
    hull_weights,
    mean_cost,
    unlearning_area,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import fresh_contexts
from fresh_contexts import Judged
from test_controls import SMALL, forbidden


@pytest.fixture
def substrate(tmp_path, monkeypatch):
    monkeypatch.setattr(unlearning, "THRESHOLDS", (0.1, 0.9))
    return tiny_substrate(tmp_path, questions=3 * QUESTIONS, frontier_contexts=2)


def test_a_half_that_is_judged_by_the_other_has_the_area_of_crossfitting():
    rng = np.random.default_rng(0)
    gain_SR = rng.random((9, 12)) * np.arange(9)[:, None]
    kept = [rng.normal(0.02, 0.03, (9, n)) * np.arange(9)[:, None] for n in (12, 8)]
    areas = []
    for chosen, judged in ((0, 1), (1, 0)):
        weight_GS = hull_weights(mean_cost([part[:, chosen::2] for part in kept]),
                                 gain_SR[:, chosen::2].mean(1), COST_GRID)
        halves = [part[:, judged::2] for part in kept]
        areas.append(Judged(weight_GS, gain_SR[:, judged::2], halves).area())
    assert np.mean(areas) == pytest.approx(unlearning_area(gain_SR, *kept), rel=1e-12)
    assert min(areas) > 0


def test_fresh_contexts_are_measured_as_the_evaluation_would(tmp_path, monkeypatch):
    monkeypatch.setattr(unlearning, "THRESHOLDS", (0.1, 0.9))
    heldout, more = (HeldOut(knowing_substrate(tmp_path, frontier_contexts=n)) for n in (2, 8))
    sae = rare_sae(heldout.residuals())
    statistics = unlearning.feature_statistics(sae, [heldout.residuals(k) for k in (0, 1)])
    part, whole = (json.loads(json.dumps(unlearning.evaluate_unlearning(
        sae, texts, statistics, 0))) for texts in (heldout, more))
    sets = unlearning.feature_sets(sae, more, statistics)
    fresh = fresh_contexts.on_fresh_contexts(sae, more, part, sets)
    assert fresh["contexts"] == dict.fromkeys(part["contexts"], 6)
    assert fresh["reference_rise"] == pytest.approx(whole["reference_rise"][2:], abs=1e-4)
    both = 0
    for mine, study, full in zip(fresh["sets"], part["sets"], whole["sets"], strict=True):
        for kind, share in mine["share"].items():
            assert share == full["share"][kind][2:]
            rise, known, first = (np.array(one["rise"][kind], dtype=float)
                                  for one in (mine, full, study))
            rise = np.concatenate([first, rise], 1)  # contexts of the study come first
            done = np.isfinite(rise) & np.isfinite(known)
            np.testing.assert_allclose(rise[done], known[done], atol=2e-4)
            both += done[:, 2:].sum()
    assert both > 20
    judged = fresh_contexts.judge(fresh, part)
    assert list(judged) == list(AREAS)
    assert judged["unlearning_area"].area() > 0
    for name, again in fresh_contexts.judge(whole, whole).items():  # the same contexts do both
        twice = [table.repeat(2, axis=1) for table in METRICS[name].tables(whole)]
        assert again.area() == pytest.approx(unlearning_area(*twice), rel=1e-9)
    whole["sets"][0]["share"]["retain"][0] += 0.1
    with pytest.raises(AssertionError, match="not what the study clamped"):
        fresh_contexts.on_fresh_contexts(sae, more, whole, sets)


def test_an_interval_is_of_seeds_and_texts():
    weight_GS = np.ones((len(COST_GRID), 1))

    def rows(gains, spread):
        texts_R = np.tile([1 - spread, 1 + spread], 50)
        return {seed: {"a": Judged(weight_GS, gain * texts_R[None], [np.zeros((1, 40))])}
                for seed, gain in enumerate(gains)}

    steady = rows([1.0, 2.0, 4.0], 0.0)
    mean, low, high = fresh_contexts.interval(steady, None, "a")
    half = scipy.stats.t.ppf(0.975, 2) * np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))
    assert fresh_contexts.interval(steady, steady, "a") == (0, 0, 0)
    texts = rows([1.0, 1.0, 1.0], 0.5)
    mean, low, high = fresh_contexts.interval(texts, None, "a")
    assert mean == pytest.approx((low + high) / 2) == 1
    assert high - mean == pytest.approx(1.96 * 0.5 / 10, rel=0.15)
    mean, low, high = fresh_contexts.interval(texts, steady, "a")  # texts that matter to one side
    assert mean == pytest.approx(1 - 7 / 3)
    assert high - mean == pytest.approx(np.hypot(half, 1.96 * 0.5 / 10), rel=0.15)


def test_the_command_measures_once(substrate, monkeypatch, capsys):
    monkeypatch.setenv("SAE_BUDGET", "smoke")
    monkeypatch.setattr(experiment, "BUDGETS", {"smoke": SMALL})
    monkeypatch.setattr(fresh_contexts, "open_substrate", lambda: substrate)
    monkeypatch.setattr(fresh_contexts, "SEEDS", 2)
    monkeypatch.setattr(fresh_contexts, "MAIN", {
        name: fresh_contexts.MAIN[name] for name in ("vanilla", "adaptive")})
    fresh_contexts.main()
    first = capsys.readouterr().out
    names = [line.strip("| ").split(" | ")[0] for line in first.splitlines()]
    assert names == [
        "row", "---", "vanilla", "adaptive", "minus vanilla",
        "mean_difference", "minus adaptive", "logistic_regression", "minus adaptive"]
    assert "nan" not in first
    for module in (storage, experiment):
        monkeypatch.setattr(module, "write_tensors", forbidden)
    fresh_contexts.main()
    assert capsys.readouterr().out == first
