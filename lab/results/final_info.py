"""final_info.json: what a finished run holds, and how it compares with others."""

import contextlib
import hashlib
import json
import math
import platform
import re
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

from lab.console import say
from lab.evaluations.probing import K_VALUES
from lab.evaluations.unlearning import (
    RETAIN_BUDGETS,
    accuracy_area,
    official_score,
    unlearning_area,
)
from lab.results.exports import sae_cfg_dict
from lab.storage import digest, to_json
from lab.substrates.texts import DOMAINS, OTHER

CustomSAEConfig = Material = Any


def result_checksum(info: dict[str, Any]) -> str:
    """Over all but the times, so that equal results have equal checksums."""
    times = ("timing", "datetime_epoch_millis", "sha256")
    rest = {key: value for key, value in info.items() if key not in times}
    return hashlib.sha256(to_json(rest).encode()).hexdigest()


def read_result(folder: Path) -> dict[str, Any] | None:
    """final_info.json of a finished run; None, after one line that says so, if it was altered.

    Results without a checksum are of an older version and must do with a look at their types.
    """
    path = folder / "final_info.json"
    needed = {"means": dict, "seeds": list, "config": dict, "budget": str, "substrate": str}
    try:
        info = json.loads(path.read_bytes())
        known = all(isinstance(info[key], kind) for key, kind in needed.items())
        if known and ("sha256" not in info or info["sha256"] == result_checksum(info)):
            return info
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        pass
    say(f"{path} is damaged or was altered; it does not count")
    return None


UNLEARNING_NUMBERS = ("area", "area_labelled", "score", "accuracy_area",
                      *(f"forget_rise_at_{budget}" for budget in RETAIN_BUDGETS))


def flat_metrics(parts: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """One seed's numbers under one name each."""
    flat = {key: value for key, value in parts["reconstruction"].items() if key != "tokens"}
    flat |= {key: value for key, value in parts["conditioning"].items() if np.isscalar(value)}
    flat |= {key: value for key, value in parts["sparse_probing"].items() if key != "details"}
    for key in UNLEARNING_NUMBERS:
        name = key if key.startswith(("forget", "accuracy")) else f"unlearning_{key}"
        flat[name] = parts["unlearning"][key]
    return flat


def sae_bench_part(run: str, config: CustomSAEConfig, material: Material, means: dict,
                   probing: list[dict], d_in: int) -> dict[str, Any]:
    """The keys of SAEBench's sparse-probing output, as run_0 has them."""
    substrate = material.substrate
    names = [row["dataset_name"] for row in probing[0]["details"]]
    details = []
    for i, name in enumerate(names):
        keys = [key for key in probing[0]["details"][i] if key != "dataset_name"]
        values = {key: float(np.mean([p["details"][i][key] for p in probing])) for key in keys}
        details.append({"dataset_name": name, **values, "llm_top_100_test_accuracy": None,
                        "sae_top_100_test_accuracy": None})
    metrics = {side: {f"{side}_{kind}test_accuracy": means.get(f"{side}_{kind}test_accuracy")
                      for kind in ("", *(f"top_{k}_" for k in (*K_VALUES, 100)))}
               for side in ("llm", "sae")}
    return {
        "eval_type_id": "sparse_probing",
        "eval_config": {
            "random_seed": 42, "dataset_names": [name.removesuffix("_results") for name in names],
            "probe_train_set_size": config.probe_train, "probe_test_set_size": config.probe_test,
            "context_length": config.context_length, "sae_batch_size": 125, "llm_batch_size": 32,
            "llm_dtype": str(material.dtype).removeprefix("torch."),
            "model_name": substrate.model_name, "k_values": list(K_VALUES),
            "lower_vram_usage": False,
        },
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, digest(run, config, substrate.fingerprint))),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "sae_bench_commit_hash": "none: computed by experiment.py",
        "sae_lens_id": run, "sae_lens_release_id": f"{substrate.model_name}_{run}",
        "sae_lens_version": "6.18.0",
        "sae_cfg_dict": sae_cfg_dict(config, substrate, d_in),
        "eval_result_unstructured": None,
        "training_steps": config.steps, "final_loss": means.get("final_loss"),
        "layer": substrate.layer, "dict_size": config.expansion * d_in,
        "learning_rate": config.learning_rate, "sparsity_penalty": config.sparsity_penalty,
    }


