"""All tables of speed: step, modes, direction term, grouping, whole runs, and peers if installed.

    python bench/speed.py                       # every table
    python bench/speed.py modes --turns 5       # some of them: NAMES below

What is compared runs in one process, in turns; printed are medians of the turns' ratios with their
range. Absolute times belong to the machine. D = 512, B = 2048 tokens, 40 active features a token,
on synthetic activations; weights move so little that this stays so.

steps    our step against the plain dense one. It runs twice: in a process of its own with the C
         library's habits, as a tool does that does not ask for freed memory to be kept; and here,
         where it is kept. A third time in bfloat16: what of the ratio is the precision's.
modes    what each orthogonality loss costs, as a ratio to off
terms    L_dir without the F × F matrix against its definition
grouping one grouping, and its part of training. Features fire together by chance here, so there are
         few partners; the counting is all there
runs     seconds of each phase of the committed study
peers    three rounds of bench/pipeline.py, where bench/peers.sh has installed them (SAE_PEERS)
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline
from exchange import peer_python

from experiment import (
    MODES,
    RUNS,
    CustomSAE,
    CustomSAEConfig,
    CustomTrainer,
    active_set_loss,
)
from lab.distributed import keep_freed_memory
from lab.language_model import faster_dtype
from lab.results.final_info import processor_name
from lab.sparse import faster_screen
from lab.storage import randomness
from lab.substrates import quiet_libraries

STUDY = Path(__file__).resolve().parent.parent / "study"
D, B, ACTIVE = 512, 2048, 40.0
PERIOD = CustomSAEConfig.direction_every  # steps a turn: one computes L_dir's gradient
NEVER = 10**9
PHASES = ("activations", "training", "reconstruction", "conditioning", "sparse_probing",
          "separation", "unlearning")
Work = Callable[[int], Any]


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = randomness("bench batch", i)
    return torch.randn(B, D, generator=generator) / D**0.5, torch.arange(B) % 2


BATCHES = [batch(i) for i in range(PERIOD)]


def trainer(mode: str, d_sae: int, screen: str | None = None) -> CustomTrainer:
    config = CustomSAEConfig(
        orthogonality=mode, target_l0=ACTIVE, learning_rate=1e-7, sparsity_rate=1e-12, steps=NEVER,
        resample_every=NEVER, regroup_every=NEVER, ramp_fraction=0.0)
    sae = CustomSAE(D, d_sae, randomness("bench", d_sae), screen)
    sae.initialize_biases_(BATCHES[0][0], ACTIVE)
    made = CustomTrainer(config, sae, 0)
    made.state["l0"].fill_(ACTIVE)
    made.step_count = PERIOD  # past the first grouping
    return made


def lists(made: CustomTrainer) -> Tensor:
    """What is active on as many tokens as are counted before a grouping."""
    batches = (batch(PERIOD + i)[0] for i in range(math.ceil(made.row.counted_tokens / B)))
    return torch.cat([made.code(z_BD).lists(made.list_length) for z_BD in batches])


def group(made: CustomTrainer, lists_RL: Tensor) -> None:
    made.state["lists_RL"] = lists_RL
    made.regroup_()


def stepper(made: CustomTrainer) -> Work:
    return lambda i: made.step(*BATCHES[i])


def plain_stepper(d_sae: int, half: bool = False) -> Work:
    """The same mathematics, dense and by autograd, in float32, as dictionary_learning trains, or
    with autocast to bfloat16, as SAELens can."""
    sae = trainer("off", d_sae).sae
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-7)

    def step(i: int) -> None:
        z_BD = BATCHES[i][0]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            f_BF = sae.encode(z_BD)
            z_hat_BD = sae.decode(f_BF)
        loss = (z_BD - z_hat_BD).norm(dim=1).mean() + 0.04 * f_BF.float().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.normalize_decoder_()

    return step


def plain_worker(d_sae: int, orders: Any) -> None:
    """Takes a plain step for every number that comes, in a process of its own."""
    step = plain_stepper(d_sae)
    while (i := orders.recv()) is not None:
        step(i)
        orders.send(i)


@contextlib.contextmanager
def plain_elsewhere(d_sae: int) -> Iterator[Work]:
    fresh = multiprocessing.get_context("spawn")
    here, there = fresh.Pipe()
    process = fresh.Process(target=plain_worker, args=(d_sae, there), daemon=True)
    process.start()

    def work(i: int) -> None:
        here.send(i)
        here.recv()

    yield work
    here.send(None)
    process.join()


def in_turns(works: dict[str, tuple[Work, int]], turns: int) -> dict[str, list[float]]:
    """Seconds a call of each work, `turns` times in turns after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, (work, repeats) in works.items():
            start = time.perf_counter()
            for i in range(repeats):
                work(i)
            if turn:
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def ratio(over: list[float], under: list[float]) -> str:
    """Median of the turns' ratios and their range."""
    ratios = [a / b for a, b in zip(over, under)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def steps(d_sae: int, turns: int) -> list[str]:
    with plain_elsewhere(d_sae) as elsewhere:
        times = in_turns({
            "ours": (stepper(trainer("off", d_sae)), PERIOD),
            "ours, float32 screen": (stepper(trainer("off", d_sae, "float32")), PERIOD),
            "plain": (plain_stepper(d_sae), 2),
            "plain, bfloat16": (plain_stepper(d_sae, half=True), 2),
            "plain elsewhere": (elsewhere, 2)}, turns)
    pairs = (("plain elsewhere", "ours"), ("plain", "ours"), ("plain, bfloat16", "ours"),
             ("plain", "ours, float32 screen"))
    return [ratio(times[over], times[under]) for over, under in pairs]


def modes(d_sae: int, turns: int) -> list[str]:
    times = in_turns({mode: (stepper(trainer(mode, d_sae)), PERIOD) for mode in MODES}, turns)
    return [f"{1e3 * statistics.median(times['off']):.0f}",
            *(ratio(times[mode], times["off"]) for mode in MODES[1:])]


def gram_loss(W_FD: Tensor, lists_BL: Tensor) -> float:
    """L_dir by its definition: the F × F matrix of cosines with its weights."""
    B, L = lists_BL.shape
    fires_BF = torch.zeros(B, len(W_FD)).scatter_(1, lists_BL.long() - 1, 1.0)
    weight_FF = fires_BF.T @ fires_BF
    return float((weight_FF.fill_diagonal_(0) * (W_FD @ W_FD.T).square_()).sum() / (B * L))


@torch.no_grad()
def terms(d_sae: int, turns: int) -> list[str]:
    W_FD, tokens = (CustomSAE(D, d_sae, randomness("bench", d_sae)).W_dec,
                    CustomSAEConfig.direction_tokens)
    draw_BF = torch.rand(tokens, d_sae, generator=randomness("bench lists"))
    lists_BL = draw_BF.argsort(dim=1)[:, : int(ACTIVE)].int() + 1
    times = in_turns({"ours": (lambda _: active_set_loss(W_FD, lists_BL), 2),
                      "gram": (lambda _: gram_loss(W_FD, lists_BL), 1)}, turns)
    return [f"{float(active_set_loss(W_FD, lists_BL)):.4f}", f"{gram_loss(W_FD, lists_BL):.4f}",
            ratio(times["gram"], times["ours"]), f"{d_sae * d_sae * 8 / 1e6:.0f}",
            f"{(d_sae * D * 4 + tokens * ACTIVE**2 * 28) / 1e6:.0f}"]


def grouping(d_sae: int, turns: int) -> list[str]:
    config, grouped = CustomSAEConfig(), trainer("adaptive", d_sae)
    lists_RL = lists(grouped)
    times = in_turns({"grouping": (lambda _: group(grouped, lists_RL), 1),
                      "step": (stepper(trainer("adaptive", d_sae)), PERIOD)}, turns)
    taken, each = (statistics.median(times[name]) for name in ("grouping", "step"))
    return [f"{taken:.2f}", f"{1e6 * taken / d_sae:.0f}",
            f"{taken / (taken + config.regroup_every * each):.2%}"]


TABLES: dict[str, tuple[Callable[[int, int], list[str]], tuple[int, ...], tuple[str, ...]]] = {
    "steps": (steps, (4096, 16384), (
        "plain dense float32 step / ours", "the same, freed memory kept", "and in bfloat16",
        "in float32, ours with a float32 screen")),
    "modes": (modes, (4096, 16384, 32768), (
        "off, ms", *(f"{mode} / off" for mode in MODES[1:]))),
    "terms": (terms, (4096, 16384, 32768), (
        "L_dir, ours", "by the F × F Gram", "Gram time / ours", "Gram, MB", "ours, MB")),
    "grouping": (grouping, (4096, 8192, 16384, 32768, 65536), (
        "one grouping, s", "µs a feature", f"of training, every {CustomSAEConfig.regroup_every}")),
}
NAMES = (*TABLES, "runs", "peers")


def line(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def heading(*cells: str) -> None:
    print()
    line(*cells)
    line(*("---" for _ in cells))


def whole_runs(names: Iterable[str]) -> None:
    heading("run", "budget", "seeds", *PHASES, "all", "peak GB")
    for name in names:
        path = STUDY / name / "final_info.json"
        if path.exists():
            info = json.loads(path.read_text(encoding="utf-8"))
            taken = [info["timing"].get(f"{phase}_seconds", 0.0) for phase in PHASES]
            line(name, info["budget"], str(len(info["seeds"])), *(f"{t:.0f}" for t in taken),
                 f"{sum(taken):.0f}", f"{info['timing']['peak_memory_gb']:.1f}")


def peers(rounds: int = 3) -> None:
    absent = [who for who in ("sae_lens", "dictionary_learning") if not peer_python(who).exists()]
    if absent:
        print(f"\nNot measured: the pipeline against {' and '.join(absent)}, which bench/peers.sh "
              "installs (SAE_PEERS).")
    else:
        print()
        print(pipeline.table([pipeline.measure_round(list(pipeline.VARIANTS))
                              for _ in range(rounds)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(NAMES))
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    if unknown := set(options.tables) - set(NAMES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    chosen = options.tables or NAMES
    quiet_libraries()
    keep_freed_memory()
    print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"screen {faster_screen()}, fixed's products in {faster_dtype(torch.device('cpu'))}; "
          f"medians of {options.turns} turns (range)")
    for name, (measure, sizes, columns) in TABLES.items():
        if name in chosen:
            heading("F", *columns)
            for d_sae in sizes:
                line(str(d_sae), *measure(d_sae, options.turns))
    if "runs" in chosen:
        whole_runs(RUNS)
    if "peers" in chosen:
        peers()
    print("\nNot measured: CUDA; processors with matrix units; more than one process.")


if __name__ == "__main__":
    main()
