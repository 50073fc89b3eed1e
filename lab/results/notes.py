"""notes.txt, the log of the study: one section a run."""

import re
from pathlib import Path
from typing import Any

from lab.storage import Cache, digest, write_atomically

PURPOSE: dict[str, str] = {}


HEADLINES = (
    ("l0", "L0", "active features a token"), ("explained_variance", "explained variance", ""),
    ("ce_score", "cross-entropy score", ""), ("frac_alive", "fraction alive", ""),
    ("l_dir", "L_dir", "floor 1 - D/F"), ("l_use", "L_use", "0 is separate"),
    ("kappa_median", "κ median", ""), ("kappa_p90", "κ 90th percentile", ""),
    ("kappa_max", "κ max", ""), ("duplicates", "duplicates across domains", "pairs"),
    ("unlearning_area", "unlearning area", "nats, primary"),
    ("unlearning_area_labelled", "area, retain text alone", "nats"),
    ("forget_rise_at_0.05", "forget rise at cost 0.05", "nats"),
    ("unlearning_score", "unlearning score", ""), ("accuracy_area", "accuracy area", ""),
    ("sae_top_1_test_accuracy", "probe k=1", ""), ("sae_top_5_test_accuracy", "probe k=5", ""),
    ("sae_test_accuracy", "probe, all", ""), ("llm_test_accuracy", "probe, residual, all", ""),
)


def summary_table(info: dict[str, Any]) -> str:
    """Means ± standard errors, one a line."""
    lines = []
    for key, name, unit in HEADLINES:
        mean, stderr = info["means"].get(key), info["stderrs"].get(key)
        if mean is not None:
            error = f" ± {stderr:.4f}" if stderr is not None else ""
            lines.append(f"  {name:27s} {mean:9.4f}{error:11s} {unit}".rstrip())
    return "\n".join(lines)


def update_notes(path: Path, run: str, info: dict[str, Any], cache: Cache) -> None:
    """Replace the run's section of notes.txt, or add it; what people wrote outside stays."""
    begin, end = f"=== {run} (written by experiment.py) ===", f"=== end of {run} ==="
    config = info["config"]
    section = (
        f"{begin}\n{PURPOSE[run]}\n"
        f"orthogonality={config['orthogonality']} alpha={config['alpha']} eta={config['eta']} "
        f"regroup_every={config['regroup_every']}; substrate {info['substrate']}, budget "
        f"{info['budget']}, seeds {config['seeds']}\n{summary_table(info)}\n{end}\n"
    )
    with cache.lock(f"notes-{digest(str(path.resolve()))}"):
        # As bytes, because a person's text may be in any encoding. A section that lost its end
        # stays, as it cannot be told from a person's text.
        text = path.read_bytes() if path.exists() else NOTES_HEADER.encode()
        pattern = rf"{re.escape(begin)}(?:(?!=== run_\d+ \(written).)*?{re.escape(end)}\r?\n?"
        text, found = re.subn(pattern.encode(), lambda _: section.encode(), text, count=1,
                              flags=re.S)
        if not found:
            text += (b"\n" if text.endswith(b"\n") else b"\n\n") + section.encode()
        write_atomically(path, text)


NOTES_HEADER = """Run log of the study. experiment.py keeps one section a run up to date between its
markers; everything else in this file is yours and stays.

run_0 is the given baseline: SAEBench's sparse probing of an untrained SAE on gemma-2-2b. Its SAE
accuracies are 0.5, that is chance; it is no competitor. References are run_8 and run_9.
"""
