"""What a person at a terminal, or reading a log, is told: lines, progress, one-line errors."""

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

IS_LEADER = os.environ.get("RANK", "") in ("", "0")  # under torchrun the first process speaks
HEARTBEAT = 50.0  # seconds between two lines where there is no terminal: no minute is silent
MEASURED = 20  # steps from which it is told how long all will take


ENVIRONMENT = """environment variables:
  SAE_SUBSTRATE  auto (default) | pythia | standin: language model and text
  SAE_BUDGET     full (default) | smoke: the same code in minutes | paper: for a GPU
  SAE_CACHE_DIR  where downloads, activations and checkpoints are kept (default .cache)
  WANDB_MODE     online | offline | disabled (default: online if signed in, else offline)"""


class UserError(Exception):
    """Something the user can mend; `main` prints it as one line and exits non-zero."""


def report(text: str) -> None:
    """One line on stderr, clear of progress bars."""
    if IS_LEADER and sys.stderr is not None:  # tqdm would take stdout in its place
        with contextlib.suppress(OSError, ValueError):  # a closed stderr ends no run
            tqdm.write(f"{text}\n", file=sys.stderr, end="")  # at once: others write too


def report_error(text: str) -> None:
    """The one line on stderr with which a run ends; every process says its own."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()


def show(lines: list[str]) -> None:
    """The result, on stdout; a stdout that is closed costs no result."""
    with contextlib.suppress(ValueError, AttributeError):
        try:
            print("\n".join(lines), flush=True)
        except OSError:  # or Python complains once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """A command line whose help is text as it was written, and ends quietly if nobody reads it."""

    def __init__(self, description: str, epilog: str):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # κ on an ASCII terminal
        super().__init__(description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def print_help(self, _file: Any = None) -> None:
        show(self.format_help().splitlines())


def at_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def duration(seconds: float) -> str:
    """For example 4 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """How far a piece of long work is: a bar in a terminal, elsewhere a line a minute.

    The line comes from a thread, so that one long step does not keep the log silent.
    """

    open: list["Progress"] = []  # the innermost last

    def __init__(self, what: str, total: int | None = None, done: int = 0, foretold: bool = False):
        self.what, self.total, self.done, self.first = what, total, done, done
        self.start = self.second = time.monotonic()
        self.foretold = foretold  # in one line, soon after the start, if it takes a minute or more
        quiet = not (total and IS_LEADER and at_terminal())  # a bar needs an end
        self.bar = tqdm(desc=what, total=total, initial=done, disable=quiet, leave=False)

    def __enter__(self) -> "Progress":
        Progress.open.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        Progress.open.remove(self)
        self.bar.close()

    def advance(self) -> None:
        self.done += 1
        self.bar.update()
        if self.done == self.first + 1:  # which takes longer than those that follow
            self.second = time.monotonic()
        if self.foretold and self.done == self.first + 1 + MEASURED:
            self.foretell((time.monotonic() - self.second) / MEASURED)

    def foretell(self, seconds: float) -> None:
        left = self.total - self.done
        if seconds * left > HEARTBEAT:
            report(f"{self.what}: {left:,} steps are left, at {1 / seconds:.3g} a second: about "
                   f"{duration(seconds * left)}")

    def show(self, **values: str) -> None:
        self.bar.set_postfix(values)

    def line(self) -> str:
        gone = time.monotonic() - self.start
        if not self.total:
            return f"{self.what}: {duration(gone)} so far"
        steps = self.done - self.first
        left = f", about {duration(gone / steps * (self.total - self.done))} left" if steps else ""
        return f"{self.what}: {self.done} of {self.total} after {duration(gone)}{left}"


def progress(items: Iterable, what: str) -> Iterator:
    """`items`, one after the other, with their progress shown."""
    items = list(items)
    with Progress(what, len(items)) as shown:
        for item in items:
            yield item
            shown.advance()


class Clock:
    """Seconds spent in each phase by this process, with a line at its start and end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str, of: str = "") -> Iterator[None]:
        what = f"{name.replace('_', ' ')}{', ' if of else ''}{of}"
        report(f"{what}: begins")
        start = time.monotonic()
        with Progress(what), heartbeat():
            yield
        gone = time.monotonic() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + gone
        report(f"{what}: done in {duration(gone)}")


@contextlib.contextmanager
def heartbeat() -> Iterator[None]:
    """A line every HEARTBEAT seconds on the innermost work, where no bar shows it."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            for work in Progress.open[-1:]:  # it may have ended just now
                report(work.line())

    if not at_terminal():
        threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        over.set()
