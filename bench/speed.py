"""All tables of speed: step, orthogonality term, grouping, whole runs, and the peers if installed.

    python bench/speed.py

What is compared in the first three tables runs in one process, in turns, and the medians of the
turns are printed with their range; absolute times belong to the machine. D = 512, B = 2048 tokens,
40 features active a token on synthetic activations; weights move so little that this stays so.
The plain dense step runs twice: here, where freed memory is kept as experiment.py has it, and in a
process of its own with the C library's habits, as a tool that does not ask for this runs; a third
time in bfloat16, which shows what of the ratio is the precision's.
Whole runs: what the finished run folders beside experiment.py took. Last, where bench/peers.sh has
installed them (SAE_PEERS), three rounds of bench/pipeline.py against SAELens and
dictionary_learning.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipeline
import torch
from exchange import peer_python
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import experiment as ex  # noqa: E402 - it lies beside this folder, not on the path

D, B, ACTIVE = 512, 2048, 40.0
ROUNDS = 5
MODE_ROUNDS = 20  # modes differ by less than the machine does from one turn to the next
PIPELINE_ROUNDS = 3


def trainer(mode: str, d_sae: int, screen: str) -> ex.CustomTrainer:
    row = dataclasses.replace(
        ex.CustomSAEConfig(), orthogonality=mode, alpha=0.05 if mode != "off" else 0.0,
        target_l0=ACTIVE, learning_rate=1e-7, sparsity_rate=0.0, resample_every=10**9,
        regroup_every=10**9, ramp_fraction=0.0, steps=10**6,
    )
    sae = ex.CustomSAE(D, d_sae, ex.randomness("bench", d_sae), screen)
    sae.initialize_biases_(batch(0)[0], ACTIVE)
    made = ex.CustomTrainer(row, sae, 0)
    made.l0 = ACTIVE
    return made


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = ex.randomness("bench batch", i)
    return torch.randn(B, D, generator=generator) / D**0.5, torch.arange(B) % 2


def plain_step(sae: ex.CustomSAE, optimizer: torch.optim.Adam, z_BD: Tensor,
               half: bool = False) -> None:
    """The same mathematics, dense and by autograd, in float32, as dictionary_learning trains, or
    with autocast to bfloat16, as SAELens can."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        f_BF = sae.encode(z_BD)
        z_hat_BD = sae.decode(f_BF)
    loss = (z_BD - z_hat_BD).norm(dim=1).mean() + 0.04 * f_BF.float().sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    sae.remove_parallel_gradient_()
    optimizer.step()
    sae.normalize_decoder_()


def plain_worker(d_sae: int, orders: Any) -> None:
    """Takes a plain step for every number that comes, in a process of its own."""
    sae = trainer("off", d_sae, "float32").sae
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-7)
    while (i := orders.recv()) is not None:
        plain_step(sae, optimizer, BATCHES[i][0])
        orders.send(i)


@contextlib.contextmanager
def plain_elsewhere(d_sae: int) -> Iterator[Callable[[int], Any]]:
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


def seconds(work: Callable[[int], Any], repeats: int) -> float:
    start = time.perf_counter()
    for i in range(repeats):
        work(i)
    return (time.perf_counter() - start) / repeats


