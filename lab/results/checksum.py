"""The checksum of final_info.json: the same for the same results, however a tool re-saves them."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

NOT_CHECKED = ("timing", "datetime_epoch_millis", "sha256")  # differ between equal results


def canonical(value: Any) -> str:
    """Strict JSON in one form. NaN and infinities are null; 2.0 and 2 are the same number.

    Keys are sorted: the order of a JSON object means nothing, and tools that re-save one change it.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: Any) -> Any:
    """The value in JSON's own types, a number with an integral value as an int."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() else value
    return value


def result_checksum(info: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical results without times and without the checksum itself."""
    return hashlib.sha256(canonical(checked(info)).encode()).hexdigest()


def is_unaltered(info: Mapping[str, Any]) -> bool:
    """Whether results are as their run wrote them; true of results that carry no checksum."""
    return "sha256" not in info or info["sha256"] == result_checksum(info)


def checked(info: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the results that the checksum is over."""
    return {key: value for key, value in info.items() if key not in NOT_CHECKED}
