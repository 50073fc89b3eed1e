"""The SAE as SAELens and dictionary_learning load it."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lab.sparse import ExportedSAE
from lab.storage import to_json, write_atomically, write_text
from lab.substrates.pythia import Pythia
from lab.substrates.standin import Standin

SAE_LENS_VERSION = "6.18.0"  # the version whose `standard` layout this is


def export_sae(sae: ExportedSAE, folder: Path, source: Standin | Pythia,
               trainer: Mapping[str, Any]) -> None:
    """Write both layouts into `folder`; `trainer` is the trainer's config."""
    export_for_sae_lens(sae, folder / "sae_lens", source, trainer)
    export_for_dictionary_learning(sae, folder / "dictionary_learning" / "trainer_0", source,
                                   trainer)


def export_for_sae_lens(sae: ExportedSAE, folder: Path, source: Standin | Pythia,
                        trainer: Mapping[str, Any]) -> None:
    """SAELens 6 `standard`, or `jumprelu` with a threshold: sae_weights.safetensors, cfg.json."""
    cfg = {
        "architecture": architecture(sae.threshold > 0), "d_in": sae.d_in, "d_sae": sae.d_sae,
        "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION, "sae_lens_training_version": None,
            "model_name": source.loadable_name, "model_description": source.model_name,
            "hook_name": hook_name(source), "hook_head_index": None,
            "context_size": trainer["context_length"], "dataset_path": source.dataset_path,
            "dataset_description": source.text, "prepend_bos": False, "alpha": trainer["alpha"],
            "orthogonality": trainer["orthogonality"],
        },
    }
    tensors = {name: part.contiguous() for name, part in sae.tensors().items()}
    write_atomically(folder / "sae_weights.safetensors", safetensors.torch.save(tensors))
    write_text(folder / "cfg.json", to_json(cfg, 2))


def export_for_dictionary_learning(sae: ExportedSAE, folder: Path, source: Standin | Pythia,
                                   trainer: Mapping[str, Any]) -> None:
    """dictionary_learning's `AutoEncoder`, or `BatchTopKSAE`: ae.pt and config.json."""
    weights = {"encoder.weight": sae.W_enc.T.contiguous(), "encoder.bias": sae.b_enc,
               "decoder.weight": sae.W_dec.T.contiguous()}
    if trainer["activation"] == "batch_topk":
        own = {"dict_class": "BatchTopKSAE", "trainer_class": "BatchTopKTrainer",
               "k": round(trainer["target_l0"])}
        weights |= {"b_dec": sae.b_dec, "k": torch.tensor(own["k"], dtype=torch.int32),
                    "threshold": torch.tensor(sae.threshold)}
    else:
        own = {"dict_class": "AutoEncoder", "trainer_class": "StandardTrainer"}
        weights["bias"] = sae.b_dec
    config = {
        "trainer": {
            **own,
            "activation_dim": sae.d_in, "dict_size": sae.d_sae, "lr": trainer["learning_rate"],
            "l1_penalty": trainer["sparsity_penalty"], "warmup_steps": trainer["warmup_steps"],
            "steps": trainer["steps"], "seed": trainer["seed"], "device": "cpu",
            "layer": source.layer, "lm_name": source.loadable_name,
            "lm_description": source.model_name,
            "submodule_name": f"resid_post_layer_{source.layer}", "wandb_name": None,
            "alpha": trainer["alpha"],
        },
        "buffer": {"d_submodule": sae.d_in, "ctx_len": trainer["context_length"]},
    }
    pickled = io.BytesIO()
    torch.save(weights, pickled)
    write_atomically(folder / "ae.pt", pickled.getvalue())
    write_text(folder / "config.json", to_json(config, 2))


def architecture(has_threshold: bool) -> str:
    return "jumprelu" if has_threshold else "standard"


def hook_name(source: Standin | Pythia) -> str:
    return f"blocks.{source.layer}.hook_resid_post"


def sae_cfg_dict(config: Mapping[str, Any], source: Standin | Pythia) -> dict[str, Any]:
    """The SAE as SAEBench's results describe one; names under which nothing loads are null."""
    return {
        "model_name": source.loadable_name, "d_in": config["d_in"], "d_sae": config["d_sae"],
        "hook_layer": source.layer, "hook_name": hook_name(source),
        "context_size": config["context_length"], "hook_head_index": None,
        "architecture": architecture(config["activation"] == "batch_topk"),
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": None, "activation_fn_str": "relu", "prepend_bos": False,
        "normalize_activations": "none", "dtype": "float32", "device": "cpu",
        "dataset_path": source.dataset_path, "dataset_trust_remote_code": False,
        "seqpos_slice": [None], "training_tokens": config["steps"] * config["batch_size"],
        "sae_lens_training_version": None, "neuronpedia_id": None,
    }
