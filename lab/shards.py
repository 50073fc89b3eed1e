"""Training activations in shards: made by the language model, kept where the disk holds them, mixed
through a window where memory does not, read before they are asked for."""

import bisect
import functools
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from lab.console import UserError, progress, report
from lab.storage import code_digest, randomness, read_tensors
from lab.substrates import Substrate
from lab.substrates.texts import NAMED, RETAIN

BYTES = 2  # a number in half precision
ROUNDS = 2  # of a domain that are in memory: one is used while the next is made
AT_LEAST = 32  # shards that memory has room for; they are made smaller where it has not
OF_FREE_DISK = 0.9  # so much of it may be filled with activations
SEARCHED = 10  # times a sample's size, the tokens that are read for it at most


class Stopped(Exception):
    """What is read ahead is not wanted any more."""


def residual_shard(substrate: Substrate, tokens_NT: Tensor, domain_N: Tensor,
                   check: Callable[[], None], rows: int = 16) -> dict[str, Tensor]:
    """Residuals of contexts as one list of tokens, attention sinks left out, with domains.

    `check` is called now and then; what it raises ends the work.
    """
    parts = []
    for part in tokens_NT.split(rows):
        check()
        parts.append(substrate.lm.residual(part))
    x_NTD = torch.cat(parts)
    if not bool(torch.isfinite(x_NTD).all()):
        raise UserError("the language model gives residuals that are not finite")
    keep = substrate.is_plain(x_NTD).cpu()
    domain_NT = domain_N[:, None].expand_as(keep)
    return {"acts": substrate.compact(x_NTD[keep]).cpu(), "domain": domain_NT[keep]}


