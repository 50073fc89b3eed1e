"""Controls on the real substrate: what the study's numbers are worth.

    python bench/controls.py                 # all tables
    python bench/controls.py changed longer  # some of them

Each row is a table line: means ± standard errors. Below it are paired differences with 95 %
intervals, of the same seeds, as in final_info.json: of the main comparison's rows to all before
them, of any other row to vanilla and to the row that it changes.

fresh: the rows of the main comparison on run_10's seeds, on which nothing was chosen.
changed: changed training: the losses at other strengths; an extra L1 on the lesser side; the
use term alone, or with weaker directions; L_dir with other parts of all pairs; the first proposal;
random partners, none, or nothing shared; labels without meaning; no training.
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
LESSER = (0.005, 0.01, 0.02, 0.05, 0.1)  # of means by domain: 2.5 to 7.6 times as much a token
MAIN = {"vanilla": "run_8", "fixed": "run_7", "OrtSAE": "run_9", "adaptive": "run_2"}
BASES = {run: name for name, run in MAIN.items()}
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"fixed, α {alpha}": ("run_7", {"alpha": alpha}) for alpha in (0.01, 0.025, 0.1, 0.2)},
    **{f"OrtSAE, γ {gamma}": ("run_9", {"alpha": gamma}) for gamma in (0.05, 0.1, 0.5, 1.0)},
    "adaptive, α 0.2": ("run_2", {"alpha": 0.2}),
    "OrtSAE, every step, no ramp": ("run_9", {"direction_every": 1, "ramp_fraction": 0.0}),
    "use term alone": ("run_2", {
        "alpha": FAINT, "eta": CustomSAEConfig.alpha * CustomSAEConfig.eta / FAINT}),
    "directions at α 0.01, use as run_2": ("run_2", {
        "alpha": 0.01, "eta": CustomSAEConfig.alpha * CustomSAEConfig.eta / 0.01}),
    **{f"all pairs, {part}": ("run_2", {"all_pairs": part}) for part in (0.0, 0.5, 1.0)},
    **{f"extra L1, {weight}": ("run_2", {"alpha": FAINT, "eta": weight / FAINT})
       for weight in LESSER},
    **{f"first proposal, α {alpha}": ("run_7", {"orthogonality": "gram_encoder", "alpha": alpha})
       for alpha in (0.01, 0.05, 0.25)},
}
COLUMNS = {
    "l0": "L0", "explained_variance": "explained variance", "kappa_median": "κ median",
    "kappa_p90": "κ p90", "l_use": "L_use", "duplicates": "duplicates",
    "unlearning_area": "area", "unlearning_area_static": "static clamps",
    "unlearning_area_sae_bench": "area, SAEBench's settings",
    "accuracy_area": "accuracy area", "unlearning_score": "score",
    "tpp_threshold_20_total_metric": "TPP, 20",
    "sae_top_1_test_accuracy": "probe, 1", "sae_top_5_test_accuracy": "probe, 5",
    "sae_test_accuracy": "probe, all",
}


class Mislabelled(ActivationBuffer):
    """Every stretch of text has the domain of another: labels as many in the buffer and as steady
    as the true ones, without meaning. In a batch the part that is called forget is the buffer's,
    not `forget_share`. Samples, from which features are chosen, keep the true labels."""

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


def own_evenness(*arguments: Any, rule: Callable = experiment.sharing) -> Tensor:
    """What a feature shares by its own evenness; partners tell only of what never fired."""
    return rule(*arguments, prior=1e-6)


def nothing_shared(_: Partners, fired_F: Tensor, *_arguments: Any) -> Tensor:
    """No feature is spared L_use once features are grouped."""
    return torch.zeros(len(fired_F))


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
        substrate = self.substrate
        own += (code_digest(Mislabelled),) if isinstance(self.buffer, Mislabelled) else ()
        name = f"{substrate.name}/trained/{training_key(config, substrate, self.buffer)}"
        return {seed: train_sae(config, self.buffer, seed, substrate.cache.path(name, seed, *own),
                                Interrupts(), None, substrate.processes
                                ).exported(self.buffer.scale) for seed in config.seeds}

    def untrained(self, config: CustomSAEConfig) -> dict[int, ExportedSAE]:
        """As before the first step, but at the L0 at which training ends."""
        saes = {}
        for seed in config.seeds:
            trainer = new_trainer(config, self.buffer, seed, self.substrate.processes)
            z_BD, _ = self.buffer.batch(seed, 0, config.batch_size, config.forget_share)
            trainer.sae.initialize_biases_(z_BD.to(trainer.device), config.target_l0)
            saes[seed] = trainer.exported(self.buffer.scale)
        return saes

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


Row = tuple[str, Evaluated, Sequence[str]]  # name, results, names of rows it is compared with


def table(rows: Iterable[Row]) -> None:
    """Each row's means, and its paired differences to earlier rows."""
    infos: dict[str, Info] = {}
    for name, evaluated, references in rows:
        infos[name] = info = as_info(evaluated)
        numbers = dict(zip(("means", "stderrs"), means_and_stderrs(info["seeds"])))
        line(f"{name} ({len(evaluated.by_seed)})", (
            headline(numbers, key, "", 3).strip() for key in COLUMNS))
        for other in references:
            gaps(f"minus {other}", compare(info, infos[other]))


