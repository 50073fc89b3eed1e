"""Reconstruction: how much of the activations and of the model's prediction an SAE preserves."""

from typing import Any

import torch
from torch import Tensor, nn

CustomSAE = Any


@torch.no_grad()
def reconstruction_metrics(sae: CustomSAE, z_ND: Tensor, chunk: int = 4096) -> dict[str, Any]:
    """SAEBench core's reconstruction and sparsity metrics, sums over the whole sample in float64.

    explained_variance = 1 − E‖z − ẑ‖²/(E‖z‖² − ‖E z‖²) (higher is better, 1 is perfect, 0 is what
    the mean gives; SAEBench 0.6.0 averages ratios over batches, which is wrong). cosine and
    l2_ratio are best at 1; l0 is active features and l1 summed activation a token. frac_alive is
    the share of features that fire at least once in the sample, which depends on its size.
    """
    sums = dict.fromkeys(("error", "square", "l0", "l1", "cosine", "ratio"), 0.0)
    mean_D = torch.zeros(z_ND.shape[1], dtype=torch.float64)
    fired_F = torch.zeros(sae.d_sae)
    for z in z_ND.split(chunk):
        code = sae.sparse_code(z)
        z_hat = code.z_hat_BD
        sums["error"] += float((z - z_hat).double().square().sum())
        sums["square"] += float(z.double().square().sum())
        mean_D += z.double().sum(0)
        sums["l0"] += len(code.value_N)
        sums["l1"] += float(code.value_N.double().sum())
        sums["cosine"] += float(nn.functional.cosine_similarity(z, z_hat, dim=1).double().sum())
        sums["ratio"] += float((z_hat.norm(dim=1) / z.norm(dim=1).clamp(min=1e-9)).double().sum())
        fired_F += torch.bincount(code.column_N, minlength=sae.d_sae)
    n = len(z_ND)
    variance = sums["square"] / n - float((mean_D / n).square().sum())
    rate_F = fired_F / n
    return {
        "l0": sums["l0"] / n, "l1": sums["l1"] / n, "mse": sums["error"] / n,
        "explained_variance": 1 - sums["error"] / n / variance if variance > 0 else None,
        "cosine": sums["cosine"] / n, "l2_ratio": sums["ratio"] / n,
        "frac_alive": float((rate_F > 0).float().mean()),
        "freq_over_1_percent": float((rate_F > 0.01).float().mean()),
        "freq_over_10_percent": float((rate_F > 0.1).float().mean()),
    }
