"""What the features that unlearning clamps stand for: the contexts in which they fire most.

    python bench/top_features.py run_8 run_2 > clamped.md       # finished runs; their first seed

A table a run, in Markdown. Its rows are the first features of the looser threshold's list, which is
the order in which unlearning takes them: most frequent on forget text's learn half first. Columns
are the share of held-out tokens of each text on which a feature fires, and the places where it
fires most, one a context. Its token is in brackets; ¶ is where a text begins. A reader should see
the knowledge that is to go, and nothing else. Environment variables and cache are those of
experiment.py.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from controls import open_substrate

from lab.evaluations.heldout import HeldOut
from lab.results.final_info import read_result
from lab.sparse import ExportedSAE

FEATURES, EXAMPLES, AROUND = 10, 3, 8


def examples(f_CT: torch.Tensor, tokens_CT: torch.Tensor, tokenizer: Any) -> list[str]:
    """Where a feature fires most, one place a context."""
    strength_C, place_C = f_CT.max(dim=1)
    lines = []
    for context in strength_C.topk(EXAMPLES).indices.tolist():
        at, ids = int(place_C[context]), tokens_CT[context].tolist()
        before, after = ids[max(0, at - AROUND) : at], ids[at + 1 : at + 1 + AROUND]
        text = f"{tokenizer.decode(before)}[{tokenizer.decode(ids[at])}]{tokenizer.decode(after)}"
        lines.append(" ".join(text.split()))
    return lines


@torch.no_grad()
def show(run: Path, heldout: HeldOut) -> None:
    if (info := read_result(run)) is None:
        sys.exit(f"error: {run} holds no finished run")
    weights = run / f"seed_{info['seeds'][0]['seed']}" / "sae_lens" / "sae_weights.safetensors"
    if not weights.exists():
        sys.exit(f"error: {weights} is missing; a run writes it, the committed study has none")
    selected = info["unlearning"]["per_seed"][0]["selected"]  # by threshold
    chosen = selected[max(selected, key=float)][:FEATURES]
    sae = ExportedSAE.of(load_file(weights))
    f_CTN = sae.encode(heldout["x"].float(), chosen) * heldout["keep"][..., None]
    domains, lm = heldout.substrate.domains, heldout.substrate.lm
    new_text = lm.tokenizer.decode([lm.separator])
    print(f"\n## {run.name}: {info['config']['purpose']}\n")
    print("| feature |", " | ".join(domains), "| where it fires most |")
    print("|---" * (len(domains) + 2) + "|")
    for n, feature in enumerate(chosen):
        f_CT = f_CTN[..., n]
        rates = [float((f_CT[heldout["domain"] == k] > 0).float().mean())
                 for k in range(len(domains))]
        places = [place.replace(new_text, " ¶ ").replace("|", "\\|")
                  for place in examples(f_CT, heldout["tokens"], lm.tokenizer)]
        print(f"| {feature} |", " | ".join(f"{100 * rate:.2f} %" for rate in rates),
              "|", "<br>".join(places), "|")


if __name__ == "__main__":
    shared = HeldOut(open_substrate())
    for name in sys.argv[1:]:
        show(Path(name), shared)
