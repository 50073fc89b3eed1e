"""final_info.json: what a finished run holds, and how it compares with others."""

import contextlib
import importlib.metadata
import json
import math
import platform
import re
import resource
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

from lab.console import Clock, UserError, report
from lab.evaluations import Evaluated
from lab.evaluations.probing import K_VALUES, SEED, TEXTS_AT_ONCE, TOKENS_AT_ONCE
from lab.results.checksum import is_unaltered, result_checksum
from lab.results.exports import sae_cfg_dict
from lab.results.frontier import METRICS, redraw
from lab.results.statistics import differences, mean_stderr
from lab.storage import digest, laboratory_digest
from lab.substrates import Substrate

REFERENCES = ("run_7", "run_8")  # the fixed and the vanilla SAE, with which runs are compared
SAMPLES = ("sets", "asked", "reference_rise")  # numbers by context and answers by question
Info = dict[str, Any]


def read_result(folder: Path) -> Info | None:
    """final_info.json of a finished run; None, after one line that says so, if it was altered."""
    path = folder / "final_info.json"
    needed = {"means": dict, "seeds": list, "config": dict, "budget": str, "substrate": str}
    try:
        info = json.loads(path.read_bytes())
        if all(isinstance(info[key], kind) for key, kind in needed.items()) and is_unaltered(info):
            return info
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        pass
    report(f"{path} is damaged or was altered; it does not count")
    return None


def best_run(study: Path, candidates: Sequence[str], budget: str,
             settings: Sequence[str]) -> dict[str, Any]:
    """`settings` of the candidate in the folder `study` with the largest unlearning area, the mean
    over the seeds that all candidates have.

    Raises UserError naming candidates that are missing or have no area, or are not comparable with
    each other.
    """
    results = {name: read_result(study / name) for name in candidates}
    usable = {name: info for name, info in results.items()
              if info and info["budget"] == budget
              and isinstance(info["means"].get("unlearning_area"), int | float)
              and all(isinstance(info["config"].get(key), int | float) for key in settings)}
    if missing := [name for name in candidates if name not in usable]:
        raise UserError(f"this run repeats the best of {candidates[0]} to {candidates[-1]} and "
                        f"needs them finished, with an unlearning area, at budget {budget!r} in "
                        f"{study.resolve()}; missing: {', '.join(missing)}. Run those first.")
    first = usable[candidates[0]]
    for name, info in usable.items():
        if unlike := differences(first, info):
            raise UserError(f"{name} and {candidates[0]} in {study.resolve()} differ in "
                            f"{', '.join(unlike)}; repeat the odd ones")
    areas = {name: {row["seed"]: row["unlearning_area"] for row in info["seeds"]}
             for name, info in usable.items()}
    common = set.intersection(*map(set, areas.values()))
    if not common:
        raise UserError(f"{candidates[0]} to {candidates[-1]} in {study.resolve()} have no seed in "
                        "common; repeat them with the same first_seed")
    best = max(candidates, key=lambda name: sum(areas[name][seed] for seed in common))
    return {key: usable[best]["config"][key] for key in settings}


