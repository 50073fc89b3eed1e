"""What both sides of a comparison share: how a peer is asked, and what it is given.

Each peer runs in its own environment (peers.sh) as a subprocess: a script `in_<peer>.py` gets one
JSON request and prints one JSON answer as its last line. Imports nothing but torch.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent


def peer_python(peer: str) -> Path:
    folder = Path(os.environ.get("SAE_PEERS", BENCH.parent / ".cache" / "peers"))
    return folder.resolve() / peer / "bin" / "python"


def ask(script: str, python: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of `script` run by `python`; its error in full if it has none.

    SAE_BENCH_PREFIX, if set, is a command put before it: a lock on a machine that others use.
    """
    prefix = os.environ.get("SAE_BENCH_PREFIX", "").split()
    command = [*prefix, str(python), str(BENCH / script), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ask_peer(peer: str, request: dict[str, Any]) -> dict[str, Any]:
    if not peer_python(peer).exists():
        raise SystemExit(f"{peer_python(peer)} is missing; bash bench/peers.sh makes it")
    return ask(f"in_{peer}.py", peer_python(peer), request)


def answer(tasks: dict[str, Any]) -> None:
    """Run the task that the request names and print what it returns."""
    importlib.import_module("torch._dynamo")  # torch.optim does at first use; start-up is not timed
    request = json.loads(sys.argv[1])
    print(json.dumps(tasks[request["task"]](request)))


def text_inputs(request: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Texts and tokenizer of the request's folder; the threads that it asks for are set."""
    from transformers import PreTrainedTokenizerFast  # a check of exports needs none

    folder = Path(request["folder"])
    torch.set_num_threads(request["threads"])
    return json.loads((folder / "texts.json").read_text()), PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), **request["special"])


def differences(ours: dict[str, torch.Tensor], f_NF: torch.Tensor,
                x_hat_ND: torch.Tensor) -> dict[str, float]:
    """Largest absolute differences of features and reconstruction, relative to the activations'
    scale sqrt(mean ‖x‖²); and how many features are on for one side only."""
    scale = float(ours["x"].double().square().sum(1).mean().sqrt())
    return {
        "scale": scale,
        "features": float((f_NF - ours["f"]).abs().max()) / scale,
        "reconstruction": float((x_hat_ND - ours["x_hat"]).abs().max()) / scale,
        "on_for_one_side_only": int(((f_NF > 0) != (ours["f"] > 0)).sum()),
        "entries_on": int((ours["f"] > 0).sum()),
    }


class Replay:
    """Language model and activation store in one, for evaluations that insist on both: gives
    stored activations, `batch` tokens at a time, as one context."""

    def __init__(self, x_ND: torch.Tensor, batch: int, hook_name: str):
        self.parts: Iterator[torch.Tensor] = iter(x_ND.split(batch))
        self.batch, self.hook_name = batch, hook_name

    def get_batch_tokens(self, *_: Any) -> torch.Tensor:
        return torch.zeros(1, self.batch, dtype=torch.long)

    def run_with_cache(self, *_: Any, **__: Any) -> tuple[None, dict[str, torch.Tensor]]:
        return None, {self.hook_name: next(self.parts)[None]}
