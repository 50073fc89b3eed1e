"""Controls on the real substrate: what the study's numbers are worth.

    python bench/controls.py

Each row is a table line: means ± standard errors, and below it paired differences with 95 %
intervals to the vanilla SAEs of the same seeds, as in final_info.json.

1. Rows of the study on six fresh seeds, and one direction found by the labels, without an SAE.
2. The same on other text: the next contexts of each kind; the Python reference as the third text.
3. Changed training, on the runs' own seeds: the use term alone; labels without meaning; the first
   proposal at three strengths; SAEs that were never trained.
4. Features that may be clamped only if they are rare on the third text too (its learn half).
5. Broader labels: retain text that includes as much third text, or two glossaries of computing.

Everything is kept in the cache. What a run or an interrupted call has left there is read.
Environment variables are those of experiment.py.
"""

import copy
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from experiment import (
    ActivationBuffer,
    CustomSAEConfig,
    new_trainer,
    residual_shard,
    resolve_config,
    train_sae,
    training_key,
)
from lab.code import CODE, Module
from lab.console import Clock, UserError, progress
from lab.distributed import Interrupts, Processes, keep_freed_memory
from lab.evaluations import Results, evaluate
from lab.evaluations.heldout import HeldOut
from lab.evaluations.unlearning import (
    MULTIPLIERS,
    THRESHOLDS,
    Clamp,
    Effect,
    answers,
    evaluate_unlearning,
    feature_statistics,
    rises,
    summarize_unlearning,
)
from lab.results.final_info import Info, compare, flat_metrics, means_and_stderrs
from lab.results.notes import headline
from lab.sparse import ExportedSAE
from lab.storage import Cache, checksum, code_digest, randomness
from lab.substrates import Contexts, Substrate, choose_source, quiet_libraries
from lab.substrates.standin import Standin
from lab.substrates.texts import DOMAINS, FORGET, RETAIN, SIZES, shuffled

CODE.setdefault(__name__, Module(Path(__file__).read_text(encoding="utf-8")))  # where imported

FIRST_SEED = 100  # of fresh ones
FAINT = 1e-6  # an α that leaves directions alone
FURTHER = 24  # contexts of each kind of other text
FRESH = {"run_8": "vanilla (run_8)", "run_4": "regroup 100 (run_4)", "run_9": "OrtSAE (run_9)",
         "run_7": "fixed (run_7)", "run_3": "α 0.01 (run_3)"}
PAIR = ("run_8", "run_4")  # the rows that are measured in further ways
FOUR = ("run_8", "run_4", "run_9", "run_7")
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "vanilla (run_8)": ("run_8", {}),
    "use term alone (run_4)": ("run_4", {
        "alpha": FAINT, "eta": CustomSAEConfig.alpha * CustomSAEConfig.eta / FAINT}),
    **{f"first proposal, α {alpha}": ("run_7", {"orthogonality": "gram_encoder", "alpha": alpha})
       for alpha in (0.01, 0.05, 0.25)},
}
COLUMNS = {
    "explained_variance": "explained variance", "kappa_median": "κ median",
    "kappa_p90": "κ p90", "l_use": "L_use", "duplicates": "duplicates",
    "unlearning_area": "area", "unlearning_area_labelled": "area, retain text alone",
    "accuracy_area": "accuracy area", "unlearning_score": "score",
    "tpp_threshold_20_total_metric": "TPP, 20",
    "sae_top_1_test_accuracy": "probe, 1", "sae_top_5_test_accuracy": "probe, 5",
    "sae_test_accuracy": "probe, all",
}
AREAS = {"unlearning_area": "area", "unlearning_area_labelled": "area_labelled",
         "accuracy_area": "accuracy_area", "unlearning_score": "score"}
Find = Callable[[Tensor, Tensor], Tensor]


