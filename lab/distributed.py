"""The processes of a torchrun, which train one SAE together, and the signals that end them."""

import contextlib
import ctypes
import datetime
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lab.console import UserError


def place_in_team() -> tuple[int, int, int]:
    """RANK, LOCAL_RANK and WORLD_SIZE as torchrun sets them; (0, 0, 1) where none is set.

    Raises UserError where they are set in part or make no sense.
    """
    texts = {name: os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    shown = ", ".join(f"{name}={text!r}" for name, text in texts.items())
    cure = "start several processes with torchrun, or unset all three for a single one"
    try:
        size = int(texts["WORLD_SIZE"] or 1)
        rank = int(texts["RANK"] or ("0" if size == 1 else "unset"))
        local = int(texts["LOCAL_RANK"] or rank)
    except ValueError:
        raise UserError(f"{shown}: not all are whole numbers; {cure}") from None
    if not 0 <= rank < size or local < 0:
        raise UserError(f"{shown}: the rank must be below the size; {cure}")
    if size > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise UserError(f"{shown}, but MASTER_ADDR or MASTER_PORT is not set; {cure}")
    return rank, local, size


class Processes:
    """The processes of a `torchrun`, which train one SAE together; without it, one alone.

    Each works on its share of every batch. Sums are the same everywhere to the last bit, so all
    take the same steps. What is decided on more than sums is decided by the first, who tells the
    others. They must see the same cache. One that dies closes its connections; the others then
    stop with UserError.
    """

    def __init__(self) -> None:
        self.rank, local, self.size = place_in_team()
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo",
                                    timeout=datetime.timedelta(hours=12))  # of evaluations, too

    def share(self, n: int) -> slice:
        """This process's part of `n` rows, which the number of processes must divide."""
        each = n // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum_(self, part: Tensor) -> Tensor:
        return self.together(dist.all_reduce, part)

    def same_(self, part: Tensor) -> Tensor:
        """What the first process has."""
        return self.together(dist.broadcast, part, src=0)

    def wait(self) -> None:
        self.sum_(torch.zeros(1))

    def together(self, operation: Callable, part: Tensor, **options: Any) -> Tensor:
        if self.size > 1:
            try:
                operation(part, **options)
            except RuntimeError as error:
                raise UserError(f"process {self.rank} of {self.size} lost another one "
                                f"({' '.join(str(error).split())[:120]})") from error
        return part


class Interrupts:
    """SIGINT and SIGTERM: at once where nothing can be lost, at the next step in training."""

    class Stop(BaseException):
        """Raised to end the run; not an Exception, so that no handler swallows it."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.waits = False

    def install(self) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.handle)

    def handle(self, number: int, _frame: Any) -> None:
        self.signal = number
        if not self.waits:
            raise Interrupts.Stop

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        if self.signal:  # it came after the last look
            raise Interrupts.Stop


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next use.

    glibc hands every block beyond 32 MB back to the system, which must clear and map its pages
    anew: a wide SAE's weight gradients and products at every step.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt's parameters in malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 2**28)
        mallopt(trim_threshold, 2**30)