def flat_metrics(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """One seed's numbers under one name each."""
    reconstruction = parts["reconstruction"]
    flat = {key: value for key, value in reconstruction.items()
            if key not in ("tokens", "by_domain")}
    flat |= {f"{key}_{name}": metrics[key] for name, metrics in reconstruction["by_domain"].items()
             for key in ("l0", "explained_variance", "frac_alive")}
    flat |= {key: value for key, value in parts["conditioning"].items() if np.isscalar(value)}
    flat |= {key: value for key, value in parts["sparse_probing"].items()
             if key.endswith("accuracy")}
    flat |= {key: value for key, value in parts["separation"].items()
             if key not in ("details", "skipped")}
    unlearning = parts["unlearning"]
    covered = unlearning["coverage"].get("unlearning_area", {})
    return flat | {name: unlearning[name] for name in METRICS} | {
        f"coverage_{kind}": part for kind, part in covered.items()}


def without_samples(unlearning: Mapping[str, Any]) -> Info:
    """Areas, intervals, coverage, settings' means and all else but for the bulk that these are
    of."""
    return {key: value for key, value in unlearning.items() if key not in SAMPLES}


def means_and_stderrs(rows: list[dict[str, float | None]]) -> tuple[dict, dict]:
    """Over seeds, by metric. One that is missing for a seed has neither."""
    means: dict[str, float | None] = {}
    stderrs: dict[str, float | None] = {}
    for name in names_of(rows):
        values = [row.get(name) for row in rows]
        usable = all(value is not None and math.isfinite(value) for value in values)
        mean, stderr = mean_stderr(values) if usable else (None, None)
        means[name] = float(mean) if usable else None
        stderrs[name] = float(stderr) if usable and len(values) > 1 else None
    return means, stderrs


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of all rows, in the order in which they first appear: no single row decides for all."""
    return list(dict.fromkeys(name for row in rows for name in row))


def comparisons(info: Info, study: Path) -> dict[str, Any]:
    """Paired differences to the references that are finished beside this run and comparable."""
    results: dict[str, Any] = {}
    for reference in REFERENCES:
        other = read_result(study / reference) if reference != info["run"] else None
        if other and (unlike := differences(info, other)):
            report(f"{reference} and {info['run']} differ in {', '.join(unlike)}; not compared")
        elif other:
            try:
                if found := compare(info, other):
                    results[reference] = found
                else:
                    report(f"{reference} and {info['run']} have no seed in common; not compared")
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                report(f"{reference} is of another version ({type(error).__name__}); not compared")
    return results


def compare(info: Info, other: Info) -> dict[str, Any] | None:
    """Paired differences to a finished run, over the seeds that both have: their number, mean,
    standard error over seeds, 95 % interval. None where they have none in common.

    Student's t over seeds (a bootstrap of three gives but their range). Where a metric is of texts
    or questions, which all seeds share, their sampling error is added: (t·σ_s)² + (1.96·σ_t)².
    Without it (the two were not measured on the same ones) there is no interval.
    """
    theirs = {row["seed"]: row for row in other["seeds"]}
    rows = [row for row in info["seeds"] if row["seed"] in theirs]
    if not rows:
        return None
    common = {row["seed"] for row in rows}
    measured = [[part for row, part in zip(side["seeds"], side["unlearning"]["per_seed"])
                 if row["seed"] in common] for side in (info, other)]
    result: dict[str, Any] = {}
    for name in names_of(rows):
        pairs = [(row.get(name), theirs[row["seed"]].get(name)) for row in rows]
        if name == "seed" or any(value is None for pair in pairs for value in pair):
            continue
        mean, stderr = mean_stderr([ours - their for ours, their in pairs])
        known = result[name] = {"seeds": len(pairs), "difference": float(mean), "stderr": None,
                                "low": None, "high": None}
        if len(pairs) > 1:
            known["stderr"] = float(stderr)
            half = float(stderr) * float(scipy.stats.t.ppf(0.975, len(pairs) - 1))
            error = sampling_error(name, *measured) if name in METRICS else 0.0
            if error is not None:
                half = math.hypot(half, 1.96 * error)
                known |= {"low": float(mean) - half, "high": float(mean) + half}
    return result


def sampling_error(name: str, ours: list[dict], theirs: list[dict],
                   draws: int = 100) -> float | None:
    """Standard deviation of the mean paired difference when texts (or questions) are drawn anew,
    the same ones for all SAEs. None where the two sides were not measured on equally many."""
    metric = METRICS[name]
    sides = [[metric.tables(part) for part in parts] for parts in (ours, theirs)]
    if len({tuple(table.shape[1] for table in one) for side in sides for one in side}) > 1:
        return None
    rng = np.random.default_rng(0)

    def gap() -> float:
        drawn = redraw(sides[0][0], rng)
        mine, other = (np.mean([metric.statistic(*(table[:, places] for table, places
                                                   in zip(one, drawn))) for one in side])
                       for side in sides)
        return mine - other

    return float(np.std([gap() for _ in range(draws)], ddof=1))


def sae_bench_part(info: Info, substrate: Substrate, probing: list[dict]) -> Info:
    """The keys of SAEBench's sparse-probing output, as run_0 has them."""
    config, source = info["config"], substrate.source
    details = [averaged(name, [part["details"] for part in probing])
               for name in probed_sets(probing)]
    metrics = {side: {f"{side}_{kind}test_accuracy":
                      info["means"].get(f"{side}_{kind}test_accuracy")
                      for kind in ("", *(f"top_{k}_" for k in (*K_VALUES, 100)))}
               for side in ("llm", "sae")}
    for name, prefix in (("tpp_metrics", "tpp_threshold_"), ("scr_metrics", "scr_")):
        if found := {key: mean for key, mean in info["means"].items() if key.startswith(prefix)}:
            metrics[name] = found
    return {
        "eval_type_id": "sparse_probing",
        "eval_config": probing_config(substrate, details),
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID,
                                  digest(info["run"], config, source.fingerprint))),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "sae_bench_commit_hash": "none: computed by experiment.py",
        "sae_lens_id": info["run"], "sae_lens_release_id": f"{source.model_name}_{info['run']}",
        "sae_lens_version": None,  # SAELens had no part in it
        "sae_cfg_dict": sae_cfg_dict(config, source),
        "eval_result_unstructured": None,
        "training_steps": config["steps"], "final_loss": info["means"].get("final_loss"),
        "layer": source.layer, "dict_size": config["d_sae"],
        "learning_rate": config["learning_rate"],
        "sparsity_penalty": config["sparsity_penalty"] * (config["activation"] == "relu"),
    }


