"""Controls on the real substrate: what the numbers are worth.

    python bench/controls.py        # beside the finished run_4, run_7, run_8 and run_10

Trains run_4's row with every stretch of text given another's domain (labels as steady as the true
ones but without meaning: the use term's gain must vanish) and takes SAEs that were never trained
(their probes show what random features give), for each of the runs' seeds; and vanilla SAEs on the
seeds of run_10, which no choice had seen, to compare it with. Then, for these two, the unlearning
area when a feature may only be clamped if it is as rare on the third text (its learn half) as on
retain text: is it the dictionary that limits unlearning, or that the choice of features does not
know what else must be spared? Printed are means ± standard errors and, below each line, paired
differences to the vanilla SAEs of the same seeds. Environment variables and cache are those of
experiment.py.
"""

import dataclasses
import math
import os
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import experiment as ex

OFF, FRESH = "off (run_8)", "off, run_10's seeds"
ROWS = {
    "adaptive, labels shuffled": {**ex.RUNS["run_4"], "shuffle_domains": True},
    "not trained": {**ex.RUNS["run_8"], "steps": 0},
    FRESH: {**ex.RUNS["run_8"], "first_seed": ex.RUNS["run_10"]["first_seed"]},
}
FINISHED = {OFF: "run_8", "fixed (run_7)": "run_7", "adaptive (run_4)": "run_4",
            "adaptive (run_10)": "run_10"}
PARTNERS = {FRESH: FRESH, "adaptive (run_10)": FRESH}  # of the same seeds; of all others OFF
COLUMNS = {
    "l0": "L0", "explained_variance": "explained variance", "l_use": "L_use",
    "duplicates": "duplicates", "unlearning_area": "area",
    "unlearning_area_labelled": "area, retain text alone",
    "sae_top_1_test_accuracy": "probe k=1", "sae_top_5_test_accuracy": "probe k=5",
    "sae_test_accuracy": "probe, all",
}


def prepare() -> tuple[ex.Material, ex.ActivationBuffer]:
    ex.quiet_libraries()
    cache = ex.Cache(Path(os.environ.get("SAE_CACHE_DIR") or ".cache"))
    substrate = ex.choose_substrate(os.environ.get("SAE_SUBSTRATE", "auto"), cache)
    substrate.fetch()
    config = ex.resolve_config("run_2", os.environ.get("SAE_BUDGET", "full"), Path())
    material = ex.Material(substrate, config, cache, ex.Team())
    return material, material.activations()


def obtain(config: ex.CustomSAEConfig, seed: int, material: ex.Material,
           buffer: ex.ActivationBuffer) -> ex.TrainedSAE:
    """The SAE of a row and seed: from the cache where a run has left it there, else trained."""
    key = ex.digest(config, material.causes, len(buffer), ex.TRAINING_CODE)
    name = f"{material.substrate.name}/runs/{key}"
    trainer = ex.train_sae(config, buffer, seed, material.cache.path(f"{name}/train-{seed}"),
                           ex.Interrupts(), lambda line: None, ex.Team())
    return ex.TrainedSAE(trainer.sae, buffer.scale)


def measure(config: ex.CustomSAEConfig, seed: int, material: ex.Material,
            buffer: ex.ActivationBuffer) -> dict[str, float]:
    """One SAE's reconstruction, probes and cross-entropy frontier (no questions)."""
    trained = obtain(config, seed, material, buffer)
    use = ex.feature_statistics(trained, buffer, config.frequency_tokens)
    result = ex.reconstruction_metrics(trained.sae, material.heldout_sample() / buffer.scale)
    result |= ex.decoder_metrics(trained.sae, use.use_KF)
    result |= ex.evaluate_sparse_probing(trained, material)
    if config.steps:
        result |= areas(trained, material, use)
    return {key: result.get(key, math.nan) for key in COLUMNS}


