"""The main comparison's unlearning, judged on contexts that chose nothing.

    python bench/fresh_contexts.py

A run chooses its clamps on one half of few contexts of each text and judges them on the other, both
ways. Here all of these contexts choose, and three times as many others of the same held-out text
judge. Only clamps that are chosen are measured.

Each row is a table line: areas in nats of all clamps, of static ones, and of these with SAEBench's
sizes, mean and 95 % interval over the study's seeds and the contexts that judge. Which contexts
choose is not drawn anew. Below it are paired differences to the rows before it. Directions without
an SAE have no seeds. SAEs, and what chose, come from the cache of the runs. Environment variables
are those of experiment.py.
"""

import dataclasses
import itertools
import math
import sys
import unittest.mock
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
from controls import COLUMNS, MAIN, Bench, line, open_substrate, row

from lab.code import CODE, Module
from lab.console import UserError, progress
from lab.evaluations import Evaluated, samples_of, yardstick
from lab.evaluations.heldout import HeldOut
from lab.evaluations.unlearning import (
    Clamp,
    FeatureSet,
    feature_sets,
    feature_statistics,
    fires,
    kinds_of,
    rises,
)
from lab.results.frontier import AREAS, COST_GRID, METRICS, area
from lab.results.statistics import mean_stderr
from lab.sparse import ExportedSAE
from lab.storage import checksum, code_digest, digest
from lab.substrates import Substrate

CODE.setdefault(__name__, Module(Path(__file__).read_text(encoding="utf-8")))  # where imported

TIMES = 3  # as many fresh contexts of each text as the study's
SEEDS = 6
DRAWS = 400


class Judged(NamedTuple):
    """Chosen settings on fresh contexts: weights by cost and setting, forget rises by setting and
    context, and those of each text that must stay."""

    weight_GS: np.ndarray
    gain_SR: np.ndarray
    kept: list[np.ndarray]

    def area(self, drawn: Sequence[np.ndarray] | None = None) -> float:
        """As `crossfitted` judges one half: along the chosen path until a cost is spent here."""
        tables = [self.gain_SR, *self.kept]
        means = [table.mean(1) if drawn is None else table[:, places].mean(1)
                 for table, places in zip(tables, drawn or itertools.repeat(None))]
        gain_G, *cost_KG = (self.weight_GS @ mean_S for mean_S in means)
        spent_G = np.maximum.accumulate(np.maximum(np.max(cost_KG, axis=0), 0.0))
        return area(np.interp(COST_GRID, [0.0, *spent_G], [0.0, *gain_G]), COST_GRID)


def with_more_contexts(substrate: Substrate) -> HeldOut:
    """The study's frontier contexts, and TIMES as many after them."""
    sizes = dataclasses.replace(
        substrate.sizes, frontier_contexts=(1 + TIMES) * substrate.sizes.frontier_contexts)
    return HeldOut(Substrate(substrate.source, sizes, substrate.cache, substrate.processes))


def judge(fresh: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Judged]:
    """By metric: what `part`, an SAE's evaluation by the study's contexts, chooses does on others,
    of which `fresh` is."""
    judged = {}
    for name in AREAS:
        metric = METRICS[name]
        chosen = dict(zip(metric.variants(part).labels, metric.policy(part).T))
        gain_SR, *kept = metric.tables(fresh)
        labels = metric.variants(fresh).labels
        weight_GS = np.stack([chosen.get(label, np.zeros(len(COST_GRID))) for label in labels], 1)
        assert np.allclose(weight_GS.sum(1), sum(chosen.values())), "a chosen setting is missing"
        judged[name] = Judged(weight_GS, gain_SR, kept)
    return judged


def on_fresh_contexts(sae: ExportedSAE, heldout: HeldOut, part: Mapping[str, Any],
                      sets: Sequence[FeatureSet]) -> dict[str, Any]:
    """As an evaluation keeps `sets`, of the fresh contexts and the settings that are chosen."""
    wanted: dict[tuple[int, int], float] = {}  # by set and multiplier: the least limit
    for name in AREAS:
        labels, used_S = METRICS[name].variants(part).labels, METRICS[name].policy(part).any(0)
        for s, m, i in (labels[k] for k in used_S.nonzero()[0]):
            limit = sets[s].limits[i]
            wanted[s, m] = min(limit, wanted.get((s, m), limit))
    kinds = {kind: np.flatnonzero(of)[part["contexts"][kind]:]
             for kind, of in kinds_of(heldout).items()}
    x, keep = heldout.of_frontier("x"), heldout.of_frontier("keep")
    measured = []
    for s, chosen in enumerate(sets):
        stored = part["sets"][s]
        share_R = fires(sae, chosen.features, x, keep).float().mean(1).numpy()
        same = all(share_R[of][: part["contexts"][kind]].tolist() == stored["share"][kind]
                   for kind, of in kinds_of(heldout).items())
        assert same, "not what the study clamped"
        assert stored["limits"] == list(chosen.limits), "not as the study clamped it"
        rise_MR = np.full((len(stored["multipliers"]), len(x)), np.nan)
        for m, multiplier in enumerate(stored["multipliers"]):
            if (s, m) in wanted:
                run_R = np.zeros(len(x), dtype=bool)
                run_R[np.concatenate(list(kinds.values()))] = True
                run_R &= share_R > wanted[s, m]
                clamp = Clamp(chosen.features, -multiplier * chosen.size_F)
                rise_MR[m, run_R] = rises(sae, heldout, clamp, torch.from_numpy(run_R))[run_R]
        measured.append({**stored,
                         "share": {kind: share_R[of].tolist() for kind, of in kinds.items()},
                         "rise": {kind: rise_MR[:, of].tolist() for kind, of in kinds.items()}})
    blank_R = (heldout["blank"] - heldout["base"]).mean(1).numpy()
    return {"contexts": {kind: len(of) for kind, of in kinds.items()}, "sets": measured,
            "reference_rise": blank_R[kinds["forget"]].tolist()}


