"""Means, errors and hulls by hand; which results may be compared."""

import math

import numpy as np
import pytest

from lab.results.statistics import (
    COMPARABLE,
    comparability,
    concave_envelope,
    differences,
    mean_stderr,
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