def areas(trained: ex.TrainedSAE, material: ex.Material,
          use: ex.FeatureStatistics) -> dict[str, float]:
    rises = []
    for threshold in ex.THRESHOLDS:
        for size in ex.SET_SIZES:
            features = ex.select_features(use.rate_KF, threshold, size)
            for multiplier in ex.MULTIPLIERS:
                targets = -multiplier * use.size_F[features]
                effect = ex.apply_setting(trained, material, features, targets, ask=False)
                rises.append(effect.rise_R)
    domain_R = material.heldout["domain"][material.heldout["rows"]]
    texts = [torch.stack(rises)[:, domain_R == k].numpy() for k in range(len(ex.DOMAINS))]
    return {"unlearning_area": ex.unlearning_area(*texts),
            "unlearning_area_labelled": ex.unlearning_area(*texts[:2])}


def third_text(material: ex.Material) -> torch.Tensor:
    """Residuals [N, D] of `frequency_tokens` of the third text's learn half, sinks left out."""
    lm, config = material.lm, material.config
    texts = ex.shuffled(material.corpus["learn"]["other"], "third")  # a dictionary is in order
    documents = lm.tokenize(texts[: config.frequency_tokens // 8])
    contexts_RT = ex.pack_contexts(documents, lm.separator, config.context_length)
    contexts_RT = contexts_RT[: config.frequency_tokens // config.context_length]
    parts = ex.progress(contexts_RT.split(32), "third text")
    x_ND = torch.cat([lm.residual(part).flatten(0, 1) for part in parts])
    return x_ND[x_ND.float().norm(dim=1) < material.sink_norm]


def informed(config: ex.CustomSAEConfig, seed: int, x_ND: torch.Tensor, material: ex.Material,
             buffer: ex.ActivationBuffer) -> dict[str, float]:
    """Areas when a chosen feature must be rare on the third text too."""
    trained = obtain(config, seed, material, buffer)
    use = ex.feature_statistics(trained, buffer, config.frequency_tokens)
    fired_F = torch.zeros(trained.sae.d_sae)
    for x in x_ND.split(4096):
        with torch.no_grad():
            code = trained.sae.sparse_code(x.float() / trained.scale)
        fired_F += torch.bincount(code.column_N, minlength=len(fired_F))
    forget_F, retain_F = use.rate_KF
    rate_KF = torch.stack([forget_F, torch.maximum(retain_F, fired_F / len(x_ND))])
    found = areas(trained, material, use._replace(rate_KF=rate_KF))
    return {key: found.get(key, math.nan) for key in COLUMNS}


def shown(values: list[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "-"  # not measured for this row
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def main() -> None:
    found = {name: ex.read_result(Path(run)) for name, run in FINISHED.items()}
    if missing := [name for name, info in found.items() if info is None]:
        sys.exit(f"error: no finished {', '.join(missing)} here; run them first")
    tables = {name: {key: [row[key] for row in info["seeds"]] for key in COLUMNS}
              for name, info in found.items()}
    material, buffer = prepare()
    configs = {name: ex.CustomSAEConfig(**{**dataclasses.asdict(material.config), **row})
               for name, row in ROWS.items()}
    for name, config in configs.items():
        seeds = [measure(config, seed, material, buffer) for seed in config.seeds]
        tables[name] = {key: [seed[key] for seed in seeds] for key in COLUMNS}
    show(tables)
    if not material.corpus["learn"]["other"]:
        return  # this substrate's third text has no learn half
    x_ND, knowing = third_text(material), {}
    budget = os.environ.get("SAE_BUDGET", "full")
    configs["adaptive (run_10)"] = ex.resolve_config("run_10", budget, Path())
    for name in (FRESH, "adaptive (run_10)"):
        seeds = [informed(configs[name], seed, x_ND, material, buffer)
                 for seed in configs[name].seeds]
        knowing[name] = {key: [seed[key] for seed in seeds] for key in COLUMNS}
    print("\nFeatures chosen knowing the third text:")
    show(knowing)


def show(tables: dict[str, dict[str, list[float]]]) -> None:
    print("| |", " | ".join(COLUMNS.values()), "|\n|---" + "|---" * len(COLUMNS) + "|")
    for name, table in tables.items():
        print(f"| {name} |", " | ".join(shown(values) for values in table.values()), "|")
        partner = PARTNERS.get(name, OFF)
        if name != partner:
            gaps = [[a - b for a, b in zip(table[key], tables[partner][key])] for key in COLUMNS]
            print("| minus off |", " | ".join(shown(gap) for gap in gaps), "|", flush=True)


if __name__ == "__main__":
    main()
