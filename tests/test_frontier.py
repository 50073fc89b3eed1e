"""The frontier: settings are chosen on one half of the texts and judged on the other."""

import itertools
import json

import numpy as np
import pytest

from lab.results.frontier import (
    ANSWER_GRID,
    COST_GRID,
    COSTS,
    FRONTIER_END,
    METRICS,
    accuracy_area,
    answer_tables,
    area,
    crossfitted,
    forget_rise,
    hull_weights,
    interval,
    mean_cost,
    official_score,
    redraw,
    redrawn,
    text_tables,
    unlearning_area,
    variants,
)
from lab.storage import to_json

GRID = np.array([0.0, 0.05, 0.1, 0.2, 0.3])


def curve(cost, gain, grid=GRID):
    cost, gain = np.array(cost), np.array(gain)
    return hull_weights(cost, gain, grid) @ gain


# -- The best mixture ------------------------------------------------------------------------------


def test_the_best_mixture_by_hand():
    # hull (0,0) (.1,1) (.2,1.5); the point (.05,.1) is below it, (.3,1.2) beyond its top
    weight = hull_weights(np.array([0.1, 0.2, 0.05, 0.3]), np.array([1.0, 1.5, 0.1, 1.2]), GRID)
    assert weight.tolist() == pytest.approx(np.array(
        [[0, 0, 0, 0], [0.5, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]))
    assert curve([0.1, 0.2, 0.05, 0.3], [1.0, 1.5, 0.1, 1.2]).tolist() == pytest.approx(
        [0, 0.5, 1, 1.5, 1.5])


def test_a_setting_beyond_what_may_be_spent_is_not_mixed_in():
    """A tenth of it would cost 0.05 and gain 10."""
    assert curve([0.5, 0.3], [100.0, 1.0]).tolist() == pytest.approx([0, 1 / 6, 1 / 3, 2 / 3, 1])


def test_what_costs_nothing_is_used_whole_and_what_gains_nothing_is_not_used():
    assert curve([-0.01, 0.2], [0.4, 1.0]).tolist() == pytest.approx([0.4, 0.55, 0.7, 1, 1])
    assert not hull_weights(np.array([0.0, 0.1]), np.array([0.0, -1.0]), GRID).any()


def best_of_pairs(cost, gain, at):
    """The largest gain of two settings mixed, nothing among them, by trying all pairs."""
    points = [(0.0, 0.0), *((max(c, 0.0), g) for c, g in zip(cost, gain) if c <= FRONTIER_END)]
    best = max(g for c, g in points if c <= at)
    for (c1, g1), (c2, g2) in itertools.permutations(points, 2):
        if c1 <= at < c2:
            best = max(best, g1 + (g2 - g1) * (at - c1) / (c2 - c1))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_no_mixture_of_two_settings_gains_more(seed):
    rng = np.random.default_rng(seed)
    cost, gain = rng.normal(0.15, 0.15, 12), rng.normal(1, 1, 12)
    found = curve(cost, gain, COST_GRID)
    assert found.tolist() == pytest.approx([best_of_pairs(cost, gain, at) for at in COST_GRID])


@pytest.mark.parametrize("seed", range(3))
def test_mixtures_are_parts_that_spend_what_is_planned_at_most(seed):
    rng = np.random.default_rng(seed)
    cost = rng.normal(0.15, 0.15, 12)
    weight = hull_weights(cost, rng.normal(1, 1, 12), COST_GRID)
    assert weight.min() >= 0
    assert weight.sum(1).max() <= 1 + 1e-12
    assert bool((weight @ np.maximum(cost, 0) <= COST_GRID + 1e-12).all())


# -- Chosen on one half, judged on the other -------------------------------------------------------


def halves(even, odd, n=4):
    """Settings' numbers on texts of even and of odd place, [S, n]."""
    return np.stack([even, odd] * (n // 2), axis=1)


def test_what_is_chosen_on_one_half_counts_by_the_other():
    """Each of two free settings is the better one on one half, and gains nothing on the other."""
    gain, cost = halves([2.0, 0.0], [0.0, 2.0]), np.zeros((2, 4))
    assert crossfitted(gain, cost).tolist() == [0.0] * len(COST_GRID)
    gain = halves([2.0, 0.0], [1.0, 0.5])  # the first is chosen both ways: 1 and 2
    assert crossfitted(gain, cost).tolist() == [1.5] * len(COST_GRID)


def test_halves_that_are_alike_give_the_best_mixture_of_all_texts():
    rng = np.random.default_rng(0)
    gain, *kept = (rng.random((9, 1)) * np.ones((9, 6)) for _ in range(3))
    expected = hull_weights(mean_cost(kept), gain.mean(1), COST_GRID) @ gain.mean(1)
    assert crossfitted(gain, *kept) == pytest.approx(expected, abs=1e-9)


def test_what_costs_more_on_the_judging_half_is_used_less_and_what_costs_less_sooner():
    """A setting of gain 1 costs 0.1 on one half and 0.3 on the other."""
    found = crossfitted(np.ones((1, 4)), halves([0.1], [0.3]))
    expected = (np.minimum(COST_GRID / 0.3, 1) + np.minimum(COST_GRID / 0.1, 1)) / 2
    assert found == pytest.approx(expected)


def test_nobody_goes_beyond_what_was_planned():
    """Chosen on the first half: the cheap setting, which is free on the second. Chosen on the
    second: the dear one, which costs 0.9 on the first."""
    gain = np.array([[1.0] * 4, [2.0] * 4])
    found = crossfitted(gain, halves([0.1, 0.9], [0.0, 0.0]))
    assert found == pytest.approx((1.0 + np.minimum(2 * COST_GRID / 0.9, 2)) / 2)


def test_the_cost_is_the_largest_over_the_texts_that_must_stay():
    gain = np.ones((1, 4))
    assert crossfitted(gain, halves([0.1], [0.1]), halves([0.3], [0.3])) == pytest.approx(
        crossfitted(gain, halves([0.3], [0.3])))
    assert crossfitted(gain, halves([0.1], [0.3]), halves([0.3], [0.1])) == pytest.approx(
        np.minimum(COST_GRID / 0.3, 1))


def walked(gain, kept, grid):
    """The same number by number: a plan at each cost of the grid from all pairs of settings, and
    steps along it until the other half has been spent."""
    curves = []
    for chosen, judged in ((0, 1), (1, 0)):
        known = [max(part[s, chosen::2].mean() for part in kept) for s in range(len(gain))]
        hoped = [gain[s, chosen::2].mean() for s in range(len(gain))]
        path = [(0.0, 0.0)]
        for at in grid:
            options = [(0.0, {})]
            points = [(0.0, 0.0, None), *((max(known[s], 0.0), hoped[s], s)
                                          for s in range(len(gain)) if known[s] <= grid[-1])]
            options += [(g, {s: 1.0}) for c, g, s in points if c <= at]
            for (c1, g1, s1), (c2, g2, s2) in itertools.permutations(points, 2):
                if c1 <= at < c2:
                    part = (at - c1) / (c2 - c1)
                    options.append((g1 + part * (g2 - g1), {s1: 1 - part, s2: part}))
            mixture = max(options, key=lambda option: option[0])[1]
            mixture = {s: part for s, part in mixture.items() if s is not None}
            spent = max(sum(part * table[s, judged::2].mean() for s, part in mixture.items())
                        for table in kept)
            won = sum(part * gain[s, judged::2].mean() for s, part in mixture.items())
            path.append((max(spent, path[-1][0]), won))
        reached = []
        for at in grid:
            here = max(i for i, (spent, _) in enumerate(path) if spent <= at)
            value = path[here][1]
            if here + 1 < len(path):
                part = (at - path[here][0]) / (path[here + 1][0] - path[here][0])
                value += part * (path[here + 1][1] - value)
            reached.append(value)
        curves.append(reached)
    return np.mean(curves, axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_is_that_of_a_plain_walk(seed):
    rng = np.random.default_rng(seed)
    gain, *kept = (rng.normal(mean, 0.2, (6, 10)) + rng.normal(0, 0.1, (6, 1))
                   for mean in (1.0, 0.15, 0.1))
    grid = np.linspace(0, 0.3, 13)
    assert crossfitted(gain, *kept, grid=grid) == pytest.approx(walked(gain, kept, grid))


def test_many_settings_without_effect_earn_nothing():
    """Of all texts at once the best of fifty would seem to gain."""
    rng = np.random.default_rng(0)
    tables = [[rng.normal(0, 1, (50, 40)), rng.normal(0.1, 0.1, (50, 40))] for _ in range(60)]
    areas = [unlearning_area(*pair) for pair in tables]
    naive = [area(curve(cost.mean(1), gain.mean(1), COST_GRID), COST_GRID) for gain, cost in tables]
    assert abs(np.mean(areas)) < 3 * np.std(areas) / np.sqrt(len(areas))
    assert np.mean(naive) > 0.2


def test_without_a_setting_nothing_is_gained():
    assert unlearning_area(np.zeros((0, 4)), np.zeros((0, 4)), np.zeros((0, 2))) == 0
    assert accuracy_area(np.zeros((0, 4)), np.zeros((0, 4))) == 0
    assert official_score(np.zeros((0, 4)), np.zeros((0, 4))) == 0


# -- Areas -----------------------------------------------------------------------------------------


def test_areas_and_heights_by_hand():
    """One setting that costs 0.2 and gains 3: a triangle, then level."""
    gain, cost = np.full((1, 4), 3.0), np.full((1, 4), 0.2)
    assert unlearning_area(gain, cost) == pytest.approx((0.2 * 1.5 + 0.1 * 3) / 0.3)
    assert [forget_rise(gain, cost, cost=at) for at in COSTS] == pytest.approx(
        [15 * at for at in COSTS])


def lost(n, of=200):
    """Answers lost: `n` of each half."""
    return (np.arange(of) // 2 < n).astype(float)[None]


def test_accuracy_area_by_hand():
    """One setting that loses 2 % of retain and half of the forget answers."""
    assert accuracy_area(lost(50), lost(2)) == pytest.approx((0.02 * 0.25 + 0.03 * 0.5) / 0.05)
    assert ANSWER_GRID[-1] == pytest.approx(0.05)


def test_no_more_answers_count_as_lost_than_guessing_loses():
    assert accuracy_area(lost(100), lost(0)) == accuracy_area(lost(75), lost(0)) == 0.75
    assert accuracy_area(lost(60), lost(0)) == pytest.approx(0.6)


def test_the_official_score_is_the_least_accuracy_that_costs_one_answer_in_a_hundred():
    gain = np.concatenate([lost(20), lost(90), lost(40)])
    cost = np.concatenate([lost(0), lost(2), lost(1)])
    assert official_score(gain, cost) == 0.4
    assert official_score(gain[1:2], cost[1:2]) == 0


# -- Settings as an evaluation keeps them ----------------------------------------------------------


def feature_set(n_features=10, limits=(-1.0, 0.25), rise=None, share=None):
    return {"n_features": n_features, "limits": list(limits),
            "share": share or {"forget": [0.5, 0.25], "retain": [0.0, 0.5], "news": [0.25, 0.25]},
            "rise": rise or {"forget": [[1.0, 2.0], [4.0, 5.0]], "retain": [[0.0, 0.3], [0.0, 0.9]],
                             "news": [[0.1, 0.2], [0.3, 0.4]]}}


def part_of(*sets, reference=(3.0, 9.0)):
    return {"contexts": {"forget": 2, "retain": 2, "news": 2}, "sets": list(sets),
            "reference_rise": list(reference)}


def test_a_context_whose_share_is_not_above_the_limit_has_no_rise():
    made = variants(part_of(feature_set()), 10, dynamic=True)
    assert made.labels == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    assert made.rises["forget"].tolist() == [[1, 2], [4, 5], [1, 0], [4, 0]]
    assert made.rises["retain"].tolist() == [[0, 0.3], [0, 0.9], [0, 0.3], [0, 0.9]]
    assert made.rises["news"].tolist() == [[0.1, 0.2], [0.3, 0.4], [0, 0], [0, 0]]
    assert made.coverage["forget"].tolist() == [0.375, 0.375, 0.25, 0.25]
    assert made.coverage["news"].tolist() == [0.25, 0.25, 0, 0]


def test_static_settings_are_the_dynamic_ones_of_the_first_limit():
    part = part_of(feature_set(), feature_set(20))
    static, dynamic = (variants(part, 20, flag) for flag in (False, True))
    first = [i for i, (_, _, limit) in enumerate(dynamic.labels) if limit == 0]
    assert static.labels == [dynamic.labels[i] for i in first]
    for kind, rises in static.rises.items():
        assert rises.tolist() == dynamic.rises[kind][first].tolist()
        assert static.coverage[kind].tolist() == dynamic.coverage[kind][first].tolist()


def test_sets_of_more_features_are_left_out():
    part = part_of(feature_set(10), feature_set(50), feature_set(20))
    assert {s for s, _, _ in variants(part, 20, True).labels} == {0, 2}


@pytest.mark.parametrize("kind", ["forget", "retain", "news"])
def test_a_setting_that_was_not_measured_everywhere_it_clamps_is_left_out(kind):
    """Measured where the share is 0.5 alone: the dynamic clamp is whole. JSON has null there."""
    one = feature_set(share=dict.fromkeys(("forget", "retain", "news"), [0.5, 0.25]))
    one["rise"][kind][1][1] = float("nan")
    for part in (part_of(one), json.loads(to_json(part_of(one)))):
        made = variants(part, 10, dynamic=True)
        assert made.labels == [(0, 0, 0), (0, 0, 1), (0, 1, 1)]
        assert all(np.isfinite(rises).all() for rises in made.rises.values())


def test_a_cost_by_itself_needs_no_other_text_to_be_measured():
    one = feature_set()
    one["rise"]["news"][1][1] = float("nan")
    for kept, n in ((None, 1), (["news"], 1), (["retain"], 2)):
        made = variants(part_of(one), 10, dynamic=False, kept=kept)
        assert len(made.labels) == n
        assert {len(rises) for rises in made.rises.values()} == {n}


def test_tables_hold_forget_rises_then_all_that_must_stay():
    gain, retain, news = text_tables(part_of(feature_set()), 10, dynamic=False)
    assert gain.tolist() == [[1, 2], [3, 5]]  # in the first context 4 is more than 3, the reference
    assert retain.tolist() == [[0, 0.3], [0, 0.9]]
    assert news.tolist() == [[0.1, 0.2], [0.3, 0.4]]
    alone = text_tables(part_of(feature_set()), 10, dynamic=False, kept=["news"])
    assert [table.tolist() for table in alone] == [gain.tolist(), news.tolist()]


def test_destroying_one_context_does_not_make_up_for_what_is_known_in_another():
    one = feature_set(rise={"forget": [[99.0, 0.0]], "retain": [[0.0, 0.0]], "news": [[0.0, 0.0]]})
    assert text_tables(part_of(one), 10, dynamic=False)[0].mean() == 1.5


def test_a_context_of_which_the_model_knows_less_than_nothing_takes_no_gain_away():
    gain = text_tables(part_of(feature_set(), reference=(-0.5, 9.0)), 10, dynamic=False)[0]
    assert gain.tolist() == [[0, 2], [0, 5]]


def test_tables_without_a_set_still_have_all_texts():
    """So that a run whose SAE has no feature to clamp can be compared."""
    assert [table.shape for table in text_tables(part_of(), 10, True)] == [(0, 2)] * 3


def asked(limit=0, n_features=10, multiplier=32.0, whole=True):
    return {"set": 0, "n_features": n_features, "multiplier": multiplier, "limit": limit,
            "whole": whole, "right": {"forget": "01", "retain": "110"}}


def test_answers_lost_by_hand():
    part = {"asked": [asked(), asked(1), asked(0, 50), asked(multiplier=16.0), asked(whole=False)],
            "counts": {"forget": {"kept": 2}, "retain": {"kept": 3}}}
    forget, retain = answer_tables(part)
    assert forget.tolist() == [[1, 0]] * 4
    assert retain.tolist() == [[0, 0, 1]] * 4
    assert len(answer_tables(part, official=True)[0]) == 1
    empty = {**part, "asked": []}
    assert [table.shape for table in answer_tables(empty)] == [(0, 2), (0, 3)]


def test_the_primary_metric_is_of_every_setting_and_every_text():
    rng = np.random.default_rng(0)
    sets = [feature_set(n, rise={kind: (rng.random((4, 2)) / 5).tolist()
                                 for kind in ("forget", "retain", "news")}) for n in (10, 50)]
    part = part_of(*sets)
    labels = {name: set(METRICS[name].variants(part).labels) for name in METRICS
              if METRICS[name].of == "texts"}
    assert labels["unlearning_area"] == set.union(*labels.values())
    assert labels["unlearning_area_static"] < labels["unlearning_area"]
    assert labels["unlearning_area_sae_bench"] < labels["unlearning_area_static"]
    kept = {name: len(METRICS[name].tables(part)) - 1 for name in labels}
    assert kept.pop("unlearning_area_labelled") == 1
    assert set(kept.values()) == {2}


def test_coverage_is_of_the_mixtures_that_the_frontier_uses():
    """A free setting without limit covers 0.375 of forget and 0.25 of retain tokens throughout."""
    one = feature_set(limits=(-1.0,), rise={"forget": [[1.0, 1.0]], "retain": [[0.0, 0.0]],
                                            "news": [[0.0, 0.0]]})
    metric = METRICS["unlearning_area"]
    assert metric.coverage(part_of(one)) == {"forget": 0.375, "retain": 0.25, "news": 0.25}
    one["rise"]["news"] = [[0.6, 0.6]]  # never affordable: nothing is clamped
    assert metric.coverage(part_of(one)) == {"forget": 0, "retain": 0, "news": 0}
    one["rise"]["news"] = [[0.3, 0.3]]  # mixed with nothing: half of the time on the whole
    assert metric.coverage(part_of(one))["forget"] == pytest.approx(0.375 / 2)
    assert metric.coverage(part_of()) == {"forget": 0, "retain": 0, "news": 0}


# -- Texts drawn anew ------------------------------------------------------------------------------


def test_texts_are_drawn_anew_each_from_its_half():
    places = redrawn(np.random.default_rng(0), 41)
    assert (places % 2).tolist() == [i % 2 for i in range(41)]
    assert len(set(places.tolist())) < 41
    assert redrawn(np.random.default_rng(0), 1).tolist() == [0]
    drawn = redraw([np.zeros((3, 7)), np.zeros((2, 4))], np.random.default_rng(0))
    assert [len(part) for part in drawn] == [7, 4]


def test_an_interval_is_as_wide_as_the_sampling_error_of_its_texts():
    rng = np.random.default_rng(1)
    gain, cost = rng.normal(3, 1, (1, 400)), np.zeros((1, 10))  # free: the area is the mean
    low, high = interval(unlearning_area, [gain, cost])
    assert low < gain.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)
    assert interval(unlearning_area, [np.ones((1, 9)), cost]) == [1.0, 1.0]


def test_all_settings_are_judged_by_the_same_drawn_texts():
    """Two settings that differ by a constant: the better one is chosen in every draw."""
    rise = np.random.default_rng(1).normal(2, 1, (1, 50))
    both, cost = np.concatenate([rise, rise + 3]), np.zeros((2, 10))
    assert interval(unlearning_area, [both, cost]) == pytest.approx(
        [end + 3 for end in interval(unlearning_area, [rise, cost[:1]])])
