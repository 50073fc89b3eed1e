"""What `bench/gpu.sh` measures on a GPU, a part at a time.

    python bench/gpu.py card | steps | profile | language_model

steps    milliseconds a training step at F = 16,384, B = 4,096, in turns in one process: ours with
         dense products, ours with the lists of lab/kernels.py, dictionary_learning's
         StandardTrainer (float32, its only precision), and the bound of either of ours
profile  what the GPU does in our step, and how long it waits for the program
language_model
         tokens a second through the hook, beside the bare forward pass to the same block
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment import CustomSAE, CustomSAEConfig, CustomTrainer
from lab.device import to_device
from lab.language_model import LanguageModel, faster_dtype
from lab.storage import randomness
from lab.substrates import quiet_libraries

F, B, WIDTHS, ACTIVE = 16_384, 4_096, (512, 2_048), 40
NEVER = 10**9
PRODUCTS, FLOAT32, MEMORY = 600e12, 50e12, 3.35e12  # an H100's, as they can be had: FLOP/s, bytes/s
Work = Callable[[int], Any]


def bound(d_sae: int, batch: int, d_in: int, listed: bool) -> float:
    """Seconds that our step takes if products and memory run at full speed, one after the other.

    Dense: five products of bfloat16, and ten readings or writings of [B, F] in between. Listed: one
    product, two readings, and a row of D numbers for each active feature of each token in four
    sparse products. Either: 112 bytes a weight of both matrices' F·D for Adam, unit rows, and
    copies in bfloat16.
    """
    entry, weights = batch * d_sae, 112 * d_sae * d_in
    if listed:
        moved = 2 * 2 * entry + 4 * 2 * batch * ACTIVE * d_in
        return 2 * entry * d_in / PRODUCTS + (moved + weights) / MEMORY
    return 10 * entry * d_in / PRODUCTS + (20 * entry + weights) / MEMORY


def peer_bound(d_sae: int, batch: int, d_in: int) -> float:
    """Of dictionary_learning's step: its six products, of float32."""
    return 12 * batch * d_sae * d_in / FLOAT32


def batches(n: int, batch: int, d_in: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(batch, d_in, generator=randomness("bench batch", i)) / d_in**0.5,
             torch.arange(batch) % 2) for i in range(n)]


def trainer(device: torch.device, d_sae: int, batch: int, d_in: int, room: int,
            mode: str = "adaptive") -> CustomTrainer:
    """Of an SAE on which about ACTIVE features fire, as its weights hardly move."""
    config = CustomSAEConfig(
        orthogonality=mode, target_l0=ACTIVE, learning_rate=1e-7, sparsity_rate=1e-12, steps=NEVER,
        batch_size=batch, resample_every=NEVER, regroup_every=NEVER, ramp_fraction=0.0,
        log_every=NEVER)
    sae = CustomSAE(d_in, d_sae, randomness("bench", d_sae)).to(device)
    sae.initialize_biases_(batches(1, batch, d_in)[0][0].to(device), ACTIVE)
    sae.half, sae.room = faster_dtype(device) == torch.bfloat16, room
    made = CustomTrainer(config, sae, 0)
    made.state["l0"].fill_(ACTIVE)
    made.step_count = config.direction_every  # past the first grouping
    return made


def our_step(device: torch.device, d_sae: int, batch: int, d_in: int, room: int = 0) -> Work:
    """With its batch's way from pinned memory to the GPU."""
    made, given = trainer(device, d_sae, batch, d_in, room), batches(8, batch, d_in)
    if device.type == "cuda":
        given = [tuple(part.pin_memory() for part in parts) for parts in given]
    return lambda i: made.step(*(to_device(part, device) for part in given[i % 8]))


def peer_step(device: torch.device, d_sae: int, batch: int, d_in: int) -> Work | None:
    """dictionary_learning's, its batch being there already; None where it is not installed."""
    try:
        from dictionary_learning.trainers.standard import StandardTrainer
    except ModuleNotFoundError:
        return None
    made = StandardTrainer(steps=NEVER, activation_dim=d_in, dict_size=d_sae, layer=0,
                           lm_name="none", lr=1e-7, l1_penalty=0.04, device=device)
    given = [part.to(device) for part, _ in batches(8, batch, d_in)]
    return lambda i: made.update(i, given[i % 8])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Work, device: torch.device, repeats: int) -> float:
    wait(device)
    start = time.perf_counter()
    for i in range(repeats):
        work(i)
    wait(device)
    return (time.perf_counter() - start) / repeats


def middle(times: list[float]) -> float:
    """Milliseconds, the median."""
    return 1e3 * statistics.median(times)


