"""Conditioning: condition numbers of the subspaces of features that fire together."""

from typing import Any

import torch

from lab.grouping import (
    CoactivationSketch,
    group_features,
    group_statistics,
    random_condition_number,
)
from lab.storage import randomness

TrainedSAE = Material = Any


def evaluate_conditioning(trained: TrainedSAE, material: Material) -> dict[str, Any]:
    """Condition numbers κ of the subspaces of features that fire together; 1 is best.

    Groups come from held-out activations by the same procedure for every run, whatever it was
    trained with, so runs are compared on equal terms; the groups themselves differ from run to
    run, as their features do. κ near 1 + 2√(M/D) and above says nothing by itself: random vectors
    have kappa_random. by_coactivation gives the median κ by quartile of how much a group fires
    together, since sharing is meant for the groups that do.
    """
    config, z_ND = material.config, material.heldout_sample() / trained.scale
    sketch = CoactivationSketch(trained.sae.d_sae, config.sketch_size)
    for i, z in enumerate(z_ND.split(2048)):
        with torch.no_grad():
            code = trained.sae.sparse_code(z)
        sketch.add_(code, len(z), randomness("held", i))
    rows_FR = sketch.unit_rows()
    groups = group_features(rows_FR, config.group_size, seed=0)
    equal_use = torch.ones(1, trained.sae.d_sae)
    statistics = group_statistics(rows_FR, equal_use, trained.sae.W_dec, groups)
    kappa = statistics.kappa_G
    quartiles = statistics.coactivation_G.argsort().tensor_split(4)
    return {
        "kappa_median": float(kappa.median()), "kappa_p90": float(kappa.quantile(0.9)),
        "kappa_max": float(kappa.max()), "kappa": [round(v, 4) for v in sorted(kappa.tolist())],
        "kappa_random": random_condition_number(config.group_size, trained.sae.d_in),
        "by_coactivation": [
            {"quartile": i + 1, "coactivation": float(statistics.coactivation_G[part].mean()),
             "kappa_median": float(kappa[part].median())}
            for i, part in enumerate(quartiles) if len(part)
        ],
    }
