"""Conditioning: condition numbers of the subspaces of features that fire together."""

from typing import Any

import torch
from torch import Tensor

from lab.evaluations.heldout import HeldOut
from lab.grouping import (
    CoactivationSketch,
    gram_condition_numbers,
    group_features,
    group_statistics,
    random_condition_number,
)
from lab.sparse import ExportedSAE
from lab.storage import randomness

TOKENS = 1024  # at which the features that are active together are taken
GROUP_SIZE = 64  # features, below D so that every group has a finite condition number
SKETCH_SIZE = 512  # columns of the co-activation sketch


def evaluate_conditioning(sae: ExportedSAE, heldout: HeldOut) -> dict[str, Any]:
    """Condition numbers κ of the decoder rows of features that fire together; 1 is best.

    `kappa` is of the features that are active on a held-out token, by token: it needs no grouping.
    It grows with their number, so runs are compared at equal L0; as many random vectors have
    `kappa_random`. `group_kappa` is of groups of features that fire together often. They come from
    held-out activations by the same procedure for every run, and are noisy: other random signs
    give other groups. by_coactivation gives its median by quartile of how much a group fires
    together.
    """
    x_ND = heldout.residuals()
    places = torch.linspace(0, len(x_ND) - 1, min(TOKENS, len(x_ND))).long()
    kappa_B, count_B = active_condition_numbers(sae, x_ND[places])
    typical = int(count_B.median())
    random = random_condition_number(typical, sae.d_in) if typical < sae.d_in else None
    return {**summary("kappa", kappa_B), "kappa_random": random, **group_conditioning(sae, x_ND)}


def summary(name: str, kappa: Tensor) -> dict[str, Any]:
    """Median, 90th percentile, largest and all of them, sorted."""
    return {f"{name}_median": float(kappa.median()), f"{name}_p90": float(kappa.quantile(0.9)),
            f"{name}_max": float(kappa.max()), name: [round(v, 4) for v in sorted(kappa.tolist())]}


def active_condition_numbers(sae: ExportedSAE, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """By token, of its active features: κ of their decoder rows, float64, and their number. Fewer
    than two have κ = 1."""
    code = sae.code(x_BD)
    fires_N = code.value_N > 0
    count_B = torch.bincount(code.row_N[fires_N], minlength=len(x_BD))
    kappa_B = torch.ones(len(x_BD), dtype=torch.float64)
    rows = sae.W_dec[code.column_N[fires_N]].double().split(count_B.tolist())
    for token, W in enumerate(rows):
        if len(W) > 1:
            kappa_B[token] = gram_condition_numbers((W @ W.T)[None])[0]
    return kappa_B, count_B


def group_conditioning(sae: ExportedSAE, x_ND: Tensor) -> dict[str, Any]:
    """κ of groups of features that fire together, all of them and by how much they do."""
    sketch = CoactivationSketch(sae.d_sae, SKETCH_SIZE)
    for i, x in enumerate(x_ND.split(2048)):
        sketch.add_(sae.code(x), len(x), randomness("held", i))
    rows_FR = sketch.unit_rows()
    groups = group_features(rows_FR, GROUP_SIZE, seed=0)
    statistics = group_statistics(rows_FR, sae.W_dec, groups)
    quartiles = statistics.coactivation_G.argsort().tensor_split(4)
    return {
        **summary("group_kappa", statistics.kappa_G),
        "group_kappa_random": random_condition_number(GROUP_SIZE, sae.d_in),
        "by_coactivation": [
            {"quartile": i + 1, "coactivation": float(statistics.coactivation_G[part].mean()),
             "group_kappa_median": float(statistics.kappa_G[part].median())}
            for i, part in enumerate(quartiles) if len(part)
        ],
    }
