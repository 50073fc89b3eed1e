"""Means, errors and hulls by hand; which results may be compared."""

import math

import pytest

from lab.results.statistics import (
    COMPARABLE,
    comparability,
    differences,
    mean_stderr,
    upper_hull,
)


def test_mean_and_standard_error_by_hand():
    """std/√n with n − 1 in the variance; of one value there is none."""
    mean, error = mean_stderr([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    assert mean.tolist() == [4.0, 5.0]
    assert error.tolist() == pytest.approx([math.sqrt((9 + 1 + 16) / 2 / 3), 0.0])
    assert mean_stderr([2.0])[0] == 2.0
    assert math.isnan(mean_stderr([2.0])[1])


def test_the_upper_hull_by_hand():
    """Up to its highest point; a point below a line of others, or dearer for less, is not on it."""
    points = [(0.1, 1.0), (0.2, 1.5), (0.05, 0.1), (0.3, 1.2), (0.0, 0.0)]
    assert upper_hull(points) == [(0.0, 0.0), (0.1, 1.0), (0.2, 1.5)]
    assert upper_hull([(0.0, 0.4, "a"), (0.0, 0.6, "b"), (0.2, 1.0, "c")]) == [
        (0.0, 0.6, "b"), (0.2, 1.0, "c")]
    assert upper_hull([(0.0, 0.0), (0.1, -1.0)]) == [(0.0, 0.0)]


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
