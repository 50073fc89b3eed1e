"""SAELens' side: loads our export, applies its own metrics, and trains from text to SAE."""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from exchange import Replay, answer, differences, text_inputs
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
    __version__,
)
from sae_lens.evals import get_sparsity_and_variance_metrics
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from transformers import AutoModelForCausalLM


@torch.no_grad()
def check(request: dict[str, Any]) -> dict[str, Any]:
    """Load `folder`/sae_lens; compare with ours on the same activations; SAELens' metrics."""
    sae = SAE.load_from_disk(Path(request["folder"]) / "sae_lens", device="cpu")
    ours = torch.load(request["ours"])
    f_NF = sae.encode(ours["x"])
    replay = Replay(ours["x"], request["batch"], sae.cfg.metadata.hook_name)
    metrics, _ = get_sparsity_and_variance_metrics(
        sae, replay, replay, ActivationScaler(), n_batches=len(ours["x"]) // request["batch"],
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, eval_batch_size_prompts=1, model_kwargs={},
    )
    return {"loaded": f"{type(sae).__name__} of sae_lens {__version__}", "metrics": metrics,
            **differences(ours, f_NF, sae.decode(f_NF))}


def pipeline(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds from text in memory to a trained SAE; the language model is loaded before."""
    stored, tokenizer = text_inputs(request)
    network = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32).eval()
    hook = f"gpt_neox.layers.{request['layer']}"
    model = HookedProxyLM(network, tokenizer, hook_names=[hook])
    texts = Dataset.from_dict({"text": stored["texts"]})
    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=request["d_in"], d_sae=request["d_sae"],
                                      l1_coefficient=5.0, normalize_activations="none"),
        hook_name=hook, dataset_path="local", is_dataset_tokenized=False, prepend_bos=False,
        context_size=request["context_length"], training_tokens=request["tokens"],
        train_batch_size_tokens=request["batch_size"], store_batch_size_prompts=request["rows"],
        n_batches_in_buffer=request["buffer_contexts"], lr=1e-3, device="cpu",
        autocast=request["bfloat16"], autocast_lm=request["bfloat16"], checkpoint_path=None,
        output_path=None, verbose=False, logger=LoggingConfig(log_to_wandb=False),
        sequence_separator_token="eos",
    )
    start = time.perf_counter()
    runner = LanguageModelSAETrainingRunner(config, override_dataset=texts, override_model=model)
    sae = runner.run()
    return {"seconds": time.perf_counter() - start, "tokens": request["tokens"],
            "finite": bool(torch.isfinite(sae.W_dec).all())}


if __name__ == "__main__":
    answer({"check": check, "pipeline": pipeline})
