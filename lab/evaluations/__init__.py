"""Evaluations: plain numbers, each saying what it measures, which way is better, its source."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lab.console import Clock
from lab.evaluations.conditioning import evaluate_conditioning
from lab.evaluations.heldout import HeldOut
from lab.evaluations.probing import evaluate_sparse_probing, pooled_for, probe_sets
from lab.evaluations.reconstruction import evaluate_reconstruction
from lab.evaluations.separation import evaluate_separation
from lab.evaluations.unlearning import evaluate_unlearning, feature_statistics
from lab.evaluations.yardstick import evaluate_directions
from lab.sparse import ExportedSAE
from lab.storage import checksum, code_digest, digest
from lab.substrates import Substrate


class Evaluated(NamedTuple):
    """What was measured: by seed and evaluation, and of directions without an SAE."""

    by_seed: dict[int, dict[str, dict[str, Any]]]
    yardstick: dict[str, dict[str, Any]]


class Evaluation(NamedTuple):
    """What an evaluation is given beside the SAE of a seed, and what that depends on."""

    arguments: Callable[[int], tuple]
    causes: tuple


def evaluate(saes: Mapping[int, ExportedSAE], substrate: Substrate,
             learn_sample: Callable[[int], Tensor], clock: Clock) -> Evaluated | None:
    """All evaluations of every seed's SAE, to the first of several processes.

    `learn_sample(domain)` gives raw residuals [N, D] of a domain of learn text, from which features
    are chosen. Each evaluation is kept in the cache as soon as it is done, under a key of the
    weights, of what it is measured on and of its own code.
    """
    heldout, processes = HeldOut(substrate), substrate.processes
    evaluations = evaluations_of(saes, heldout, learn_sample)
    names = {one: one.__name__.removeprefix("evaluate_") for one in evaluations}
    weights = {seed: checksum(sae.tensors(), "") for seed, sae in saes.items()}

    def result(one: Callable, seed: int) -> dict[str, Any]:
        causes = (weights[seed], seed, code_digest(one, ExportedSAE, Substrate),
                  *evaluations[one].causes)
        return substrate.cached(
            f"results/{names[one]}-{seed}",
            lambda: ({}, one(saes[seed], *evaluations[one].arguments(seed))), *causes)[1]

    jobs = [(one, seed) for seed in saes for one in evaluations]
    done = {}
    for one, seed in jobs[processes.rank :: processes.size]:
        with clock.phase(names[one], f"seed {seed}"):
            done[one, seed] = result(one, seed)
    processes.wait()
    if processes.rank:
        return None
    with clock.phase("yardstick"):
        yardstick = directions(heldout, learn_sample)
    return Evaluated({seed: {names[one]: done.get((one, seed)) or result(one, seed)
                             for one in evaluations} for seed in saes}, yardstick)


def directions(heldout: HeldOut, learn_sample: Callable[[int], Tensor]) -> dict[str, Any]:
    """The supervised yardstick, computed once a substrate."""
    substrate, samples = heldout.substrate, samples_of(heldout.substrate, learn_sample)
    causes = (heldout.causes, checksum(samples, ""),
              substrate.sizes.least_questions,
              code_digest(evaluate_directions, ExportedSAE, HeldOut, Substrate))
    return substrate.cached("yardstick", lambda: ({}, evaluate_directions(
        heldout, list(samples.values()))), *causes)[1]


def samples_of(substrate: Substrate, learn_sample: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """Raw residuals [N, D] of learn text by its domains."""
    return {name: learn_sample(k) for k, name in enumerate(substrate.learn_domains)}


def evaluations_of(saes: Mapping[int, ExportedSAE], heldout: HeldOut,
                   learn_sample: Callable[[int], Tensor]) -> dict[Callable, Evaluation]:
    """The evaluations in the order in which they are done."""
    substrate, sizes = heldout.substrate, heldout.substrate.sizes
    samples = samples_of(substrate, learn_sample)
    statistics = functools.cache(lambda seed: feature_statistics(
        saes[seed], list(samples.values())))
    chosen_on = checksum(samples, ""), code_digest(feature_statistics)
    probed = functools.lru_cache(1)(
        lambda seed: [pooled_for(saes[seed], texts) for texts in probe_sets(substrate)])
    probed_on = (sizes, substrate.sink_norm, digest(substrate.corpus["probes"]),
                 code_digest(probe_sets, pooled_for))
    return {
        evaluate_reconstruction: Evaluation(lambda seed: (heldout, statistics(seed).use_KF),
                                            (heldout.causes, chosen_on)),
        evaluate_conditioning: Evaluation(lambda _: (heldout,), (heldout.causes,)),
        evaluate_sparse_probing: Evaluation(lambda seed: (substrate, probed(seed)), probed_on),
        evaluate_separation: Evaluation(lambda seed: (substrate, probed(seed)), probed_on),
        evaluate_unlearning: Evaluation(lambda seed: (heldout, statistics(seed), seed),
                                        (heldout.causes, chosen_on, sizes.least_questions)),
    }