Rows = dict[int, dict[str, Judged]]  # by seed and metric


class FreshContexts:
    """The fresh contexts of a substrate, and what chosen settings do on them."""

    def __init__(self, bench: Bench):
        self.bench, self.heldout = bench, with_more_contexts(bench.substrate)
        self.samples = list(samples_of(bench.substrate, bench.sample).values())

    def kept(self, sae: ExportedSAE, part: Mapping[str, Any],
             sets: Sequence[FeatureSet]) -> dict[str, Judged]:
        """As `judge`, measured once."""
        causes = (checksum(sae.tensors(), ""), digest(part), self.heldout.causes,
                  code_digest(on_fresh_contexts, ExportedSAE, Substrate))
        fresh = self.bench.substrate.cached("fresh-contexts", lambda: (
            {}, on_fresh_contexts(sae, self.heldout, part, sets)), *causes)[1]
        return judge(fresh, part)

    def of_saes(self, saes: Mapping[int, ExportedSAE], evaluated: Evaluated) -> Rows:
        return {seed: self.kept(sae, evaluated.by_seed[seed]["unlearning"], feature_sets(
            sae, self.heldout, feature_statistics(sae, self.samples)))
            for seed, sae in progress(list(saes.items()), "SAEs")}

    def of_directions(self, evaluated: Evaluated) -> dict[str, Rows]:
        """The supervised yardstick's; the same for every seed."""
        with unittest.mock.patch.object(yardstick, "clamp_and_ask",
                                        lambda sae, _, sets: (sae, sets)):
            found = yardstick.evaluate_directions(self.heldout, self.samples)
        return {name: dict.fromkeys(range(SEEDS), self.kept(sae, evaluated.yardstick[name], sets))
                for name, (sae, sets) in found.items()}


def interval(ours: Rows, theirs: Rows | None, name: str) -> tuple[float, float, float]:
    """Mean of a metric, or of its paired difference, with the ends of its 95 % interval:
    (t·σ_s)² + (1.96·σ_t)², the errors of seeds and of judging texts, which all SAEs share."""
    sides = [side for side in (ours, theirs) if side]
    seeds = sorted(set.intersection(*map(set, sides)))
    sizes = [table.shape[1] for table in (
        sides[0][seeds[0]][name].gain_SR, *sides[0][seeds[0]][name].kept)]

    def values(drawn: Sequence[np.ndarray] | None = None) -> np.ndarray:
        areas = [[side[seed][name].area(drawn) for seed in seeds] for side in sides]
        return np.array(areas[0]) - (areas[1] if theirs else 0.0)

    rng = np.random.default_rng(0)
    drawn = [values([rng.choice(n, n) for n in sizes]).mean() for _ in range(DRAWS)]
    mean, stderr = mean_stderr(values())
    t = scipy.stats.t.ppf(0.975, len(seeds) - 1) if len(seeds) > 1 else math.nan
    half = math.hypot(t * stderr, 1.96 * np.std(drawn, ddof=1))
    return float(mean), float(mean - half), float(mean + half)


def show(name: str, rows: Rows, before: Mapping[str, Rows]) -> None:
    line(name, ("{:.2f} ({:.2f} to {:.2f})".format(*interval(rows, None, key)) for key in AREAS))
    for other, theirs in before.items():
        line(f"minus {other}", ("{:+.2f} ({:+.2f} to {:+.2f})".format(*interval(rows, theirs, key))
                                for key in AREAS))


def main() -> None:
    bench = Bench(open_substrate())
    fresh, done = FreshContexts(bench), {}
    line("row", (COLUMNS[key] for key in AREAS))
    line("---", itertools.repeat("---", len(AREAS)))
    for name, run in MAIN.items():
        saes = bench.saes(row(run, n_seeds=SEEDS))
        evaluated = bench.evaluated(saes)
        rows = fresh.of_saes(saes, evaluated)
        show(name, rows, done)
        done[name] = rows
    for name, rows in fresh.of_directions(evaluated).items():
        show(name, rows, {"adaptive": done["adaptive"]})


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