def probed_sets(probing: Sequence[Mapping[str, Any]]) -> list[str]:
    """Data sets that some seed was probed on."""
    return list(dict.fromkeys(row["dataset_name"] for part in probing for row in part["details"]))


def probing_config(substrate: Substrate, details: Sequence[Mapping[str, Any]]) -> Info:
    """SAEBench's settings as they were: set sizes are those of the largest task, `texts` has all;
    batches in texts of full length."""
    sizes = [task for row in details for task in row["texts"].values()]
    largest = {part: max((task[part] for task in sizes), default=0) for part in ("train", "test")}
    names = [row["dataset_name"].removesuffix("_results") for row in details]
    length = substrate.sizes.context_length
    return {
        "random_seed": SEED, "dataset_names": names,
        "probe_train_set_size": largest["train"], "probe_test_set_size": largest["test"],
        "context_length": length, "sae_batch_size": max(1, TOKENS_AT_ONCE // length),
        "llm_batch_size": TEXTS_AT_ONCE, "llm_dtype": substrate.precision,
        "model_name": substrate.source.loadable_name or substrate.source.model_name,
        "k_values": list(K_VALUES), "lower_vram_usage": False,
        "texts": {name: row["texts"] for name, row in zip(names, details)},
    }


def averaged(name: str, details: Sequence[Sequence[Mapping[str, Any]]]) -> Info:
    """One data set's probing numbers, mean over the seeds; None where one lacks it."""
    rows = [row for part in details for row in part if row["dataset_name"] == name]
    scores = [key for key in names_of(rows) if key.endswith("accuracy")]
    means = means_and_stderrs([{key: row.get(key) for key in scores} for row in rows])[0]
    return {"dataset_name": name, **means, "llm_top_100_test_accuracy": None,
            "sae_top_100_test_accuracy": None, "texts": rows[0]["texts"]}


def environment(substrate: Substrate) -> Info:
    """What the numbers may depend on beside the configuration."""
    packages = ("torch", "transformers", "nnsight", "datasets", "numpy", "scikit-learn",
                "safetensors")
    return {"python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in packages},
            "machine": platform.machine(), "processor": processor_name(),
            "threads": torch.get_num_threads(), "processes": substrate.processes.size,
            "device": str(substrate.processes.device),
            "language_model_dtype": substrate.precision,
            "evaluation_code": laboratory_digest(),
            "substrate_fingerprint": substrate.source.fingerprint, "text": substrate.texts()}


def processor_name() -> str:
    with contextlib.suppress(OSError):
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if name:
            return name[1]
    return platform.processor()


def collect(run: str, budget: str, config: Info, evaluated: Evaluated,
            histories: dict[int, list], substrate: Substrate, clock: Clock, study: Path) -> Info:
    """final_info.json: SAEBench's keys first, then the study's own."""
    results = evaluated.by_seed
    losses = {seed: [line["loss"] for line in history if "loss" in line]
              for seed, history in histories.items()}
    rows = [{**flat_metrics(parts), "final_loss": losses[seed][-1] if losses[seed] else None}
            for seed, parts in results.items()]
    means, stderrs = means_and_stderrs(rows)
    probing = [parts["sparse_probing"] for parts in results.values()]
    info: Info = {
        "run": run, "substrate": substrate.name, "budget": budget, "config": config,
        "means": means, "stderrs": stderrs,
        "seeds": [{"seed": seed, **row} for seed, row in zip(results, rows)],
        **{part: {"per_seed": [parts[part] for parts in results.values()]}
           for part in ("reconstruction", "conditioning", "separation", "unlearning")},
        "yardstick": {name: without_samples(part) for name, part in evaluated.yardstick.items()},
        "skipped": {**substrate.corpus["skipped"], **probing[0]["skipped"]},
        "environment": environment(substrate),
    }
    info["comparisons"] = comparisons(info, study)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    info = {**sae_bench_part(info, substrate, probing), **info, "timing": {
        **{f"{phase}_seconds": seconds for phase, seconds in clock.seconds.items()},
        "peak_memory_gb": peak / (1e9 if sys.platform == "darwin" else 1e6)}}
    return {**info, "sha256": result_checksum(info)}
