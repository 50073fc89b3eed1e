"""Are our separation numbers SAEBench's own?

    bash bench/peers.sh
    python bench/separation_in_sae_bench.py

The same residuals, SAE and probes go through `evaluate_separation` and, in its own environment,
through the functions of sae_bench.evals.scr_and_tpp: effects, choice of features, ablation token by
token, accuracies, summary. Its random draws are replaced by ours, its SAE class by four tensors.
Every class has more than 500 features with an effect above zero, so both ablate the same ones. A
probe trained by its function from our start, in our order, must be ours too. Exits 1 if a number
differs by more than TOLERANCE. How much padding moves its numbers is printed, not judged.
"""

import itertools
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from exchange import answer, ask, peer_python
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
CLASSES, TRAIN, TEST, TOKENS, D_IN, D_SAE = 4, 120, 60, 6, 64, 4096
SCR_TASKS = {  # of the paper's first pair; SAEBench uses these names for all
    "class": ("professor / nurse", "nurse_data_only"),
    "attribute": ("male / female", "female_data_only"),
    "biased": ("male_professor / female_nurse", "female_nurse_data_only")}


# --- SAEBench's side, in its environment ---------------------------------------------------------


def their_numbers(request: dict[str, Any]) -> dict[str, Any]:
    """TPP, SCR and a trained probe from SAEBench's functions."""
    given = torch.load(request["given"])
    with mock.patch("torch.randperm", torch.arange):  # negatives: the first ones of each class
        result = {kind: their_metric(given, kind, padded)
                  for kind, padded in (("tpp", False), ("scr", False))}
        result["padded"] = their_metric(given, "tpp", True)
    return {**result, "probe": their_probe(given)}


def their_metric(given: dict[str, Any], kind: str, padded: bool) -> dict[str, float]:
    from sae_bench.evals.scr_and_tpp import main
    from sae_bench.sae_bench_utils.activation_collection import create_meaned_model_activations

    W_enc, b_enc, W_dec, b_dec = given["sae"]
    sae = SimpleNamespace(W_dec=W_dec, decode=lambda f: f @ W_dec + b_dec,
                          encode=lambda x: torch.relu((x - b_dec) @ W_enc + b_enc))
    train, test = ({name: torch.nn.functional.pad(acts, (0, 0, 0, TOKENS * padded))
                    for name, acts in given[kind][part].items()} for part in ("train", "test"))
    probes = {name: their_probe_class(*row) for name, row in given[kind]["probes"].items()}
    names, scr, n_values = list(probes), kind == "scr", given["n_values"]
    effects = main.get_all_node_effects_for_one_sae(sae, probes, names, scr, train, 50)
    clean = main.get_probe_test_accuracy(probes, names, create_meaned_model_activations(test),
                                         500, scr)
    after = main.perform_feature_ablations(probes, sae, 50, test, effects, n_values, names, 500,
                                           scr)
    if scr:
        return main.get_scr_plotting_dict(after, clean)
    return main.create_tpp_plotting_dict(after, clean)[0]


def their_probe_class(weight_D: Tensor, bias: Tensor) -> Any:
    from sae_bench.evals.sparse_probing import probe_training

    probe = probe_training.Probe(len(weight_D), torch.float32)
    with torch.no_grad():
        probe.net.weight.copy_(weight_D[None])
        probe.net.bias.copy_(bias)
    return probe


def their_probe(given: dict[str, Any]) -> list[float]:
    """Weight and bias after SAEBench's training: our start, our order, the last epoch taken."""
    from sae_bench.evals.sparse_probing import probe_training

    x_OD, y_O, start = given["train_x"], given["train_y"], given["start"]
    probe = their_probe_class(start[:-1], start[-1:])
    with mock.patch("torch.randperm", side_effect=given["orders"]), \
            mock.patch.object(probe_training, "Probe", return_value=probe), \
            mock.patch.object(probe_training, "test_probe_gpu", side_effect=itertools.count(1.0)):
        trained, _ = probe_training.train_probe_gpu(
            x_OD, y_O, x_OD, y_O, dim=x_OD.shape[1], batch_size=16, epochs=20, lr=1e-3,
            l1_penalty=1e-3, early_stopping_patience=20)
    return torch.cat([trained.net.weight[0], trained.net.bias]).tolist()


# --- Ours ----------------------------------------------------------------------------------------


