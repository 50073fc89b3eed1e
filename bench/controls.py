"""Controls on the real substrate: what the study's numbers are worth.

    python bench/controls.py                 # all tables
    python bench/controls.py changed longer  # some of them

Each row is a table line: means ± standard errors, and below it paired differences with 95 %
intervals to the table's first row, of the same seeds, as in final_info.json.

fresh: the rows of the main comparison on run_10's seeds, on which nothing was chosen.
changed: changed training: the losses at other strengths; an extra L1 on the lesser side; nothing
shared; the use term alone; L_dir with other parts of all pairs; the first proposal; random
partners; labels without meaning; no training.
batch_topk: the rows of the main comparison with BatchTopK in place of ReLU and L1.
longer: five times the steps.
left_out: each kind of retain text neither trained on nor labelled, but measured as unnamed text.

Three seeds a row, the first of the study unless told. Everything is kept in the cache. What a run
or an interrupted call has left there is read. Environment variables are those of experiment.py.
"""

import contextlib
import copy
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import experiment
from experiment import (
    ActivationBuffer,
    CustomSAEConfig,
    Partners,
    new_trainer,
    resolve_config,
    train_sae,
    training_key,
)
from lab.code import CODE, Module
from lab.console import Clock, UserError
from lab.distributed import Interrupts, Processes, keep_freed_memory
from lab.evaluations import Evaluated, evaluate
from lab.pairs import Firing
from lab.results.final_info import Info, compare, flat_metrics, means_and_stderrs
from lab.results.notes import headline
from lab.sparse import ExportedSAE
from lab.storage import Cache, code_digest, digest, randomness
from lab.substrates import Substrate, choose_source, quiet_libraries
from lab.substrates.texts import RETAIN, SIZES, sides

CODE.setdefault(__name__, Module(Path(__file__).read_text(encoding="utf-8")))  # where imported

SEEDS = 3  # a row
FAINT = 1e-6  # an α that leaves directions alone
LESSER = (0.005, 0.01, 0.02, 0.05, 0.1)  # of means by domain: two to nine times as much a token
MAIN = {"vanilla": "run_8", "fixed": "run_7", "OrtSAE": "run_9", "adaptive": "run_2"}
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name} ({run})": (run, {}) for name, run in MAIN.items()},
    **{f"fixed, α {alpha}": ("run_7", {"alpha": alpha}) for alpha in (0.01, 0.025, 0.1, 0.2)},
    **{f"OrtSAE, γ {gamma}": ("run_9", {"alpha": gamma}) for gamma in (0.05, 0.1, 0.5, 1.0)},
    "adaptive, α 0.2": ("run_2", {"alpha": 0.2}),
    "OrtSAE, every step, no ramp": ("run_9", {"direction_every": 1, "ramp_fraction": 0.0}),
    "nothing shared (run_2)": ("run_2", {"share_use": 0.0}),
    "use term alone (run_2)": ("run_2", {
        "alpha": FAINT, "eta": CustomSAEConfig.alpha * CustomSAEConfig.eta / FAINT}),
    **{f"all pairs, {part} (run_2)": ("run_2", {"all_pairs": part}) for part in (0.0, 0.5, 1.0)},
    **{f"extra L1, {weight}": ("run_2", {"alpha": FAINT, "eta": weight / FAINT})
       for weight in LESSER},
    **{f"first proposal, α {alpha}": ("run_7", {"orthogonality": "gram_encoder", "alpha": alpha})
       for alpha in (0.01, 0.05, 0.25)},
}
COLUMNS = {
    "explained_variance": "explained variance", "kappa_median": "κ median",
    "kappa_p90": "κ p90", "l_use": "L_use", "duplicates": "duplicates",
    "unlearning_area": "area", "unlearning_area_sae_bench": "area, SAEBench's settings",
    "accuracy_area": "accuracy area", "unlearning_score": "score",
    "tpp_threshold_20_total_metric": "TPP, 20",
    "sae_top_1_test_accuracy": "probe, 1", "sae_top_5_test_accuracy": "probe, 5",
    "sae_test_accuracy": "probe, all",
}


