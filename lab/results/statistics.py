"""Statistics of results, in numpy alone: means and errors, hulls, comparable runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

FRONTIER_END = 0.3  # nats of cost up to which a frontier's area is taken


def mean_stderr(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error (std/√n, n − 1 in the variance) over the first axis.

    One value has no standard error: NaN.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    mean = values.mean(0)
    return mean, values.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, np.nan)


def upper_hull(points: Iterable[tuple]) -> list[tuple]:
    """Those of points (cost, gain, …) on their upper concave hull, up to its highest one."""
    hull: list[tuple] = []
    for point in sorted(points):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0]) <= (
            point[1] - hull[-2][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        if hull and hull[-1][0] == point[0]:
            hull.pop()
        if not hull or point[1] > hull[-1][1]:
            hull.append(point)
    return hull


COMPARABLE = ("substrate", "budget", "evaluation_code", "language_model_dtype")


def comparability(info: Mapping[str, Any]) -> dict[str, Any]:
    """What two results must agree in before one is subtracted from the other."""
    environment = info.get("environment")
    environment = environment if isinstance(environment, Mapping) else {}
    return {key: info.get(key, environment.get(key)) for key in COMPARABLE}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Sequence[str]:
    """Which of COMPARABLE two results differ in; none means that they may be compared."""
    ours, theirs = comparability(one), comparability(other)
    return [key for key in COMPARABLE if ours[key] != theirs[key]]