def compare() -> int:
    """Print the largest differences; the exit code."""
    sys.path.insert(0, str(ROOT))
    from lab.evaluations import separation
    from lab.evaluations.probing import pooled_for, probe_tasks
    from lab.substrates.texts import Sizes

    substrate = SimpleNamespace(sizes=Sizes(probe_train=2 * TRAIN, probe_test=2 * TEST),
                                cached=lambda name, build, *_: build())
    sae, texts = planted()
    pooled = pooled_for(sae, texts)
    details = separation.evaluate_separation(sae, substrate, [pooled])["details"]
    ours = {key: value for row in details[:2] for key, value in row.items()}  # TPP, first SCR pair
    tpp = probe_tasks(pooled, substrate.sizes)[0]
    scr = separation.correlated_tasks(pooled, substrate.sizes)["0_1"]
    given = {"sae": list(sae.tensors().values()), "n_values": list(separation.N_VALUES),
             **training_case(separation, torch.from_numpy(pooled.residuals_OD)[tpp["0"]["train"]])}
    for kind, tasks, names in (("tpp", tpp, {label: (label, None) for label in tpp}),
                               ("scr", scr, SCR_TASKS)):
        probes = separation.trained_probes(substrate, pooled, tasks)
        given[kind] = {part: halves(texts, tasks, part, names) for part in ("train", "test")}
        given[kind]["probes"] = {names[task][0]: (torch.tensor(probe.weight_D),
                                                  torch.tensor([probe.bias]))
                                 for task, probe in probes.items()}
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "given.pt")
        torch.save(given, path)
        theirs = ask(Path(__file__).name, peer_python("sae_bench"),
                     {"task": "separation", "given": path})
    gaps = {kind: max(abs(ours[key] - value) for key, value in theirs[kind].items())
            for kind in ("tpp", "scr")}
    gaps["probe"] = float((torch.tensor(theirs["probe"]) - given["ours"]).abs().max())
    for kind, gap in gaps.items():
        print(f"{kind:6s} largest difference {gap:.1e} (allowed {TOLERANCE:.0e})")
    padding = max(abs(theirs["padded"][key] - value) for key, value in theirs["tpp"].items())
    print(f"padded to twice the length, SAEBench's own numbers move by up to {padding:.3f}")
    return int(max(gaps.values()) > TOLERANCE)


def planted() -> tuple[Any, Any]:
    """An untrained SAE, and texts of classes and of an attribute, all directions random."""
    from lab.evaluations.probing import ProbeSet
    from lab.sparse import ExportedSAE

    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    W_dec = torch.nn.functional.normalize(noise(D_SAE, D_IN), dim=1)
    sae = ExportedSAE(W_dec.T + 0.05 * noise(D_IN, D_SAE), 0.3 * noise(D_SAE) - 1, W_dec,
                      noise(D_IN))
    count = TRAIN + TEST
    label = np.repeat(np.arange(CLASSES), count)
    attribute = np.tile(np.arange(2), len(label) // 2)
    of_class, of_attribute = 0.6 * noise(CLASSES, D_IN), 0.6 * noise(2, D_IN)
    x_OTD = (of_class[label] + of_attribute[attribute])[:, None] + noise(len(label), TOKENS, D_IN)
    parts = np.tile(np.repeat(["train", "test"], (TRAIN, TEST)), CLASSES)
    owner = torch.arange(len(label)).repeat_interleave(TOKENS)
    return sae, ProbeSet("planted", x_OTD.flatten(0, 1), owner, label.astype(str), parts, (),
                         attribute)


def halves(texts: Any, tasks: dict, part: str, names: dict) -> dict[str, Tensor]:
    """Texts of a part as SAEBench has them: by class, or by both halves of each SCR task."""
    acts_OTD, by_name = texts.acts_ND.unflatten(0, (-1, TOKENS)), {}
    for name, task in tasks.items():
        for key, index in zip(names[name], np.split(task[part], 2)):
            if key:
                by_name[key] = acts_OTD[index]
    return by_name


def training_case(separation: Any, x_OD: Tensor) -> dict[str, Any]:
    """Our probe of a task, and the start and orders that its generator gave."""
    from lab.storage import randomness

    generator, bound = randomness("separation", "case"), D_IN ** -0.5
    start = [torch.empty(n).uniform_(-bound, bound, generator=generator) for n in (D_IN, 1)]
    orders = [torch.randperm(len(x_OD), generator=generator) for _ in range(separation.EPOCHS)]
    return {"train_x": x_OD, "train_y": (torch.arange(len(x_OD)) < len(x_OD) // 2).int(),
            "start": torch.cat(start), "orders": orders,
            "ours": separation.train_probe(x_OD, "case")}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        answer({"separation": their_numbers})
    else:
        sys.exit(compare())
