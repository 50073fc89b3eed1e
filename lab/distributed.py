"""The processes of a torchrun, which train one SAE together, and the signals that end them."""

import atexit
import contextlib
import ctypes
import datetime
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from lab import console
from lab.console import UserError

PATIENCE = 10.0  # seconds for which a process that ends waits for the others


def place_in_team() -> tuple[int, int, int]:
    """RANK, LOCAL_RANK and WORLD_SIZE as torchrun sets them; (0, 0, 1) where none is set.

    Raises UserError where they are set in part or make no sense.
    """
    texts = {name: os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    shown = ", ".join(f"{name}={text!r}" for name, text in texts.items())
    cure = "start several processes with torchrun, or unset all three for a single one"
    try:
        size = int(texts["WORLD_SIZE"] or 1)
        rank = int(texts["RANK"] or 0)
        local = int(texts["LOCAL_RANK"] or rank)
    except ValueError:
        raise UserError(f"{shown}: not all are whole numbers; {cure}") from None
    together = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    for sound, wrong in ((size >= 1, "WORLD_SIZE must be at least 1"),
                         (0 <= rank < size, f"RANK must be from 0 to {size - 1}"),
                         (local >= 0, "LOCAL_RANK must be at least 0"),
                         (texts["RANK"] or size == 1, "RANK is not set"),
                         (together or size == 1, "MASTER_ADDR or MASTER_PORT is not set")):
        if not sound:
            raise UserError(f"{shown}: {wrong}; {cure}")
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
        self.device = own_device(local)
        if self.size > 1 and not dist.is_initialized():
            try:
                dist.init_process_group("gloo" if self.device.type == "cpu" else
                                        "cpu:gloo,cuda:nccl",
                                        timeout=datetime.timedelta(hours=12))  # of evaluations, too
            except (RuntimeError, ValueError) as error:
                place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise UserError(f"process {self.rank} of {self.size} does not reach the others at "
                                f"{place} ({one_line(error)}); start them with torchrun") from error
            atexit.register(leave_team)

    def share(self, n: int) -> slice:
        """This process's part of `n` rows, which the number of processes must divide."""
        each = n // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum_(self, part: Tensor) -> Tensor:
        return self.together(dist.all_reduce, part)

    def same_(self, part: Tensor) -> Tensor:
        """What the first process has."""
        return self.together(dist.broadcast, part, src=0)

    def gathered(self, part: Tensor) -> Tensor:
        """What all have, one after the other; each must have as many rows."""
        whole = part.new_zeros(len(part) * self.size, *part.shape[1:])
        whole[self.share(len(whole))] = part
        return self.sum_(whole)

    def own(self, whole: Tensor) -> Tensor:
        """This process's part of what was gathered, from as many processes or others."""
        return whole[self.share(len(whole))]

    def wait(self) -> None:
        self.sum_(torch.zeros(1))

    def together(self, operation: Callable, part: Tensor, **options: Any) -> Tensor:
        if self.size > 1:
            try:
                operation(part, **options)
            except RuntimeError as error:
                raise UserError(f"process {self.rank} of {self.size} lost another one "
                                f"({one_line(error)})") from error
        return part


def own_device(local: int) -> torch.device:
    """The GPU of this process, where there are any. Raises UserError where there are too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= (n := torch.cuda.device_count()):
        raise UserError(f"LOCAL_RANK={local}, but this machine has {n} GPU{'s' if n > 1 else ''}; "
                        f"start at most {n} process{'es' if n > 1 else ''} on it")
    return torch.device("cuda", local)


def leave_team() -> None:
    """Close the connections, as torch's threads else abort a finished process now and then."""

    def leave() -> None:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    thread = threading.Thread(target=leave, daemon=True)  # it may wait for ever for the others
    thread.start()
    thread.join(PATIENCE)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def report_error(text: str) -> None:
    """The one line with which a run ends, by the first process that has this to tell."""
    if is_first_to_tell(text):
        console.report_error(text)


def is_first_to_tell(text: str) -> bool:
    """Whether no other process of a torchrun has told this; where that is unknown, it has not."""
    if not dist.is_initialized():
        return True
    with contextlib.suppress(RuntimeError, ValueError):  # nobody is there to ask any more
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              timeout=datetime.timedelta(seconds=PATIENCE),
                              wait_for_workers=False)
        return store.add(f"told: {text}", 1) == 1
    return True


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


class Outcome:
    """How a block of the program ends, as the exit `code`: 0; 1 after an error that a user can
    mend, told in one line; 128 and the signal's number after a signal, with a line that says that
    the command `again` continues. Other errors pass, with their traceback."""

    def __init__(self, again: str):
        self.again, self.code, self.interrupts = again, 0, Interrupts()

    def __enter__(self) -> "Outcome":
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _place: Any) -> bool:
        if isinstance(error, Interrupts.Stop):
            self.interrupts.waits = True  # a second signal must not cut the farewell short
            console.report(f"stopped; {self.again} continues where this left off")
            self.code = 128 + self.interrupts.signal
        elif isinstance(error, UserError | SafetensorError):  # transformers writes the model itself
            report_error(str(error))
            self.code = 1
        elif isinstance(error, OSError):
            report_error(f"{error.strerror or error}: {error.filename or ''}")
            self.code = 1
        return bool(self.code)


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
