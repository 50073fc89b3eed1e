"""What a person at a terminal, or reading a log, is told: lines, progress, errors."""

import os
import sys
from typing import Any

from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend; `main` prints it as one line and exits non-zero."""


LEADER = int(os.environ.get("RANK", 0)) == 0  # under torchrun the first process speaks for all


def say(text: str) -> None:
    """One line for the person at the terminal, clear of progress bars."""
    if LEADER:
        tqdm.write(text, file=sys.stderr)


def progress(items: Any, what: str, **options: Any) -> tqdm:
    quiet = not (LEADER and sys.stderr.isatty())
    return tqdm(items, desc=what, disable=quiet, leave=False, **options)