SAMPLED = {  # metrics of texts or questions: the statistic, its units, and their domains
    "unlearning_area": (unlearning_area, "rise", DOMAINS),
    "unlearning_area_labelled": (unlearning_area, "rise", DOMAINS[:OTHER]),
    "accuracy_area": (accuracy_area, "right", DOMAINS[:OTHER]),
    "unlearning_score": (official_score, "right", DOMAINS[:OTHER]),
}


def compare(rows: list[dict], samples: list[dict], other: dict[str, Any]) -> dict[str, Any] | None:
    """Paired differences to a finished run with the same seeds: mean, standard error over seeds,
    95 % interval.

    Student's t over seeds (a bootstrap of three gives but their range). Where a metric is of texts
    or questions, which all seeds share, their sampling error is added: (t·σ_s)² + (1.96·σ_t)².
    """
    theirs = {row["seed"]: row for row in other["seeds"]}
    if [row["seed"] for row in rows] != list(theirs):
        return None
    result: dict[str, Any] = {}
    their_samples = [part["samples"] for part in other["unlearning"]["per_seed"]]
    for name in rows[0]:
        pairs = [(row[name], theirs[row["seed"]].get(name)) for row in rows]
        if name == "seed" or any(value is None for pair in pairs for value in pair):
            continue
        gaps = np.array([ours - their for ours, their in pairs])
        found = result[name] = dict.fromkeys(("difference", "stderr", "low", "high"))
        mean = found["difference"] = float(gaps.mean())
        if len(gaps) > 1:
            stderr = found["stderr"] = float(gaps.std(ddof=1) / math.sqrt(len(gaps)))
            half = stderr * float(scipy.stats.t.ppf(0.975, len(gaps) - 1))
            if name in SAMPLED:
                half = math.hypot(half, 1.96 * sampling_error(name, samples, their_samples))
            found |= {"low": mean - half, "high": mean + half}
    return result


def sampling_error(name: str, ours: list[dict], theirs: list[dict], draws: int = 200) -> float:
    """Standard deviation of the mean paired difference when texts (or questions) are resampled,
    the same ones for all SAEs; 0 when the two sides were not measured on the same number."""
    statistic, kind, domains = SAMPLED[name]

    def parts(sample: dict) -> list[np.ndarray]:
        found = (np.array([list(map(float, row)) for row in sample[f"{domain}_{kind}"]])
                 for domain in domains)
        return [part for part in found if part.size]

    sides = [[parts(sample) for sample in samples] for samples in (ours, theirs)]
    if len({tuple(part.shape[1] for part in one) for side in sides for one in side}) > 1:
        return 0.0
    rng = np.random.default_rng(0)

    def gap() -> float:
        picks = [rng.integers(0, part.shape[1], part.shape[1]) for part in sides[0][0]]
        mine, other = (np.mean([statistic(*(part[:, pick] for part, pick in zip(one, picks)))
                                for one in side]) for side in sides)
        return mine - other

    return float(np.std([gap() for _ in range(draws)], ddof=1))


def environment(material: Material) -> dict[str, Any]:
    """What the numbers may depend on beside the configuration."""
    packages = ("torch", "transformers", "nnsight", "datasets", "numpy", "sklearn", "safetensors")
    versions = {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
    return {"python": platform.python_version(), "packages": versions,
            "machine": platform.machine(), "processor": processor_name(),
            "threads": torch.get_num_threads(), "processes": material.team.size,
            "device": str(material.team.device),
            "language_model_dtype": str(material.dtype).removeprefix("torch."),
            "substrate_fingerprint": material.substrate.fingerprint}


def processor_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor()


def comparisons(rows: list[dict], evaluations: list[dict], record: dict, precision: str,
                out_dir: Path) -> dict[str, Any]:
    """Paired differences to the fixed and the vanilla SAE, where these runs are finished and had
    the language model in the same precision, that is the same activations and questions."""
    found = {}
    for reference in ("run_7", "run_8"):
        other = read_result(out_dir.resolve().parent / reference)
        same = other and all(other[key] == record[key] for key in ("substrate", "budget"))
        if same and reference != record["run"]:
            samples = [parts["unlearning"]["samples"] for parts in evaluations]
            try:
                theirs = other["environment"]["language_model_dtype"]
                if theirs == precision:
                    found[reference] = compare(rows, samples, other)
                else:
                    say(f"{reference} had its language model in {theirs}, {record['run']} has it "
                        f"in {precision}; not compared")
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                say(f"{reference} is of another version ({type(error).__name__}); not compared")
    return found