class Mislabelled(ActivationBuffer):
    """Every stretch of text has the domain of another: labels as many and as steady as the true
    ones, without meaning. Samples, from which features are chosen, keep the true ones."""

    STRETCH = 128  # tokens

    def batch(self, seed: int, step: int, size: int, forget_share: float,
              share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        index = self.places(seed, step, size, forget_share)[share]
        domains = self.domain_N[:: self.STRETCH]
        moved = torch.randperm(len(domains), generator=randomness("mislabelled", seed))
        return (self.acts_ND[index].float() / self.scale,
                domains[moved[index // self.STRETCH]].long())


def random_partners(of: Firing, *arguments: Any, counted: Callable = experiment.partners,
                    **options: Any) -> Partners:
    """Features drawn at random: as many as a grouping counts, with the same weights."""
    found = counted(of, *arguments, **options)
    others = torch.randperm(len(of.fired_F), generator=randomness("random partners", of.n))
    return found._replace(column_N=others[found.column_N])


def lesser_side(mean_KF: Tensor, running_KF: Tensor, _share_F: Tensor | None = None) -> Tensor:
    """An L1 in place of L_use: of every feature's two sides, forget text and the kind of retain
    text on which it has most, the lesser one's mean activation, summed. It exempts nothing, and
    acts before the first grouping too."""
    return sides(mean_KF, running_KF).gather(0, sides(running_KF).argmin(0)[None]).sum()


@contextlib.contextmanager
def in_place_of(name: str, other: Any) -> Iterator[None]:
    """Meanwhile experiment.py's function `name` is another one."""
    before = getattr(experiment, name)
    setattr(experiment, name, other)
    try:
        yield
    finally:
        setattr(experiment, name, before)


def row(run: str, **changes: Any) -> CustomSAEConfig:
    """A row of the study at the budget that SAE_BUDGET names, with fewer seeds."""
    config = resolve_config(run, os.environ.get("SAE_BUDGET") or "full", Path())
    return dataclasses.replace(config, **{"n_seeds": min(SEEDS, config.n_seeds), **changes})


def open_substrate(unnamed: str = "") -> Substrate:
    """The substrate that a run with these environment variables has; a kind of retain text may be
    an unnamed text, of which nothing is learnt."""
    quiet_libraries()
    keep_freed_memory()
    row("run_8")  # refuses an unknown budget
    cache = Cache(Path(os.environ.get("SAE_CACHE_DIR") or ".cache"))
    source = choose_source(os.environ.get("SAE_SUBSTRATE") or "auto", cache)
    source.fetch()
    if unnamed:
        kinds = tuple(kind for kind in source.domains["retain"] if kind != unnamed)
        source.domains = {**source.domains, "retain": kinds, unnamed: (unnamed,)}
        source.learn_parts = {**source.learn_parts, unnamed: 0.0}
        source.unnamed = (*source.unnamed, unnamed)
        source.fingerprint = digest(source.fingerprint, unnamed)
    return Substrate(source, SIZES[os.environ.get("SAE_BUDGET") or "full"], cache, Processes())


class Bench:
    """A substrate with its activations, and what SAEs trained on them measure."""

    def __init__(self, substrate: Substrate):
        if substrate.processes.size > 1:
            raise UserError("controls run in one process; start them without torchrun")
        self.substrate = substrate
        self.buffer = ActivationBuffer.read(substrate, gigabytes=row("run_8").buffer_gigabytes)

    def sample(self, domain: int) -> Tensor:
        return self.buffer.sample(domain, self.substrate.sizes.frequency_tokens)

    def mislabelled(self) -> "Bench":
        bench = copy.copy(self)
        bench.buffer = Mislabelled.read(self.substrate,
                                        gigabytes=row("run_8").buffer_gigabytes)
        if not isinstance(bench.buffer, Mislabelled):
            raise UserError("labels are moved in memory only; raise buffer_gigabytes")
        return bench

    def saes(self, config: CustomSAEConfig, *own: str) -> dict[int, ExportedSAE]:
        """As a run of this row trains them, by seed; `own` names what else was changed."""
        substrate, kind = self.substrate, type(self.buffer)
        own += () if kind is ActivationBuffer else (code_digest(kind),)
        name = f"{substrate.name}/trained/{training_key(config, substrate, self.buffer)}"
        return {seed: train_sae(config, self.buffer, seed, substrate.cache.path(name, seed, *own),
                                Interrupts(), None, substrate.processes
                                ).exported(self.buffer.scale) for seed in config.seeds}

    def untrained(self, config: CustomSAEConfig) -> dict[int, ExportedSAE]:
        return {seed: new_trainer(config, self.buffer, seed, self.substrate.processes
                                  ).exported(self.buffer.scale) for seed in config.seeds}

    def evaluated(self, saes: dict[int, ExportedSAE]) -> Evaluated:
        return evaluate(saes, self.substrate, self.sample, Clock())


# What is printed


def as_info(evaluated: Evaluated) -> Info:
    """What `compare` reads of a final_info.json."""
    results = evaluated.by_seed
    return {"seeds": [{"seed": seed, **flat_metrics(parts)} for seed, parts in results.items()],
            "unlearning": {"per_seed": [parts["unlearning"] for parts in results.values()]}}


def line(name: str, cells: Iterable[str]) -> None:
    print("|", " | ".join((name, *cells)), "|", flush=True)


def table(rows: Iterable[tuple[str, Evaluated]]) -> None:
    """Each row's means, and its paired differences to the first one."""
    first = None
    for name, evaluated in rows:
        info = as_info(evaluated)
        numbers = dict(zip(("means", "stderrs"), means_and_stderrs(info["seeds"])))
        line(f"{name} ({len(evaluated.by_seed)})", (
            headline(numbers, key, "", 3).strip() for key in COLUMNS))
        if first:
            gaps("minus the first", compare(info, first))
        first = first or info


def gaps(name: str, differences: Info) -> None:
    line(name, ("{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**differences[key])
                if differences.get(key, {}).get("low") is not None else "-" for key in COLUMNS))


def main(names: Sequence[str] = ()) -> None:
    if unknown := set(names) - TABLES.keys():
        raise UserError(f"{', '.join(unknown)}: no such table; use {', '.join(TABLES)}")
    bench = Bench(open_substrate())
    for name in names or TABLES:
        line("row (seeds)", COLUMNS.values())
        line("---", itertools.repeat("---", len(COLUMNS)))
        TABLES[name](bench)


def fresh(bench: Bench) -> None:
    first_seed = experiment.RUNS["run_10"]["first_seed"]
    table((f"{name}, fresh seeds", bench.evaluated(bench.saes(row(run, first_seed=first_seed))))
          for name, run in MAIN.items())


def batch_topk(bench: Bench) -> None:
    table((f"{name}, BatchTopK", bench.evaluated(bench.saes(row(run, activation="batch_topk"))))
          for name, run in MAIN.items())


def longer(bench: Bench) -> None:
    table((f"{name}, five times the steps", bench.evaluated(bench.saes(row(
        run, steps=5 * row(run).steps)))) for name, run in MAIN.items() if name != "OrtSAE")


def left_out(bench: Bench) -> None:
    domain_N, names = bench.substrate.learn.domain_N, bench.substrate.learn_domains
    kinds = [names[k] for k in domain_N[domain_N >= RETAIN].unique().tolist()]
    if len(kinds) < 2:
        raise UserError(f"left_out needs two kinds of retain text; {bench.substrate.name} has "
                        f"{', '.join(kinds)}")
    for kind in kinds:
        other = Bench(open_substrate(kind))
        table((f"{name}, {kind} unnamed", other.evaluated(other.saes(row(run))))
              for name, run in MAIN.items())


def changed(bench: Bench) -> None:
    table(changed_rows(bench))


def changed_rows(bench: Bench) -> Iterable[tuple[str, Evaluated]]:
    for name, (run, changes) in CHANGED.items():
        own = (code_digest(lesser_side),) if "extra L1" in name else ()
        with in_place_of("use_loss", lesser_side) if own else contextlib.nullcontext():
            saes = bench.saes(row(run, **changes), *own)
        yield name, bench.evaluated(saes)
    with in_place_of("partners", random_partners):
        saes = bench.saes(row("run_2"), code_digest(random_partners))
    yield "random partners (run_2)", bench.evaluated(saes)
    mislabelled = bench.mislabelled()
    yield "labels without meaning (run_2)", bench.evaluated(mislabelled.saes(row("run_2")))
    yield "not trained", bench.evaluated(bench.untrained(row("run_8")))


TABLES = {one.__name__: one for one in (fresh, changed, batch_topk, longer, left_out)}

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
