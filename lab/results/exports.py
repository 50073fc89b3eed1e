"""The SAE as SAELens and dictionary_learning load it."""

import io
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lab.storage import to_json, write_atomically, write_text
from lab.substrates.pythia import Pythia
from lab.substrates.standin import Standin

CustomSAEConfig = TrainedSAE = Any


def export_sae(trained: TrainedSAE, folder: Path, substrate: Standin | Pythia,
               trainer: dict[str, Any]) -> None:
    """The SAE for raw activations in SAELens' and dictionary_learning's layouts."""
    raw = trained.sae.raw_weights(trained.scale)
    sae_lens = {
        "architecture": "standard", "d_in": trained.sae.d_in, "d_sae": trained.sae.d_sae,
        "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.18.0", "sae_lens_training_version": None,
            "model_name": substrate.model_name, "hook_name": hook_name(substrate),
            "hook_head_index": None, "context_size": trainer["context_length"],
            "dataset_path": substrate.name, "prepend_bos": False, "alpha": trainer["alpha"],
            "orthogonality": trainer["orthogonality"],
        },
    }
    write_atomically(folder / "sae_lens" / "sae_weights.safetensors", safetensors.torch.save(raw))
    write_text(folder / "sae_lens" / "cfg.json", to_json(sae_lens, 2))
    weights = {"bias": raw["b_dec"], "encoder.weight": raw["W_enc"].T.contiguous(),
               "encoder.bias": raw["b_enc"], "decoder.weight": raw["W_dec"].T.contiguous()}
    learning = {"trainer": {
        "dict_class": "AutoEncoder", "trainer_class": "StandardTrainer",
        "activation_dim": trained.sae.d_in, "dict_size": trained.sae.d_sae,
        "lr": trainer["learning_rate"], "l1_penalty": trainer["sparsity_penalty"],
        "warmup_steps": trainer["warmup_steps"], "steps": trainer["steps"],
        "seed": trainer["seed"], "device": "cpu", "layer": substrate.layer,
        "lm_name": substrate.model_name, "submodule_name": f"resid_post_layer_{substrate.layer}",
        "wandb_name": None, "alpha": trainer["alpha"]},
        "buffer": {"d_submodule": trained.sae.d_in, "ctx_len": trainer["context_length"]}}
    inside = folder / "dictionary_learning" / "trainer_0"
    pickled = io.BytesIO()
    torch.save(weights, pickled)
    write_atomically(inside / "ae.pt", pickled.getvalue())
    write_text(inside / "config.json", to_json(learning, 2))


def hook_name(substrate: Standin | Pythia) -> str:
    return f"blocks.{substrate.layer}.hook_resid_post"


def sae_cfg_dict(config: CustomSAEConfig, substrate: Standin | Pythia, d_in: int) -> dict:
    """The SAE as SAELens describes one."""
    return {
        "model_name": substrate.model_name, "d_in": d_in, "d_sae": config.expansion * d_in,
        "hook_layer": substrate.layer, "hook_name": hook_name(substrate),
        "context_size": config.context_length, "hook_head_index": None,
        "architecture": "standard", "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": None, "activation_fn_str": "relu", "prepend_bos": False,
        "normalize_activations": "none", "dtype": "float32", "device": "cpu",
        "dataset_path": substrate.name, "dataset_trust_remote_code": False,
        "seqpos_slice": [None], "training_tokens": config.steps * config.batch_size,
        "sae_lens_training_version": None, "neuronpedia_id": None,
    }