def in_turns(works: dict[str, tuple[Callable[[int], Any], int]],
             rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds a call of each work, `rounds` times in turns after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, (work, repeats) in works.items():
            taken = seconds(work, repeats)
            if turn:
                times[name].append(taken)
    return times


def ratio(over: list[float], under: list[float]) -> str:
    """Median of paired ratios and their range."""
    ratios = [a / b for a, b in zip(over, under)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def milliseconds(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.0f}"


def stepper(made: ex.CustomTrainer) -> Callable[[int], Any]:
    return lambda i: made.step(*BATCHES[i % len(BATCHES)])


def steps(d_sae: int) -> None:
    screen = ex.faster_screen()
    plain = trainer("off", d_sae, screen).sae
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-7)
    period = ex.CustomSAEConfig().ortho_every
    modes = in_turns({mode: (stepper(trainer(mode, d_sae, screen)), period)
                      for mode in ("off", "fixed", "adaptive")}, MODE_ROUNDS)
    times: dict[str, list[float]] = {}
    if d_sae <= 16384:
        with plain_elsewhere(d_sae) as elsewhere:
            times = in_turns({
                "off": (stepper(trainer("off", d_sae, screen)), period),
                "off, float32 screen": (stepper(trainer("off", d_sae, "float32")), period),
                "plain": (lambda i: plain_step(plain, optimizer, BATCHES[i][0]), 2),
                "plain, bfloat16": (
                    lambda i: plain_step(plain, optimizer, BATCHES[i][0], half=True), 2),
                "plain elsewhere": (elsewhere, 2),
            })
    compared = (("plain elsewhere", "off"), ("plain", "off"), ("plain, bfloat16", "off"),
                ("plain", "off, float32 screen"))
    print(f"| {d_sae} |", " | ".join(ratio(times[over], times[under]) if over in times else "-"
                                     for over, under in compared),
          "|", " | ".join(ratio(modes[mode], modes["off"]) for mode in ("adaptive", "fixed")),
          "|", milliseconds(modes["off"]), "|", flush=True)


def gram_loss(W_FD: Tensor, groups_GM: Tensor, share_G: Tensor) -> float:
    """L_dir by its definition: the F × F matrix of cosines with its weights."""
    F = len(W_FD)
    cosine_FF = W_FD @ W_FD.T
    total = cosine_FF.square_().sum(dtype=torch.float64) - cosine_FF.diagonal().sum()
    for group, share in zip(groups_GM, share_G):
        block = cosine_FF[group][:, group]
        total -= share * (block.sum() - block.diagonal().sum())
    return float(total) * D / F**2


def term(d_sae: int) -> None:
    sae = ex.CustomSAE(D, d_sae, ex.randomness("bench", d_sae))
    groups = torch.randperm(d_sae, generator=ex.randomness("bench groups")).view(-1, 64)
    share = torch.linspace(-8, 0.9, len(groups))
    with torch.no_grad():
        exact = float(ex.direction_loss(sae.W_dec, groups, share))
        gram = gram_loss(sae.W_dec, groups, share)
        times = in_turns({
            "exact": (lambda i: ex.direction_loss(sae.W_dec, groups, share), 2),
            "gram": (lambda i: gram_loss(sae.W_dec, groups, share), 1),
        })
    print(f"| {d_sae} | {exact:.6f} | {gram:.6f} |", ratio(times["gram"], times["exact"]), "|",
          f"{d_sae * d_sae * 4 / 1e6:.0f} | {(d_sae * D * 2 + d_sae * 64) * 4 / 1e6:.0f} |",
          flush=True)


def grouping(d_sae: int) -> None:
    config = ex.CustomSAEConfig()
    rows_FR = torch.randn(d_sae, config.sketch_size, generator=ex.randomness("bench rows"))
    rows_FR /= config.sketch_size**0.5
    step = stepper(trainer("adaptive", d_sae, ex.faster_screen()))
    times = in_turns({
        "grouping": (lambda i: ex.group_features(rows_FR, config.group_size, 0), 1),
        "step": (step, config.ortho_every),
    })
    taken, each = (statistics.median(times[name]) for name in ("grouping", "step"))
    share = taken / (taken + config.regroup_every * each)
    print(f"| {d_sae} | {taken:.2f} | {1e6 * taken / d_sae:.0f} | {100 * share:.2f} % |",
          flush=True)


def whole_runs() -> None:
    """Seconds of each phase of the finished runs beside experiment.py, all seeds."""
    phases = ("activations", "training", "reconstruction", "conditioning", "sparse_probing",
              "unlearning")
    print("\n| run | budget | seeds |", " | ".join(phases), "| all | peak GB |\n" +
          "|---" * (len(phases) + 5) + "|")
    for name in ex.RUNS:
        path = ROOT / name / "final_info.json"
        if path.exists():
            info = json.loads(path.read_text(encoding="utf-8"))
            taken = [info["timing"].get(f"{phase}_seconds", 0.0) for phase in phases]
            print(f"| {name} | {info['budget']} | {info['config']['n_seeds']} |",
                  " | ".join(f"{t:.0f}" for t in taken),
                  f"| {sum(taken):.0f} | {info['timing']['peak_memory_gb']:.1f} |")


def peers() -> None:
    absent = [who for who in ("sae_lens", "dictionary_learning") if not peer_python(who).exists()]
    if absent:
        print(f"\nNot measured: the pipeline against {' and '.join(absent)}, which bench/peers.sh "
              "installs (SAE_PEERS).")
        return
    print()
    print(pipeline.table([pipeline.measure_round(list(pipeline.VARIANTS))
                          for _ in range(PIPELINE_ROUNDS)]))


def main() -> None:
    ex.quiet_libraries()
    ex.keep_freed_memory()
    print(f"{ex.processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"screen {ex.faster_screen()}, L_dir's products in "
          f"{ex.faster_dtype(torch.device('cpu'))}; medians of {ROUNDS} turns "
          f"(range), of {MODE_ROUNDS} between modes\n")
    print("| F | plain dense float32 step / ours | the same, freed memory kept | and in bfloat16 | "
          "in float32, ours with a float32 screen | adaptive / off | fixed / off | ours, off, ms |"
          "\n|---|---|---|---|---|---|---|---|")
    for d_sae in (4096, 16384, 32768):
        steps(d_sae)
    print("\n| F | L_dir, ours | by the F × F Gram | Gram time / ours | Gram, MB | ours, MB |\n"
          "|---|---|---|---|---|---|")
    for d_sae in (4096, 16384, 32768):
        term(d_sae)
    print("\n| F | one grouping, s | µs a feature | of training, every 250 steps |\n"
          "|---|---|---|---|")
    for d_sae in (4096, 8192, 16384, 32768, 65536):
        grouping(d_sae)
    whole_runs()
    peers()
    print("\nNot measured: CUDA; processors with matrix units; more than one process.")


BATCHES = [batch(i) for i in range(8)]

if __name__ == "__main__":
    main()