class Mislabelled(ActivationBuffer):
    """Every stretch of text has the domain of another: labels as many and as steady as the true
    ones, without meaning. Samples, from which features are chosen, keep the true ones."""

    STRETCH = 128  # tokens

    def batch(self, seed: int, step: int, size: int,
              share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        z_BD, _ = super().batch(seed, step, size, share)
        index = self.order[1][step % (len(self) // size) * size :][:size][share]
        domains = self.domain_N[:: self.STRETCH]
        moved = torch.randperm(len(domains), generator=randomness("mislabelled", seed))
        return z_BD, domains[moved[index // self.STRETCH]].long()


class Glossaries(Standin):
    """Two glossaries of computing, from the package index like the stand-in substrate."""

    requirements = Path(__file__).parent / "requirements-glossaries.txt"

    def texts(self) -> list[str]:
        """Term and definition, of the Jargon File and of the Common Weakness Enumeration."""
        (slang,) = self.read("jargon-file", r"jargon\.json$").values()
        texts = [(entry["term"], " ".join(sense["definition"] for sense in entry["senses"]))
                 for entry in json.loads(slang)]
        (weaknesses,) = self.read("cwe2", r"cwec_v[\d.]+\.xml$").values()
        for entry in ElementTree.fromstring(weaknesses).iterfind(".//{*}Weakness"):
            parts = [*entry.iterfind("{*}Description"), *entry.iterfind("{*}Extended_Description")]
            texts.append((entry.get("Name"), " ".join(" ".join(part.itertext()) for part in parts)))
        colour = r"\x1b\[\d+m"
        return [" ".join(re.sub(colour, "", f"{term}: {definition}").split())
                for term, definition in texts]


def variant(substrate: Substrate, **changes: Any) -> Substrate:
    """The substrate with some of its parts changed, and what follows from these; the language
    model and its attention sinks as before."""
    other = copy.copy(substrate)
    for part in ("learn", "ask"):
        vars(other).pop(part, None)
    vars(other).update(lm=substrate.lm, sink_norm=substrate.sink_norm, **changes)
    return other


def row(run: str, **changes: Any) -> CustomSAEConfig:
    """A row of the study at the budget that SAE_BUDGET names."""
    budget = os.environ.get("SAE_BUDGET") or "full"
    return dataclasses.replace(resolve_config(run, budget, Path()), **changes)


def open_substrate() -> Substrate:
    """The substrate that a run with these environment variables has."""
    quiet_libraries()
    keep_freed_memory()
    row("run_8")  # refuses an unknown budget
    cache = Cache(Path(os.environ.get("SAE_CACHE_DIR") or ".cache"))
    source = choose_source(os.environ.get("SAE_SUBSTRATE") or "auto", cache)
    source.fetch()
    return Substrate(source, SIZES[os.environ.get("SAE_BUDGET") or "full"], cache, Processes())


class Bench:
    """A substrate with its activations, and what SAEs trained on them measure."""

    def __init__(self, substrate: Substrate):
        self.substrate, self.heldout = substrate, HeldOut(substrate)
        self.buffer = ActivationBuffer.read(substrate)

    def sample(self, domain: int) -> Tensor:
        return self.buffer.sample(domain, self.substrate.sizes.frequency_tokens)

    def mislabelled(self) -> "Bench":
        bench = copy.copy(self)
        bench.buffer = Mislabelled.read(self.substrate)
        return bench

    def broad(self, more: Sequence[str]) -> "Bench":
        """With up to as much of `more` in the retain text, in training and in the choice of
        features. What is measured, and on what, stays."""
        bench, learn = copy.copy(self), self.substrate.corpus["learn"]
        more = shuffled(list(more), "third")  # a dictionary is in order
        ends = np.cumsum([len(text) for text in more])
        more = more[: int(np.searchsorted(ends, sum(map(len, learn["retain"]))))]
        learn = {**learn, "retain": [*learn["retain"], *more]}
        bench.substrate = variant(self.substrate, corpus={**self.substrate.corpus, "learn": learn})
        bench.buffer = ActivationBuffer.read(bench.substrate)
        return bench

    def saes(self, config: CustomSAEConfig) -> dict[int, ExportedSAE]:
        """As a run of this row trains them, by seed."""
        substrate, kind = self.substrate, type(self.buffer)
        own = () if kind is ActivationBuffer else (code_digest(kind),)
        name = f"{substrate.name}/trained/{training_key(config, substrate, self.buffer)}"
        return {seed: train_sae(config, self.buffer, seed, substrate.cache.path(name, seed, *own),
                                Interrupts(), None, substrate.processes
                                ).sae.exported(self.buffer.scale) for seed in config.seeds}

    def untrained(self, config: CustomSAEConfig) -> dict[int, ExportedSAE]:
        return {seed: new_trainer(config, self.buffer, seed, self.substrate.processes
                                  ).sae.exported(self.buffer.scale) for seed in config.seeds}

    def evaluated(self, saes: dict[int, ExportedSAE]) -> Results:
        return evaluate(saes, self.substrate, self.sample, Clock())

    def fresh(self, run: str, heldout: HeldOut | None = None,
              third_ND: Tensor | None = None) -> Results:
        """A row's evaluations on fresh seeds. Unlearning is measured on `heldout` if given, by
        features that are rare on `third_ND` too if given."""
        seeds = dict(first_seed=FIRST_SEED, n_seeds=2 * row(run).n_seeds)
        saes = self.saes(row(run, **seeds))
        results = self.evaluated(saes)
        if heldout is None and third_ND is None:
            return results
        samples = [self.sample(FORGET), self.sample(RETAIN)]
        samples += [] if third_ND is None else [third_ND]
        return {seed: {**results[seed], "unlearning": self.kept(
            f"unlearning-{seed}", unlearned, sae, heldout or self.heldout, samples, seed)}
            for seed, sae in saes.items()}

    def direction(self, find: Find, heldout: HeldOut | None = None) -> Info:
        """Unlearning by one direction, which `find` gives from forget and retain tokens [N, D]."""
        samples = [self.sample(FORGET), self.sample(RETAIN)]
        sae = labelled_features(*samples, find(*samples))
        return self.kept(find.__name__, unlearned_by_labels, sae, heldout or self.heldout, samples)

    def kept(self, name: str, measure: Callable[..., Info], sae: ExportedSAE, heldout: HeldOut,
             samples: Sequence[Tensor], *more: Any) -> Info:
        """`measure(sae, heldout, samples, *more)`, from the cache if it is there."""
        contents = {f"sample_{i}": sample for i, sample in enumerate(samples)} | sae.tensors()
        causes = (heldout.causes, heldout.substrate.sizes.least_questions,
                  checksum(contents, ""), more,
                  code_digest(measure, ExportedSAE, HeldOut, Substrate))
        return self.substrate.cached(
            f"controls/{name}", lambda: ({}, measure(sae, heldout, samples, *more)), *causes)[1]


def unlearned(sae: ExportedSAE, heldout: HeldOut, samples: Sequence[Tensor], seed: int) -> Info:
    """Unlearning by features that are rare on all samples but the first."""
    statistics = feature_statistics(sae, samples)
    forget_F, *others = statistics.rate_KF
    rate_KF = torch.stack([forget_F, torch.stack(others).amax(0)])
    return evaluate_unlearning(sae, heldout, statistics._replace(rate_KF=rate_KF), seed)


def unlearned_by_labels(sae: ExportedSAE, heldout: HeldOut, samples: Sequence[Tensor]) -> Info:
    """Unlearning by a feature for each of THRESHOLDS, clamped and measured as others are."""
    size_F = feature_statistics(sae, samples).size_F
    settings, effects = [], []
    for feature, multiplier in progress(itertools.product(range(sae.d_sae), MULTIPLIERS),
                                        "direction"):
        clamp = Clamp(torch.tensor([feature]), -multiplier * size_F[[feature]])
        effects.append(Effect(rises(sae, heldout, clamp), *answers(sae, heldout, clamp)))
        settings.append(dict(threshold=THRESHOLDS[feature], n_features=1, n_selected=1,
                             multiplier=multiplier))
    return summarize_unlearning(settings, effects, heldout)


def mean_difference(forget_ND: Tensor, retain_ND: Tensor) -> Tensor:
    return forget_ND.mean(0) - retain_ND.mean(0)


def logistic_regression(forget_ND: Tensor, retain_ND: Tensor) -> Tensor:
    labels = np.repeat([True, False], [len(forget_ND), len(retain_ND)])
    tokens_ND = torch.cat([forget_ND, retain_ND])
    tokens_ND /= tokens_ND.square().sum(1).mean().sqrt()  # its penalty depends on the scale
    fitted = LogisticRegression(max_iter=1000).fit(tokens_ND.numpy(), labels)
    return torch.from_numpy(fitted.coef_[0]).float()


def labelled_features(forget_ND: Tensor, retain_ND: Tensor, direction_D: Tensor) -> ExportedSAE:
    """An SAE of one feature for each of THRESHOLDS, the part of retain tokens that it fires on.

    All read along `direction_D`. Each writes along what the forget tokens on which it fires have
    more than retain text, in units in which its mean activation there is how much that is.
    """
    middle_D = retain_ND.mean(0)
    forget_N, retain_N = ((part - middle_D) @ direction_D for part in (forget_ND, retain_ND))
    reads, biases, writes = [], [], []
    for threshold in THRESHOLDS:
        cut = retain_N.quantile(1 - threshold)
        more_D = forget_ND[forget_N > cut].mean(0) - middle_D
        gain = more_D.norm() / (forget_N[forget_N > cut] - cut).mean()
        reads.append(gain * direction_D)
        biases.append(-gain * cut)
        writes.append(more_D / more_D.norm())
    return ExportedSAE(torch.stack(reads, 1), torch.stack(biases), torch.stack(writes), middle_D)


def other_text(substrate: Substrate) -> tuple[HeldOut, HeldOut]:
    """Held-out text, without questions: the next FURTHER contexts of each kind, and as many with
    the reference of the Python language, as this Python carries it, for the third kind."""
    known, ask = substrate.sizes.frontier_contexts, substrate.ask
    sizes = dataclasses.replace(substrate.sizes, heldout_contexts=FURTHER,
                                frontier_contexts=FURTHER, question_candidates=0)
    further = torch.cat([(ask.domain_N == k).nonzero()[known : known + FURTHER, 0]
                         for k in range(len(DOMAINS))])
    texts = {**substrate.corpus["ask"], "other": list(topics.values())}
    changes = (dict(ask=Contexts(ask.tokens_NT[further], ask.domain_N[further])),
               dict(corpus={**substrate.corpus, "ask": texts}))
    return tuple(HeldOut(variant(substrate, sizes=sizes, **change)) for change in changes)


def third_text(substrate: Substrate) -> Tensor:
    """Residuals [N, D] of `frequency_tokens` of the third text's learn half, no sinks."""
    most = substrate.sizes.frequency_tokens // substrate.sizes.context_length
    return residual_shard(substrate, *substrate.contexts("learn", (0, 0, most)))["acts"].float()


# What is printed


def as_info(results: Results) -> Info:
    """What `compare` reads of a final_info.json."""
    return {"seeds": [{"seed": seed, **flat_metrics(parts)} for seed, parts in results.items()],
            "unlearning": {"per_seed": [parts["unlearning"] for parts in results.values()]}}


def line(name: str, cells: Iterable[str]) -> None:
    print("|", " | ".join((name, *cells)), "|", flush=True)


def table(rows: Iterable[tuple[str, Results]]) -> None:
    """Each row's means, and its paired differences to the first one."""
    first = None
    for name, results in rows:
        info = as_info(results)
        numbers = dict(zip(("means", "stderrs"), means_and_stderrs(info["seeds"])))
        line(f"{name} ({len(results)})", (
            headline(numbers, key, "", 3).strip() for key in COLUMNS))
        if first:
            gaps("minus vanilla", compare(info, first))
        first = first or info


def gaps(name: str, differences: Info) -> None:
    line(name, ("{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**differences[key])
                if differences.get(key, {}).get("low") is not None else "-" for key in COLUMNS))


def fresh(bench: Bench, runs: Iterable[str], how: str, *measured: Any) -> None:
    table((FRESH[run] + how, bench.fresh(run, *measured)) for run in runs)


def without_sae(bench: Bench, how: str, heldout: HeldOut | None = None) -> None:
    """What a direction does: the number and its 95 % interval by texts or questions, and how it
    differs from the adaptive SAEs."""
    for find in (mean_difference, logistic_regression):
        direction = bench.direction(find, heldout)
        line(f"no SAE, {find.__name__.replace('_', ' ')}{how}", (
            "{:.3f} ({:.3f} to {:.3f})".format(direction[AREAS[key]],
                                               *direction[f"{AREAS[key]}_interval"])
            if direction.get(AREAS.get(key)) is not None else "-" for key in COLUMNS))
        adaptive = as_info(bench.fresh(PAIR[1], heldout))
        seeds = [{"seed": row["seed"], **{key: direction[name] for key, name in AREAS.items()}}
                 for row in adaptive["seeds"]]
        same = {"seeds": seeds, "unlearning": {"per_seed": [direction] * len(seeds)}}
        gaps(f"minus {PAIR[1]}", compare(same, adaptive))


def main() -> None:
    bench = Bench(open_substrate())
    line("row (seeds)", COLUMNS.values())
    line("---", itertools.repeat("---", len(COLUMNS)))
    fresh(bench, FRESH, "")
    without_sae(bench, "")
    further, reference = other_text(bench.substrate)
    fresh(bench, PAIR, ", further text", further)
    fresh(bench, PAIR, ", fourth text", reference)
    without_sae(bench, ", fourth text", reference)
    table(changed(bench))
    if not (third := bench.substrate.corpus["learn"]["other"]):
        return  # this substrate's third text has no learn half
    fresh(bench, PAIR, ", informed choice", None, third_text(bench.substrate))
    for more, how, heldout, text in (
            (third, ", broad labels", reference, ", fourth text"),
            (Glossaries(bench.substrate.cache).texts(), ", glossaries", further, ", further text")):
        broad = bench.broad(more)
        fresh(broad, FOUR, how)
        without_sae(broad, how)
        fresh(broad, PAIR, how + text, heldout)
        without_sae(broad, how + text, heldout)


def changed(bench: Bench) -> Iterable[tuple[str, Results]]:
    for name, (run, changes) in CHANGED.items():
        yield name, bench.evaluated(bench.saes(row(run, **changes)))
    mislabelled = bench.mislabelled()
    yield "labels without meaning (run_4)", bench.evaluated(mislabelled.saes(row("run_4")))
    yield "not trained", bench.evaluated(bench.untrained(row("run_8")))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
