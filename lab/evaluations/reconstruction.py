"""Reconstruction: how much of the activations and of the model's prediction an SAE preserves."""

from typing import Any

import torch
from torch import Tensor, nn

from lab.evaluations.heldout import HeldOut
from lab.language_model import losses
from lab.sparse import ExportedSAE
from lab.substrates.texts import FORGET, RETAIN, sides

DUPLICATE_COSINE = 0.9  # two features this close count as duplicates
SERVES_ONE = 0.9  # part of a feature's use from which it counts as of that domain


def evaluate_reconstruction(sae: ExportedSAE, heldout: HeldOut, use_KF: Tensor) -> dict[str, Any]:
    """What is preserved of held-out text of both domains in equal parts; sinks stay as they are.

    ce_score = (CE_zero − CE_sae)/(CE_zero − CE_unmodified): 1 where splicing the SAE in changes
    nothing, 0 where it is as bad as zeros (SAEBench core). `by_domain` has the same of each text by
    itself, unnamed ones too: equal L0 on the named ones does not mean equal L0 there.
    `use_KF`: mean activations of features by domain of learn text.
    """
    named = heldout.domain_R <= RETAIN
    tokens, x, keep = (heldout.of_frontier(name)[named] for name in ("tokens", "x", "keep"))
    spliced = torch.where(keep[..., None], sae.reconstruct(x.float()).to(x.dtype), x)
    ce_sae = losses(heldout.substrate.lm, tokens, spliced)
    ce, zero, base = (float(part.double().mean())
                      for part in (ce_sae, heldout["zero"][named], heldout["base"][named]))
    domains = heldout.substrate.domains
    totals = [reconstruction_sums(sae, heldout.residuals(k)) for k in range(len(domains))]
    both = {name: totals[FORGET][name] + totals[RETAIN][name] for name in totals[FORGET]}
    return {**metrics_of(both), **decoder_metrics(sae, use_KF),
            "by_domain": {name: metrics_of(part) for name, part in zip(domains, totals)},
            "ce_sae": ce, "ce_zero": zero, "ce_base": base,
            "ce_score": (zero - ce) / (zero - base) if zero != base else None}


def reconstruction_metrics(sae: ExportedSAE, x_ND: Tensor, chunk: int = 4096) -> dict[str, Any]:
    """SAEBench core's reconstruction and sparsity metrics of raw residuals, sums over the whole
    sample in float64.

    explained_variance = 1 − E‖x − x̂‖²/(E‖x‖² − ‖E x‖²): higher is better, 1 is perfect, 0 is what
    the mean gives. mse is E‖x − x̂‖² and l1 the summed activation a token, both in raw units; l0 is
    active features a token; cosine and l2_ratio are best at 1. frac_alive is the share of features
    that fire in the sample, whose size is `tokens`.
    """
    return metrics_of(reconstruction_sums(sae, x_ND, chunk))


@torch.no_grad()
def reconstruction_sums(sae: ExportedSAE, x_ND: Tensor, chunk: int = 4096) -> dict[str, Any]:
    """What `metrics_of` needs, each a sum over tokens, so that samples add up."""
    sums: dict[str, Any] = dict.fromkeys(("error", "square", "l0", "l1", "cosine", "ratio"), 0.0)
    sums |= {"tokens": len(x_ND), "x_D": torch.zeros(x_ND.shape[1], dtype=torch.float64),
             "fired_F": torch.zeros(sae.d_sae, dtype=torch.float64)}
    for x in x_ND.split(chunk) if len(x_ND) else ():
        code = sae.code(x)
        x_hat = code.z_hat_BD
        sums["error"] += float((x - x_hat).double().square().sum())
        sums["square"] += float(x.double().square().sum())
        sums["x_D"] += x.double().sum(0)
        sums["l0"] += len(code.value_N)
        sums["l1"] += float(code.value_N.double().sum())
        sums["cosine"] += float(nn.functional.cosine_similarity(x, x_hat, dim=1).double().sum())
        sums["ratio"] += float((x_hat.norm(dim=1) / x.norm(dim=1).clamp(min=1e-9)).double().sum())
        sums["fired_F"] += torch.bincount(code.column_N, minlength=sae.d_sae)
    return sums


def metrics_of(sums: dict[str, Any]) -> dict[str, Any]:
    """Means over the tokens that went into the sums; of no token all are None."""
    n = sums["tokens"]
    mean = {name: sums[name] / n if n else None for name in sums}
    variance = mean["square"] - float(mean["x_D"].square().sum()) if n else 0.0
    varies = n and variance > 1e-9 * mean["square"]  # below, it is rounding
    rate_F = mean["fired_F"]
    more_than = {"frac_alive": 0.0, "freq_over_1_percent": 0.01, "freq_over_10_percent": 0.1}
    return {
        "tokens": n, "l0": mean["l0"], "l1": mean["l1"], "mse": mean["error"],
        "explained_variance": 1 - mean["error"] / variance if varies else None,
        "cosine": mean["cosine"], "l2_ratio": mean["ratio"],
        **{name: float((rate_F > rate).double().mean()) if n else None
           for name, rate in more_than.items()},
    }


@torch.no_grad()
def decoder_metrics(sae: ExportedSAE, use_KF: Tensor) -> dict[str, Any]:
    """How far apart features are, by counting and by measures that no experiment changes; of use on
    forget text and, of each feature, on the kind of retain text that it has most on (`sides`).

    max_decoder_cosine: mean over features of the largest cosine with another one. l_dir: frame
    potential of the decoder without its diagonal, D/F² Σ_{i≠j} (w_i·w_j)², with its floor 1 − D/F.
    l_use: mean Gini impurity of the domains that a unit of activation serves. Lower is better.
    duplicates: pairs of cosine > 0.9 that serve different domains: general features split into
    two copies.
    """
    W_FD = nn.functional.normalize(sae.W_dec, dim=1)
    F, D = W_FD.shape
    share_KF = sides(use_KF / use_KF.sum(1, keepdim=True).clamp(min=1e-12))
    total_F = share_KF.sum(0)
    forget_F, retain_F = ((share_KF[k] > SERVES_ONE * total_F) & (total_F > 0)
                      for k in (FORGET, RETAIN))
    largest, duplicates = [], 0
    for start in range(0, F, 1024):
        cosine = W_FD[start : start + 1024] @ W_FD.T
        cosine.diagonal(start).fill_(-1)
        largest.append(cosine.max(dim=1).values)
        close = cosine[forget_F[start : start + 1024]][:, retain_F] > DUPLICATE_COSINE
        duplicates += int(close.sum())
    return {
        "max_decoder_cosine": float(torch.cat(largest).mean()),
        "l_dir": float(((W_FD.T @ W_FD).square().sum() - W_FD.square().sum(1).square().sum())
                       * (D / F**2)),
        "l_dir_floor": 1 - D / F, "l_use": impurity(sides(use_KF)), "duplicates": duplicates,
        "forget_features": int(forget_F.sum()),
    }


def impurity(use_KF: Tensor) -> float:
    """Σ_i u_i K/(K − 1) (1 − Σ_k p_ki²), u_i a feature's part of all use, p_ki of its own."""
    total_F = use_KF.sum(0)
    part_KF = use_KF / total_F.clamp(min=1e-12)
    K = len(use_KF)
    gini_F = (1 - part_KF.square().sum(0)) * K / (K - 1)
    return float((total_F / total_F.sum().clamp(min=1e-12) * gini_F).sum())
