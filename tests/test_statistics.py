"""Means, errors, hulls and areas by hand; which results may be compared."""

import math

import numpy as np
import pytest

from lab.results.statistics import (
    COMPARABLE,
    accuracy_area,
    comparability,
    concave_envelope,
    differences,
    frontier_area,
    interval,
    mean_stderr,
    official_score,
    resampled,
    unlearning_area,
)


def test_mean_and_standard_error_by_hand():
    """std/√n with n − 1 in the variance; of one value there is none."""
    mean, error = mean_stderr([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    assert mean.tolist() == [4.0, 5.0]
    assert error.tolist() == pytest.approx([math.sqrt((9 + 1 + 16) / 2 / 3), 0.0])
    assert mean_stderr([2.0])[0] == 2.0
    assert math.isnan(mean_stderr([2.0])[1])


def test_concave_envelope_by_hand():
    grid = np.array([0.0, 0.05, 0.1, 0.2, 0.5])
    cost, gain = np.array([0.1, 0.2, 0.05, 0.3]), np.array([1.0, 1.5, 0.1, 1.2])
    # hull (0,0) (.1,1) (.2,1.5); the point (.05,.1) is below it, (.3,1.2) beyond its top
    assert concave_envelope(cost, gain, grid).tolist() == pytest.approx([0, 0.5, 1, 1.5, 1.5])
    free = concave_envelope(np.array([-0.01, 0.2]), np.array([0.4, 1.0]), grid)
    assert free.tolist() == pytest.approx([0.4, 0.55, 0.7, 1, 1])  # a cost below 0 is 0
    assert concave_envelope(np.array([0.1]), np.array([-1.0]), grid).tolist() == [0] * 5


def test_concave_envelope_is_the_best_mixture_of_two_settings():
    """Against all pairs: a share t of one and 1 − t of the other, doing nothing included."""
    rng = np.random.default_rng(0)
    cost, gain = rng.uniform(0, 1, 12), rng.uniform(0, 1, 12)
    grid = np.linspace(0.01, 1, 12)
    points = [(0.0, 0.0), *zip(cost, gain)]
    for at, height in zip(grid, concave_envelope(cost, gain, grid)):
        mixtures = [g for c, g in points if c <= at]
        mixtures += [g + (at - c) / (c2 - c) * (g2 - g) for c, g in points for c2, g2 in points
                     if c <= at < c2]
        assert height == pytest.approx(max(mixtures))


def test_frontier_area_by_hand():
    assert frontier_area(np.array([0.3]), np.array([3.0]), 0.3) == pytest.approx(1.5)
    assert frontier_area(np.array([0.15]), np.array([3.0]), 0.3) == pytest.approx(2.25, rel=1e-3)
    assert frontier_area(np.array([0.6]), np.array([3.0]), 0.3) == pytest.approx(0.75)


def test_a_rise_on_the_text_that_no_label_named_counts_as_cost():
    forget, retain = np.full((1, 4), 3.0), np.full((1, 4), 0.0)
    assert unlearning_area(forget, retain) == pytest.approx(3.0)
    assert unlearning_area(forget, retain, np.full((1, 2), 0.3)) == pytest.approx(1.5)
    assert unlearning_area(forget, np.full((1, 4), 0.3), np.zeros((1, 2))) == pytest.approx(1.5)
    assert unlearning_area(forget, retain, np.zeros((1, 0))) == pytest.approx(3.0)


def replies(*accuracies):
    """100 questions a setting, as many right ones as the accuracy says."""
    return np.arange(100) < 100 * np.array(accuracies)[:, None]


def test_official_score_by_hand():
    """1 − the least forget accuracy among settings that keep 99 %; a setting at 98 % has no say."""
    assert official_score(replies(0.2, 0.5, 0.9), replies(0.98, 0.99, 1.0)) == pytest.approx(0.5)
    assert official_score(replies(0.2, 0.5, 0.9), replies(0.5, 0.5, 0.5)) == 0.0


def test_accuracy_area_by_hand():
    """One setting that costs 2 % and forgets half: up to 2 % a triangle, then level."""
    expected = (0.02 * 0.25 + 0.03 * 0.5) / 0.05
    assert accuracy_area(replies(0.5), replies(0.98)) == pytest.approx(expected, rel=1e-3)


def test_bootstrap_covers_the_mean_and_narrows_with_more_texts():
    few, many = (np.random.default_rng(1).normal(2, 1, (1, n)) for n in (10, 1000))
    low, high = interval(resampled(lambda part: float(part.mean()), few))
    assert low < float(few.mean()) < high
    narrow = interval(resampled(lambda part: float(part.mean()), many))
    assert narrow[1] - narrow[0] < 0.3 * (high - low)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 / math.sqrt(1000), rel=0.2)


def test_bootstrap_draws_the_same_texts_for_all_settings():
    """The difference of two settings that differ by a constant has no sampling error."""
    rise = np.random.default_rng(1).normal(2, 1, (1, 50))
    both = np.concatenate([rise, rise + 3])
    draws = resampled(lambda part: float(part[1].mean() - part[0].mean()), both)
    assert draws.tolist() == pytest.approx([3.0] * len(draws))


def test_interval_is_the_middle_95_percent():
    assert interval(np.arange(1001.0)) == pytest.approx([25.0, 975.0])


RESULT = {"substrate": "standin", "budget": "full",
          "environment": {"evaluation_code": "abc", "language_model_dtype": "bfloat16"}}


def test_results_are_comparable_only_where_all_that_measures_them_is_the_same():
    assert list(differences(RESULT, RESULT)) == []
    assert comparability(RESULT) == {"substrate": "standin", "budget": "full",
                                     "evaluation_code": "abc", "language_model_dtype": "bfloat16"}
    for name in COMPARABLE:
        other = {**RESULT, "environment": dict(RESULT["environment"])}
        place = other if name in RESULT else other["environment"]
        place[name] = "another"
        assert list(differences(RESULT, other)) == [name]
        del place[name]
        assert list(differences(RESULT, other)) == [name]


@pytest.mark.parametrize("environment", [None, 7, "text", []])
def test_results_without_an_environment_are_not_comparable(environment):
    other = {**RESULT, "environment": environment}
    assert set(differences(RESULT, other)) == {"evaluation_code", "language_model_dtype"}
