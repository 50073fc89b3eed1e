"""Statistics of results, in numpy alone: means and errors, hulls and areas, comparable runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

FRONTIER_END = 0.3  # nats of cost up to which a frontier's area is taken
RETAINED = 0.95  # retain accuracy below which a setting costs too much to be asked about


def mean_stderr(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error (std/√n, n − 1 in the variance) over the first axis.

    One value has no standard error: NaN.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    mean = values.mean(0)
    return mean, values.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, np.nan)


def concave_envelope(cost: np.ndarray, gain: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Largest gain at each cost of `grid`, on the upper concave hull of the settings and (0, 0).

    A point on the hull between two settings is reached by using one or the other at random. Costs
    below zero count as zero. Beyond its best point the envelope is flat.
    """
    points = sorted({(0.0, 0.0), *zip(np.maximum(cost, 0.0).tolist(), np.asarray(gain).tolist())})
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0]) <= (
            point[1] - hull[-2][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        if hull and hull[-1][0] == point[0]:
            hull.pop()
        if not hull or point[1] > hull[-1][1]:
            hull.append(point)
    return np.interp(grid, *(np.array(axis) for axis in zip(*hull)))


def frontier_area(cost: np.ndarray, gain: np.ndarray, end: float) -> float:
    """Mean over costs from 0 to `end` of the largest gain on the concave envelope."""
    grid = np.linspace(0, end, 301)
    return float(np.trapezoid(concave_envelope(cost, gain, grid), grid) / end)


def unlearning_area(forget_SR: np.ndarray, *kept_SR: np.ndarray) -> float:
    """Area in nats under the frontier of forget rises, from rises by setting and context.

    A setting's cost is its largest mean rise over the texts that are to be kept (`kept_SR`).
    """
    cost = np.max([part.mean(1) for part in kept_SR if part.shape[1]], axis=0)
    return frontier_area(cost, forget_SR.mean(1), FRONTIER_END)


def official_score(forget_SQ: np.ndarray, retain_SQ: np.ndarray) -> float:
    """1 − the least forget accuracy among settings with retain accuracy ≥ 0.99; 0 if none."""
    allowed = forget_SQ.mean(1)[retain_SQ.mean(1) >= 0.99]
    return float(1 - allowed.min()) if len(allowed) else 0.0


def accuracy_area(forget_SQ: np.ndarray, retain_SQ: np.ndarray) -> float:
    """Area under the frontier of forget accuracy lost against retain accuracy lost."""
    lost = 1 - retain_SQ.mean(1)
    return frontier_area(lost, 1 - forget_SQ.mean(1), 1 - RETAINED)


def resampled(statistic: Callable[..., float], *samples: np.ndarray,
              repeats: int = 200) -> np.ndarray:
    """`statistic` of samples whose columns (texts, questions) are drawn anew, `repeats` times."""
    rng = np.random.default_rng(0)
    return np.array([
        statistic(*(part[..., rng.integers(0, part.shape[-1], part.shape[-1])] for part in samples))
        for _ in range(repeats)])


def interval(draws: np.ndarray) -> list[float]:
    """The middle 95 % of draws."""
    return [float(end) for end in np.quantile(draws, (0.025, 0.975))]


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
