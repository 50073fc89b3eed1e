"""Evaluations: plain numbers, each saying what it measures, which way is better, its source."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lab.console import Clock
from lab.evaluations.conditioning import evaluate_conditioning
from lab.evaluations.heldout import HeldOut
from lab.evaluations.probing import evaluate_sparse_probing, probe_sets
from lab.evaluations.reconstruction import evaluate_reconstruction
from lab.evaluations.unlearning import evaluate_unlearning, feature_statistics
from lab.sparse import ExportedSAE
from lab.storage import checksum, code_digest, digest
from lab.substrates import Substrate

Results = dict[int, dict[str, dict[str, Any]]]  # by seed and evaluation


def evaluate(saes: Mapping[int, ExportedSAE], substrate: Substrate,
             learn_sample: Callable[[int], Tensor], clock: Clock) -> Results:
    """All evaluations of every seed's SAE; to the first of several processes.

    `learn_sample(domain)` gives raw residuals [N, D] of learn text, from which features are
    chosen. Each evaluation is kept in the cache as soon as it is done, under a key of the weights,
    of what it is measured on and of its own code.
    """
    heldout, processes = HeldOut(substrate), substrate.processes
    sets = functools.cache(lambda: probe_sets(substrate))
    samples = functools.cache(lambda: [learn_sample(domain) for domain in (0, 1)])
    statistics = functools.cache(lambda seed: feature_statistics(saes[seed], samples()))
    evaluations = {
        evaluate_reconstruction: lambda seed: (heldout, statistics(seed).use_KF),
        evaluate_conditioning: lambda seed: (heldout,),
        evaluate_sparse_probing: lambda seed: (substrate, sets()),
        evaluate_unlearning: lambda seed: (heldout, statistics(seed), seed),
    }
    names = {one: one.__name__.removeprefix("evaluate_") for one in evaluations}
    weights = {seed: checksum(sae.tensors(), "") for seed, sae in saes.items()}
    text = digest(heldout.causes, substrate.sizes, substrate.learn.checksum(),
                  substrate.corpus["probes"])

    def result(one: Callable, seed: int) -> dict[str, Any]:
        causes = weights[seed], text, seed, code_digest(one, feature_statistics, ExportedSAE)
        return substrate.cached(f"results/{names[one]}-{seed}",
                                lambda: ({}, one(saes[seed], *evaluations[one](seed))), *causes)[1]

    jobs = [(one, seed) for one in evaluations for seed in saes]
    done = {}
    for one, seed in jobs[processes.rank :: processes.size]:
        with clock.phase(names[one], f"seed {seed}"):
            done[one, seed] = result(one, seed)
    processes.wait()
    return {seed: {names[one]: done.get((one, seed)) or result(one, seed) for one in evaluations}
            for seed in saes if not processes.rank}
