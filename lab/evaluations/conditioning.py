"""Conditioning: condition numbers of the subspaces of features that fire together."""

from typing import Any

from lab.evaluations.heldout import HeldOut
from lab.grouping import (
    CoactivationSketch,
    group_features,
    group_statistics,
    random_condition_number,
)
from lab.sparse import ExportedSAE
from lab.storage import randomness

GROUP_SIZE = 64  # features, below D so that every group has a finite condition number
SKETCH_SIZE = 512  # columns of the co-activation sketch


def evaluate_conditioning(sae: ExportedSAE, heldout: HeldOut) -> dict[str, Any]:
    """Condition numbers κ of the subspaces of features that fire together; 1 is best.

    Groups come from held-out activations by the same procedure for every run, whatever it was
    trained with. The groups themselves differ from run to run, as their features do. κ near
    1 + 2√(M/D) and above says nothing by itself: random vectors have kappa_random.
    by_coactivation gives the median κ by quartile of how much a group fires together.
    """
    sketch = CoactivationSketch(sae.d_sae, SKETCH_SIZE)
    for i, x in enumerate(heldout.residuals().split(2048)):
        sketch.add_(sae.code(x), len(x), randomness("held", i))
    rows_FR = sketch.unit_rows()
    groups = group_features(rows_FR, GROUP_SIZE, seed=0)
    statistics = group_statistics(rows_FR, sae.W_dec, groups)
    kappa = statistics.kappa_G
    quartiles = statistics.coactivation_G.argsort().tensor_split(4)
    return {
        "kappa_median": float(kappa.median()), "kappa_p90": float(kappa.quantile(0.9)),
        "kappa_max": float(kappa.max()), "kappa": [round(v, 4) for v in sorted(kappa.tolist())],
        "kappa_random": random_condition_number(GROUP_SIZE, sae.d_in),
        "by_coactivation": [
            {"quartile": i + 1, "coactivation": float(statistics.coactivation_G[part].mean()),
             "kappa_median": float(kappa[part].median())}
            for i, part in enumerate(quartiles) if len(part)
        ],
    }
