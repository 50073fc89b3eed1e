"""dictionary_learning's side: loads our export, evaluates it, and trains from text to SAE."""

import itertools
import time
from importlib.metadata import version
from typing import Any

import torch
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from exchange import answer, differences, text_inputs
from nnsight import LanguageModel


@torch.no_grad()
def check(request: dict[str, Any]) -> dict[str, Any]:
    """Load `folder`/dictionary_learning/trainer_0; compare with ours; its `evaluate`."""
    folder = f"{request['folder']}/dictionary_learning/trainer_0"
    dictionary, config = load_dictionary(folder, device="cpu")
    ours = torch.load(request["ours"])
    x_hat_ND, f_NF = dictionary(ours["x"], output_features=True)
    batches = ours["x"].split(request["batch"])
    metrics = evaluate(dictionary, iter(batches), n_batches=len(batches))
    name = f"{config['trainer']['dict_class']} of dictionary-learning"
    return {"loaded": f"{name} {version('dictionary-learning')}", "metrics": metrics,
            **differences(ours, f_NF, x_hat_ND)}


def pipeline(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds from text in memory to a trained SAE; the language model is loaded before."""
    stored, tokenizer = text_inputs(request)
    model = LanguageModel(request["folder"], tokenizer=tokenizer, device_map="cpu", dispatch=True,
                          torch_dtype=torch.float32)
    steps = request["tokens"] // request["batch_size"]
    trainer = dict(trainer=StandardTrainer, steps=steps, activation_dim=request["d_in"],
                   dict_size=request["d_sae"], layer=request["layer"], lm_name="local", lr=1e-3,
                   l1_penalty=0.04, warmup_steps=10, sparsity_warmup_steps=10, device="cpu")
    start = time.perf_counter()
    buffer = ActivationBuffer(
        itertools.cycle(stored["pieces"]), model, model.gpt_neox.layers[request["layer"]],
        d_submodule=request["d_in"], n_ctxs=request["buffer_contexts"],
        ctx_len=request["context_length"], refresh_batch_size=request["rows"],
        out_batch_size=request["batch_size"], device="cpu",
    )
    trainSAE(buffer, [trainer], steps=steps, device="cpu", save_dir=request["scratch"])
    seconds = time.perf_counter() - start
    weights = torch.load(f"{request['scratch']}/trainer_0/ae.pt")
    return {"seconds": seconds, "tokens": steps * request["batch_size"],
            "finite": all(bool(torch.isfinite(part).all()) for part in weights.values())}


if __name__ == "__main__":
    answer({"check": check, "pipeline": pipeline})
