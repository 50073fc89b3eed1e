"""How well streamed activations are mixed, against a shuffle of all of them.

    python bench/streaming.py

Tokens of one context are alike. The more of a batch share a context, the less a batch tells. The
table has, of the retain tokens of batches, the part of pairs that share a context; how many others
of its context a token meets; and by how much the variance of a batch's mean activation so exceeds
that of independent tokens, 1 + (n − 1) · pairs · ρ. ρ is the correlation of two tokens of a context
on the substrate that SAE_SUBSTRATE names. Activations are numbers of contexts here, so that any
amount of text can be tried. A second table has how fast a stream is.
"""

import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from controls import line, open_substrate
from torch import Tensor

from lab.distributed import Processes
from lab.shards import BYTES, Reader, Shards, Stream, smaller_shards, window_sizes
from lab.storage import randomness, read_tensors, write_tensors
from lab.substrates import Substrate
from lab.substrates.texts import RETAIN

CONTEXT, D_IN = 128, 512
SHARD = 32_768  # tokens of a shard, at most
SIZE, STEPS = 2458, 200  # retain tokens of a batch of 4,096; batches that are counted
TOKENS = (10_000_000, 100_000_000)  # of a domain
GIGABYTES = (0.5, 2.0, 8.0)


class Numbered(Shards):
    """Shards of one domain whose activations are the numbers of their contexts."""

    def __init__(self, tokens: int, gigabytes: float):
        room = 1e9 * gigabytes / (BYTES * D_IN)
        self.per_shard, self.domain = smaller_shards(SHARD, CONTEXT, room) // CONTEXT, RETAIN
        self.check = lambda: None
        self.tokens_NT = torch.empty(tokens // CONTEXT, CONTEXT, device="meta")
        self.starts = range(0, len(self.tokens_NT), self.per_shard)
        self.substrate = SimpleNamespace(processes=Processes(), source=SimpleNamespace(d_in=D_IN),
                                         compact=lambda x: x.int())

    def read(self, i: int) -> dict[str, Tensor]:
        end = min(self.starts[i] + self.per_shard, len(self.tokens_NT))
        contexts = torch.arange(self.starts[i], end, dtype=torch.int32)
        return {"acts": contexts.repeat_interleave(CONTEXT)[:, None]}

    def size(self, i: int) -> dict[str, float]:
        return {"tokens": len(self.read(i)["acts"]), "square": 0.0}


def same_pairs(batches: list[Tensor]) -> float:
    """Of all pairs of tokens of a batch, the part that is of one context."""
    shared = sum(float((count * (count - 1)).sum()) for batch in batches
                 for count in [torch.unique(batch, return_counts=True)[1]])
    return shared / sum(len(batch) * (len(batch) - 1) for batch in batches)


def streamed(shards: Numbered, window: int) -> list[Tensor]:
    """Batches from all over the first epoch."""
    stream = Stream(shards, window, Reader())
    stream.d_in = 1  # a number is all that an activation has here
    starts = torch.linspace(0, len(stream) - SIZE, STEPS).long().tolist()
    return [stream.take(0, start, SIZE)[:, 0] for start in starts]


class Stored(Numbered):
    """Shards of random activations in files."""

    def __init__(self, folder: Path, shards: int, gigabytes: float):
        super().__init__(SHARD * shards, gigabytes)
        self.folder, self.substrate.compact = folder, lambda x: x.half()
        for i in range(len(self)):
            acts_ND = torch.randn(SHARD, D_IN, generator=randomness("streaming", i)).half()
            write_tensors(folder / f"{i}.safetensors", {"acts": acts_ND})

    def read(self, i: int) -> dict[str, Tensor]:
        return read_tensors(self.folder / f"{i}.safetensors")[0]

    def size(self, i: int) -> dict[str, float]:
        return {"tokens": SHARD, "square": 0.0}


def speed(shards: int = 40, gigabytes: float = 2.0) -> tuple[float, float]:
    """Millions of tokens a second: of shards that are read and checked, and of the stream of one
    domain that is made of them, once its window is full."""
    with tempfile.TemporaryDirectory() as name:
        stored = Stored(Path(name), shards, gigabytes)
        start = time.perf_counter()
        for i in range(len(stored)):
            stored.read(i)
        read = SHARD * shards / (time.perf_counter() - start)
        stream = Stream(stored, window_sizes([stored, stored], gigabytes)[0], Reader())
        stream.take(0, 0, SIZE)
        start = time.perf_counter()
        for place in range(SIZE, len(stream), SIZE):
            stream.take(0, place, SIZE)
        return read / 1e6, len(stream) / (time.perf_counter() - start) / 1e6


def correlation(substrate: Substrate, contexts: int = 64) -> float:
    """Of two tokens of a context: the mean product of their centred activations, in units of their
    mean square."""
    x_NTD = torch.cat([substrate.lm.residual(part)
                       for part in substrate.learn.tokens_NT[:contexts].split(16)]).float()
    keep_NT1 = substrate.is_plain(x_NTD)[..., None]
    z_NTD = (x_NTD - x_NTD[keep_NT1[..., 0]].mean(0)) * keep_NT1
    square_N, n_N = z_NTD.square().sum((1, 2)), keep_NT1.sum((1, 2))
    pairs = (z_NTD.sum(1).square().sum(1) - square_N).sum() / (n_N * (n_N - 1)).sum()
    return float(pairs / (square_N.sum() / n_N.sum()))


def main() -> None:
    rho = correlation(open_substrate())
    line("millions of tokens, of a domain", ("memory, GB", "contexts in the window", "pairs",
                                             "met by a token", f"variance, ρ = {rho:.2f}"))
    line("---", ["---"] * 5)
    for tokens in TOKENS:
        for gigabytes in GIGABYTES:
            shards = Numbered(tokens, gigabytes)
            window, _ = window_sizes([shards, shards], gigabytes)
            tell(tokens, f"{gigabytes:g}", window * shards.per_shard,
                 same_pairs(streamed(shards, window)), rho)
        tell(tokens, "all shuffled", tokens // CONTEXT, (CONTEXT - 1) / (tokens - 1), rho)
    line("D", ("shards read, millions of tokens a second", "stream of one domain"))
    line("---", ["---"] * 2)
    line(str(D_IN), (f"{rate:.2f}" for rate in speed()))


def tell(tokens: int, memory: str, contexts: int, pairs: float, rho: float) -> None:
    met = pairs * (SIZE - 1)
    line(f"{tokens / 1e6:g}", (memory, f"{contexts:,}", f"{pairs:.1e}", f"{met:.3f}",
                               f"{1 + met * rho:.3f}"))


if __name__ == "__main__":
    main()
