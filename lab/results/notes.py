"""notes.txt, the log of the study: one section a run, between markers."""

import codecs
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.console import report
from lab.storage import Cache, digest, write_atomically

HEADER = """Run log. experiment.py keeps one section a run up to date between its markers.
Everything else in this file is yours and stays.
"""
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le",
                    codecs.BOM_UTF32_BE: "utf-32-be", codecs.BOM_UTF16_LE: "utf-16-le",
                    codecs.BOM_UTF16_BE: "utf-16-be"}
HEADLINES = (  # metric, its name, decimals
    (("l0", "L0", 1), ("explained_variance", "explained variance", 3),
     ("ce_score", "cross-entropy score", 3), ("frac_alive", "alive", 3)),
    (("unlearning_area", "unlearning area in nats", 2), ("unlearning_score", "score", 3),
     ("accuracy_area", "accuracy area", 3)),
    (("kappa_median", "κ median", 2), ("kappa_p90", "90th percentile", 1),
     ("sae_top_5_test_accuracy", "probe k = 5", 3), ("sae_test_accuracy", "all", 3)),
)


def headline(info: Mapping[str, Any], key: str, name: str, decimals: int) -> str:
    """For example "L0 40.2 ± 0.1"."""
    mean, stderr = info["means"].get(key), info["stderrs"].get(key)
    if mean is None:
        return f"{name} undefined"
    return f"{name} {mean:.{decimals}f}" + (
        f" ± {stderr:.{decimals}f}" if stderr is not None else "")


def summary(info: Mapping[str, Any]) -> list[str]:
    """What a run found, in three lines."""
    lines = [", ".join(headline(info, *item) for item in items) for items in HEADLINES]
    gap = info["comparisons"].get("run_8", {}).get("unlearning_area", {})
    if gap.get("low") is not None:
        lines[1] += (f"; area minus run_8 {gap['difference']:+.2f} "
                     f"({gap['low']:.2f} to {gap['high']:.2f})")
    lines[1] += "".join(f"; {remark}" for remark in (coverage(info), yardstick(info)) if remark)
    return lines


def coverage(info: Mapping[str, Any]) -> str:
    """On how many tokens the clamps of the area act, for example "clamps on 31 % of forget and at
    most 0.5 % of other tokens"; nothing where it is undefined."""
    parts = {name.removeprefix("coverage_"): mean for name, mean in info["means"].items()
             if name.startswith("coverage_")}
    forget, others = parts.pop("forget", None), parts.values()
    if forget is None or not others or None in others:
        return ""
    return (f"clamps on {100 * forget:.3g} % of forget and at most {100 * max(others):.3g} % of "
            "other tokens")


def yardstick(info: Mapping[str, Any]) -> str:
    """The larger area of the directions that labels give without an SAE."""
    areas = [part["unlearning_area"] for part in info.get("yardstick", {}).values()
             if part.get("unlearning_area") is not None]
    return f"by labels alone {max(areas):.2f}" if areas else ""


def describe(config: Mapping[str, Any]) -> str:
    """The row in words: what keeps features apart, how strongly, and what keeps them sparse."""
    words = [config["orthogonality"], f"α {config['alpha']:g}"]
    if config["activation"] == "batch_topk":
        words.append("BatchTopK")
    if config["orthogonality"] == "adaptive":
        words += [f"η {config['eta']:g}", f"regrouped every {config['regroup_every']} steps"]
    return ", ".join(words)


def update_notes(path: Path, info: Mapping[str, Any], cache: Cache) -> None:
    """Replace the run's section of notes.txt, or add it; what people wrote outside stays.

    A file that cannot be read or may not be written is left as it is, with one line that says so:
    it costs no result.
    """
    try:
        with cache.lock(f"notes-{digest(str(path.resolve()))}"):
            content = path.read_bytes() if path.exists() else HEADER.encode()
            write_atomically(path, with_section(content, info))
    except (OSError, UnicodeError) as error:
        report(f"{path} stays as it is: {getattr(error, 'strerror', '') or error}")


def with_section(content: bytes, info: Mapping[str, Any]) -> bytes:
    """Notes with the run's section, in the encoding in which they are.

    A section that lost its end stays too, as it cannot be told from a person's text.
    """
    run, config = info["run"], info["config"]
    begin, end = f"=== {run} (written by experiment.py) ===", f"=== end of {run} ==="
    seeds = " ".join(str(seed) for seed in config["seeds"])
    section = "\n".join([begin, f"{config['purpose']}: {describe(config)}; {info['substrate']}, "
                         f"{info['budget']}, seeds {seeds}", *summary(info), end, ""])
    mark = next((mark for mark in BYTE_ORDER_MARKS if content.startswith(mark)), b"")
    encoding = BYTE_ORDER_MARKS.get(mark, "utf-8")
    # surrogateescape: bytes of another encoding that is like ASCII come back as they were
    errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
    text = content[len(mark):].decode(encoding, errors)
    pattern = rf"{re.escape(begin)}(?:(?!=== run_\d+ \(written).)*?{re.escape(end)}\r?\n?"
    text, replaced = re.subn(pattern, lambda _: section, text, count=1, flags=re.S)
    if not replaced:
        text += ("\n" if text.endswith("\n") else "\n\n") + section
    return mark + text.encode(encoding, errors)
