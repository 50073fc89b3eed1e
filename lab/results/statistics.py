"""Statistics of results, in numpy alone: means and errors, hulls, areas."""

import math

import numpy as np


def concave_envelope(cost: np.ndarray, gain: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Largest gain at each cost of `grid`, on the upper concave hull of the settings and (0, 0).

    A point on the hull between two settings is reached by using one or the other at random. Costs
    below zero count as zero.
    """
    points = sorted({(0.0, 0.0), *zip(np.maximum(cost, 0.0).tolist(), gain.tolist())})
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


def mean_and_stderr(rows: list[dict[str, float | None]]) -> tuple[dict, dict]:
    """Mean and standard error (std / √n, n − 1 in the variance) over seeds, by metric.

    A metric that is missing for a seed has neither; one seed has no standard error.
    """
    means: dict[str, float | None] = {}
    stderrs: dict[str, float | None] = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        usable = all(value is not None and math.isfinite(value) for value in values)
        means[name] = float(np.mean(values)) if usable else None
        spread = usable and len(values) > 1
        stderrs[name] = float(np.std(values, ddof=1) / math.sqrt(len(values))) if spread else None
    return means, stderrs