def gaps(name: str, differences: Info) -> None:
    line(name, ("{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**differences[key])
                if differences.get(key, {}).get("low") is not None else "-" for key in COLUMNS))


def main(names: Sequence[str] = ()) -> None:
    if unknown := set(names) - TABLES.keys():
        raise UserError(f"{', '.join(unknown)}: no such table; use {', '.join(TABLES)}")
    bench = Bench(open_substrate())
    for name in names or TABLES:
        line(f"{name}: row (seeds)", COLUMNS.values())
        line("---", itertools.repeat("---", len(COLUMNS)))
        TABLES[name](bench)


def main_rows(bench: Bench, names: Iterable[str] = MAIN, **changes: Any) -> Iterable[Row]:
    before: list[str] = []
    for name in names:
        yield name, bench.evaluated(bench.saes(row(MAIN[name], **changes))), tuple(before)
        before.append(name)


def fresh(bench: Bench) -> None:
    table(main_rows(bench, first_seed=experiment.RUNS["run_10"]["first_seed"]))


def batch_topk(bench: Bench) -> None:
    table(main_rows(bench, activation="batch_topk"))


def longer(bench: Bench) -> None:
    names = [name for name in MAIN if name != "OrtSAE"]
    table(main_rows(bench, names, steps=5 * row("run_8").steps))


def left_out(bench: Bench) -> None:
    domain_N, names = bench.substrate.learn.domain_N, bench.substrate.learn_domains
    kinds = [names[k] for k in domain_N[domain_N >= RETAIN].unique().tolist()]
    if len(kinds) < 2:
        raise UserError(f"left_out needs two kinds of retain text; {bench.substrate.name} has "
                        f"{', '.join(kinds)}")
    for kind in kinds:
        line(f"{kind} unnamed", itertools.repeat("", len(COLUMNS)))
        table(main_rows(Bench(open_substrate(kind))))


def changed(bench: Bench) -> None:
    table(changed_rows(bench, bench.mislabelled()))


def changed_rows(bench: Bench, mislabelled: Bench) -> Iterable[Row]:
    yield from main_rows(bench)
    adaptive = row("run_2")
    for name, (run, changes) in CHANGED.items():
        own = (code_digest(lesser_side),) if "extra L1" in name else ()
        with in_place_of("use_loss", lesser_side) if own else contextlib.nullcontext():
            saes = bench.saes(row(run, **changes), *own)
        yield name, bench.evaluated(saes), ("vanilla", BASES[run])
    references = "vanilla", "adaptive"
    for name, original, other in (("random partners", "partners", random_partners),
                                  ("own evenness alone", "sharing", own_evenness),
                                  ("nothing shared", "sharing", nothing_shared)):
        with in_place_of(original, other):
            saes = bench.saes(adaptive, code_digest(other))
        yield name, bench.evaluated(saes), references
    yield "labels without meaning", bench.evaluated(mislabelled.saes(adaptive)), references
    yield "not trained", bench.evaluated(bench.untrained(row("run_8"))), ("vanilla",)


TABLES = {one.__name__: one for one in (fresh, changed, batch_topk, longer, left_out)}

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
