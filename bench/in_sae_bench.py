"""SAEBench's side: its own output class on our results, and its core metrics on our export."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from exchange import Replay, answer, differences
from pydantic import TypeAdapter, ValidationError
from sae_bench.evals.core.main import get_sparsity_and_variance_metrics
from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
from sae_lens import SAE


def accepts(info: dict[str, Any]) -> bool:
    try:
        TypeAdapter(SparseProbingEvalOutput).validate_python(info)
    except ValidationError:
        return False
    return True


def validate(request: dict[str, Any]) -> dict[str, Any]:
    """Does the class take each result, with our extra keys; does it still refuse a broken one?"""
    wanted = {field.name for field in dataclasses.fields(SparseProbingEvalOutput)}
    results = {}
    for path in request["paths"]:
        info = json.loads(Path(path).read_text(encoding="utf-8"))
        broken = {**info, "eval_result_metrics": {"llm": {}, "sae": {}}}
        results[path] = {"valid": accepts(info), "missing": sorted(wanted - set(info)),
                         "extra": sorted(set(info) - wanted), "refuses_broken": not accepts(broken)}
    return {"version": version("sae-bench"), "results": results}


@torch.no_grad()
def check(request: dict[str, Any]) -> dict[str, Any]:
    """SAEBench's core metrics of `folder`/sae_lens; it reads hook and layer from `sae.cfg`."""
    sae = SAE.load_from_disk(Path(request["folder"]) / "sae_lens", device="cpu")
    cfg = SimpleNamespace(hook_name=sae.cfg.metadata.hook_name, hook_layer=0,
                          hook_head_index=None, d_sae=sae.cfg.d_sae)
    wrapped = SimpleNamespace(cfg=cfg, device="cpu", encode=sae.encode, decode=sae.decode)
    ours = torch.load(request["ours"])
    replay = Replay(ours["x"], request["batch"], cfg.hook_name)
    metrics, _ = get_sparsity_and_variance_metrics(
        wrapped, replay, replay, n_batches=len(ours["x"]) // request["batch"],
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, eval_batch_size_prompts=1, model_kwargs={},
    )
    f_NF = sae.encode(ours["x"])
    return {"loaded": f"through sae_lens, by sae-bench {version('sae-bench')}",
            "metrics": metrics, **differences(ours, f_NF, sae.decode(f_NF))}


if __name__ == "__main__":
    answer({"check": check, "validate": validate})