def steps(device: torch.device, d_sae: int = F, batch: int = B, widths: tuple = WIDTHS,
          turns: int = 5, repeats: int = 40) -> None:
    print(f"F = {d_sae}, B = {batch}, {ACTIVE} active features a token; ms a step, median of "
          f"{turns} turns of {repeats} steps\n| D | what | ms | bound, ms | over the bound | "
          "dictionary_learning / it |\n| --- | --- | --- | --- | --- | --- |")
    for d_in in widths:
        shape = d_sae, batch, d_in
        works = {"ours, dense": (our_step(device, *shape), bound(*shape, listed=False))}
        if device.type == "cuda":
            works["ours, listed"] = (our_step(device, *shape, room=3 * ACTIVE),
                                     bound(*shape, listed=True))
        if peer := peer_step(device, *shape):
            works["dictionary_learning"] = (peer, peer_bound(*shape))
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(turns + 1):
            for name, (work, _) in works.items():
                taken = seconds(work, device, repeats)
                if turn:  # the first one warms up
                    times[name].append(taken)
        theirs = times.get("dictionary_learning")
        for name, (_, least) in works.items():
            over = middle(times[name]) / (1e3 * least)
            ratio = f"{middle(theirs) / middle(times[name]):.1f}" if theirs else "not installed"
            print(f"| {d_in} | {name} | {middle(times[name]):.2f} | {1e3 * least:.2f} | "
                  f"{over:.2f} | {ratio} |", flush=True)


def profile(device: torch.device, d_sae: int = F, batch: int = B, widths: tuple = WIDTHS,
            repeats: int = 16) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    for d_in in widths:
        for room in (0, 3 * ACTIVE) if device.type == "cuda" else (0,):
            work = our_step(device, d_sae, batch, d_in, room)
            taken = seconds(work, device, repeats)
            with torch.profiler.profile(activities=kinds) as found:
                seconds(work, device, repeats)
            table = found.key_averages()
            busy = sum(getattr(one, "self_device_time_total", 0.0) for one in table) / repeats
            print(f"\nD = {d_in}, {'listed' if room else 'dense'}: {1e3 * taken:.2f} ms a step, of "
                  f"which the GPU works {busy / 1e3:.2f} ms")
            order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(table.table(sort_by=order, row_limit=15, max_name_column_width=60))


def language_model(device: torch.device, contexts: int = 512, layer: int = 3,
                   rows: int = 16) -> None:
    """On Pythia-70M's shape with random weights, in the precision that a run has there."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(vocab_size=50304, hidden_size=512, num_hidden_layers=6,
                                        num_attention_heads=8, intermediate_size=2048)
    model = transformers.GPTNeoXForCausalLM(config).to(faster_dtype(device))
    tokens_NT = torch.randint(0, 50304, (contexts, 128))
    lm = LanguageModel(model, NoTokenizer(), layer, device)
    bare = model.base_model
    blocks, bare.layers = bare.layers, bare.layers[: layer + 1]

    @torch.no_grad()
    def forward(_: int) -> None:
        for part in tokens_NT.split(rows):
            bare(input_ids=part.to(device), use_cache=False)

    forward(0)
    plain = min(seconds(forward, device, 1) for _ in range(5))
    bare.layers = blocks

    def through_hook(_: int) -> None:
        torch.cat([lm.residual(part) for part in tokens_NT.split(rows)]).cpu()

    through_hook(0)
    ours = min(seconds(through_hook, device, 1) for _ in range(5))
    n = tokens_NT.numel()
    print(f"{rows} contexts of 128 tokens at a time, {model.dtype}; tokens a second: "
          f"{n / ours:,.0f} through the hook and back, {n / plain:,.0f} by the bare forward pass "
          f"to block {layer} ({ours / plain:.2f} times as long)")


class NoTokenizer:
    def convert_tokens_to_ids(self, _: str) -> int:
        return 0


def main(arguments: list[str]) -> int:
    parts = {"steps": steps, "profile": profile, "language_model": language_model}
    if len(arguments) != 1 or arguments[0] not in ("card", *parts):
        print(f"usage: python bench/gpu.py card | {' | '.join(parts)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"no GPU here: torch {torch.__version__} finds none, so nothing was measured; run "
              "bench/gpu.sh where nvidia-smi lists one", file=sys.stderr)
        return 1
    quiet_libraries()
    if arguments[0] == "card":
        print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA "
              f"{torch.version.cuda}; bounds are an H100's: {PRODUCTS / 1e12:.0f} TFLOP/s in "
              f"bfloat16, {MEMORY / 1e12:.2f} TB/s")
    else:
        parts[arguments[0]](torch.device("cuda", 0))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