class Shards:
    """Residuals of learn text, cut into shards of as many contexts each.

    They are of all learn contexts, or of the forget or the retain ones, in the order of `learn`.
    That order is random, so each shard is a random sample of its contexts. A shard is a file of the
    cache; or, with `kept` False, it is made anew to the same bits whenever it is asked for.
    """

    def __init__(self, substrate: Substrate, shard_tokens: int, domain: int | None = None):
        tokens_NT, domain_N = substrate.learn
        self.substrate, self.domain, self.kept = substrate, domain, True
        self.check: Callable[[], None] = lambda: None  # may end what is being made
        chosen = slice(None) if domain is None else domain_N.clamp(max=RETAIN) == domain
        self.tokens_NT, self.domain_N = tokens_NT[chosen], domain_N[chosen]
        self.per_shard = max(1, shard_tokens // tokens_NT.shape[1])
        self.starts = range(0, len(self.tokens_NT), self.per_shard)
        self.causes = (substrate.learn.checksum(), substrate.sink_norm, self.per_shard,
                       code_digest(Shards, Substrate))

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def n_bytes(self) -> int:
        return BYTES * self.substrate.source.d_in * self.tokens_NT.numel()

    def name(self, i: int) -> str:
        return f"activations/{'' if self.domain is None else f'{NAMED[self.domain]}-'}{i:04d}"

    def read(self, i: int) -> dict[str, Tensor]:
        """`acts` [N, D] in half precision and `domain` [N] of the i-th shard."""
        self.check()
        causes = *self.causes, self.starts[i]
        if self.kept:
            return self.substrate.cached(self.name(i), lambda: (self.make(i), None), *causes)[0]
        kept = read_tensors(self.substrate.cached_path(self.name(i), *causes))
        return kept[0] if kept else self.make(i)

    def make(self, i: int) -> dict[str, Tensor]:
        part = slice(self.starts[i], self.starts[i] + self.per_shard)
        return residual_shard(self.substrate, self.tokens_NT[part], self.domain_N[part],
                              self.check)

    def size(self, i: int) -> dict[str, Any]:
        """How many tokens the i-th shard has, and the sum of their squared norms. It is kept by
        itself, so that a run that goes on need not read all shards."""
        return self.substrate.cached(f"{self.name(i)}-size", lambda: ({}, measure(self.read(i))),
                                     *self.causes, self.starts[i])[1]

    def fit_in(self, gigabytes: float) -> bool:
        return self.n_bytes <= 1e9 * gigabytes

    def all(self) -> Iterator[dict[str, Tensor]]:
        """Every shard, made as it is asked for."""
        keep_if_disk_holds([self])
        return self.each(self.read)

    def each(self, work: Callable[[int], Any]) -> Iterator[Any]:
        """`work(i)` for every shard. Each of several processes first does a share of its own, and
        finds the others' in the cache."""
        everything, processes = range(len(self)), self.substrate.processes
        if processes.size > 1:
            for i in progress(everything[processes.rank :: processes.size], "activation shards"):
                work(i)
            processes.wait()
        return (work(i) for i in progress(everything, "activation shards"))

    def lacking(self) -> int:
        """Bytes of the shards that the cache does not hold yet."""
        there = sum(self.substrate.cached_path(self.name(i), *self.causes, start).exists()
                    for i, start in enumerate(self.starts))
        return self.n_bytes * (len(self) - there) // len(self)


def measure(shard: dict[str, Tensor]) -> dict[str, Any]:
    norm_N = torch.linalg.vector_norm(shard["acts"], dim=1, dtype=torch.float32)
    return {"tokens": len(norm_N), "square": float(norm_N.double().square().sum())}


def gathered(shards: Iterable[dict[str, Tensor]], room: int) -> tuple[Tensor, Tensor, float]:
    """Activations [N, D] and domains [N] of all shards, and the sum of squared norms.

    They are of at most `room` tokens. Shards may be made as they are asked for: one is copied and
    let go before the one after the next is made.
    """
    square, n, domains = 0.0, 0, []
    for shard in shards:
        x_ND = shard["acts"]
        if not domains:
            acts_ND = torch.empty(room, x_ND.shape[1], dtype=x_ND.dtype)
        acts_ND[n : n + len(x_ND)] = x_ND
        square += measure(shard)["square"]
        n += len(x_ND)
        domains.append(shard["domain"])
    return acts_ND[:n], torch.cat(domains), square


def keep_if_disk_holds(shards: Sequence[Shards]) -> None:
    """Where the cache's disk has no room for the shards that it lacks, none is written; this is
    said in one line."""
    cache = shards[0].substrate.cache
    cache.root.mkdir(parents=True, exist_ok=True)
    need, free = sum(part.lacking() for part in shards), shutil.disk_usage(cache.root).free
    if need > OF_FREE_DISK * free:
        for part in shards:
            part.kept = False
        report(f"activations need {need / 1e9:.3g} GB and {cache.root} has {free / 1e9:.3g} GB "
               "free: they are made whenever they are needed and not written")


def smaller_shards(tokens: int, context: int, room: float) -> int:
    """Tokens of a shard so that memory with room for `room` tokens holds enough of them: `tokens`,
    or a half, a quarter and so on, down to a context."""
    while tokens > context and AT_LEAST * tokens > room:
        tokens //= 2
    return tokens


def window_sizes(parts: Sequence[Shards], gigabytes: float) -> list[int]:
    """How many shards of each of two domains are mixed at a time in this much memory, beside the
    rounds that are made of them: half of what there is room for, or all shards of a domain.

    Raises UserError where there is no room for one of each.
    """
    one = BYTES * parts[0].substrate.source.d_in * (
        parts[0].per_shard * parts[0].tokens_NT.shape[1])
    least = len(parts) * (1 + ROUNDS)
    room = int(1e9 * gigabytes // one) - len(parts) * ROUNDS
    if room < len(parts):
        raise UserError(f"buffer_gigabytes={gigabytes:g} in RUNS, BUDGETS or CustomSAEConfig is "
                        f"too little to train with; use at least {least * one / 1e9:.2g} GB, and "
                        "more to mix well")
    first, second = map(len, parts)
    first = min(first, max(room // 2, room - second))
    return [first, min(second, room - first)]


class Reader:
    """A thread that makes things, each before it is asked for. All that make them with the language
    model share one, as that is no two threads' at a time."""

    def __init__(self) -> None:
        self.thread, self.stopped = ThreadPoolExecutor(1), False
        self.pending: dict[tuple, Future] = {}

    def begin(self, work: Callable[..., Any], *arguments: Any) -> None:
        key = (work, *arguments)
        if key not in self.pending:
            self.pending[key] = self.thread.submit(work, *arguments)

    def result(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` gives. Other things that it has begun are let go; an error, or a signal that
        ends the wait, ends all that is begun."""
        key = (work, *arguments)
        for other in [one for one in self.pending if one[0] == work and one != key]:
            self.pending.pop(other).cancel()
        self.begin(*key)
        try:
            made = self.pending[key].result()
        except BaseException:
            self.settle()
            raise
        del self.pending[key]
        return made

    def settle(self) -> None:
        """End what is begun, and wait for its end."""
        self.stopped = True
        wait([one for one in self.pending.values() if not one.cancel()])
        self.pending, self.stopped = {}, False

    def check(self) -> None:
        """Raise Stopped in work that is not wanted any more."""
        if self.stopped:
            raise Stopped


class Stream:
    """The tokens of a domain's shards in an order that is mixed by a window moving over them.

    A seed puts the n shards into a ring in an order of its own. Round r of an epoch sees the
    `window` shards from the r-th on. Every epoch cuts each shard into as many random parts as there
    are shards in the window; a round takes one part of each, from the newest its first, from the
    oldest its last. So a round has about as many tokens as a shard, an epoch of n rounds uses every
    token once, and from one round to the next one shard is read. All depends on seed and place
    alone. Of several processes each reads shards of its own, and they give each other the rounds.
    """

    def __init__(self, shards: Shards, window: int, reader: Reader):
        self.shards, self.window, self.processes = shards, window, shards.substrate.processes
        self.d_in, self.layout = shards.substrate.source.d_in, (shards.per_shard, window)
        sizes = list(shards.each(shards.size))
        self.tokens = [size["tokens"] for size in sizes]
        self.square = sum(size["square"] for size in sizes)
        self.dtype = shards.substrate.compact(torch.zeros(0)).dtype
        # shards, of the thread that makes rounds and no other
        self.held: dict[int, dict[str, Tensor]] = {}
        self.reader, shards.check = reader, reader.check
        self.now: tuple[Any, tuple[Tensor, Tensor]] | None = None
        self.ring = functools.lru_cache(maxsize=2)(self.laid_out)
        self.cut = functools.lru_cache(maxsize=2 * window)(self.shuffled)

    def __len__(self) -> int:
        return sum(self.tokens)

    def take(self, seed: int, start: int, n: int) -> tuple[Tensor, Tensor]:
        """Raw activations [n, D] and domains [n] from the `start`-th token on. All processes ask
        for the same."""
        pieces = [(torch.zeros(0, self.d_in, dtype=self.dtype), torch.zeros(0, dtype=torch.uint8))]
        while n:
            (epoch, place), starts = divmod(start, len(self)), self.ring(seed)[1]
            r = bisect.bisect_right(starts, place) - 1
            block = self.block(seed, epoch * len(self.shards) + r)
            pieces.append(tuple(part[place - starts[r] :][:n].clone() for part in block))
            start, n = start + len(pieces[-1][1]), n - len(pieces[-1][1])
        return tuple(map(torch.cat, zip(*pieces)))

    def block(self, seed: int, number: int) -> tuple[Tensor, Tensor]:
        """All tokens of a round, in their order, with domains; rounds are numbered on over
        epochs."""
        if self.now is None or self.now[0] != (seed, number):
            self.now = None
            block_SD, domain_S = self.reader.result(self.round, seed, number)
            self.reader.begin(self.round, seed, number + 1)
            self.processes.sum_(block_SD.view(torch.int32))  # bits, as all others have zeros
            self.processes.sum_(domain_S)
            self.now = (seed, number), (block_SD, domain_S)
        return self.now[1]

    def laid_out(self, seed: int) -> tuple[list[int], list[int]]:
        """The order of the shards, and where in an epoch each round starts; last, its end."""
        order = torch.randperm(len(self.shards),
                               generator=randomness("shards", seed, self.shards.domain)).tolist()
        sizes = [sum(end - start for _, start, end in self.parts(order, r))
                 for r in range(len(order))]
        return order, [0, *itertools.accumulate(sizes)]

    def parts(self, order: list[int], r: int) -> list[tuple[int, int, int]]:
        """What round r takes: shard, and where in it the part starts and ends."""
        K, found = self.window, []
        for k in range(K):
            i = order[(r + k) % len(order)]
            found.append((i, self.tokens[i] * (K - 1 - k) // K, self.tokens[i] * (K - k) // K))
        return found

    def shuffled(self, seed: int, epoch: int, i: int) -> Tensor:
        """Places of a shard's tokens, which an epoch cuts into parts."""
        order = randomness("parts", seed, self.shards.domain, epoch, i)
        return torch.randperm(self.tokens[i], generator=order)

    def round(self, seed: int, number: int) -> tuple[Tensor, Tensor]:
        """This process's tokens of a round at their places [S, D] and their domains [S], zeros at
        those of the others."""
        (epoch, r), (order, starts) = divmod(number, len(self.shards)), self.ring(seed)
        parts = self.parts(order, r)
        self.held = {i: self.held[i] for i, _, _ in parts if i in self.held}
        block_SD = torch.zeros(starts[r + 1] - starts[r], self.d_in, dtype=self.dtype)
        domain_S = torch.zeros(len(block_SD), dtype=torch.uint8)
        place_S = torch.randperm(len(block_SD), generator=randomness(
            "round", seed, self.shards.domain, number))
        end = 0
        for i, first, last in parts:
            begin, end = end, end + last - first
            if i % self.processes.size == self.processes.rank:
                if i not in self.held:
                    self.held[i] = self.shards.read(i)
                chosen = self.cut(seed, epoch, i)[first:last]
                for whole, part in ((block_SD, "acts"), (domain_S, "domain")):
                    whole.index_copy_(0, place_S[begin:end],
                                      self.held[i][part].index_select(0, chosen))
        return block_SD, domain_S

    def sample(self, domain: int, size: int) -> Tensor:
        """Up to `size` raw activations of a domain, always the same ones: of the first shards, of
        a rare domain from at most SEARCHED times as many tokens."""
        parts, read = [torch.zeros(0, self.d_in, dtype=self.dtype)], 0
        for i in range(len(self.shards)) if (self.shards.domain_N == domain).any() else ():
            if sum(map(len, parts)) < size and read < SEARCHED * size:
                shard = self.reader.result(self.shards.read, i)
                parts.append(shard["acts"][shard["domain"] == domain])
                read += len(shard["acts"])
        x_ND = torch.cat(parts)
        order = randomness("sample", domain)
        return x_ND[torch.randperm(len(x_ND), generator=order)[:size]].float()

    def let_go(self) -> None:
        """Hold nothing in memory, and read nothing ahead until more is asked for."""
        self.reader.settle()
        self.held, self.now = {}, None


def open_streams(substrate: Substrate, shard_tokens: int, gigabytes: float) -> list[Stream]:
    """The forget and the retain tokens of learn text, with windows that fit in this much memory."""
    room = 1e9 * gigabytes / (BYTES * substrate.source.d_in)
    smaller = smaller_shards(shard_tokens, substrate.learn.tokens_NT.shape[1], room)
    parts = [Shards(substrate, smaller, domain) for domain in range(len(NAMED))]
    windows = window_sizes(parts, gigabytes)
    keep_if_disk_holds(parts)
    reader = Reader()
    return [Stream(part, window, reader) for part, window in zip(parts, windows)]
