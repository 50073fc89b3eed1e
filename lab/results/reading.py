"""Clean numbers out of results that anybody may have edited."""

import math

import numpy as np


def number(value: object) -> float:
    """A finite float of sane size; NaN for anything else that JSON can hold."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and abs(value) <= 1e30 else math.nan


def dig(block: object, *path: str) -> object:
    """What lies at this path of nested dicts, None if nothing does."""
    for key in path:
        block = block.get(key) if isinstance(block, dict) else None
    return block


def dicts(block: object, *path: str) -> list[dict]:
    """The dicts in the list that lies at this path, none if there is no such list."""
    items = dig(block, *path)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def numbers(rows: list[dict], *keys: str) -> np.ndarray:
    """The numbers at these keys, [row, key]."""
    return np.array([[number(row.get(key)) for key in keys] for row in rows]).reshape(-1, len(keys))
