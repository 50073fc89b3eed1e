"""The supervised yardstick: what the labels give for unlearning without an SAE."""

from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lab.evaluations.heldout import HeldOut
from lab.evaluations.unlearning import clamp_and_ask, feature_set
from lab.sparse import ExportedSAE
from lab.storage import randomness

# Parts of a kind's retain tokens on which a direction fires at most: as many as an SAE has sets.
RATES = (0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1)
PROBE_TOKENS = 20_000  # of each text, at most, from which the logistic regression is learned


def evaluate_directions(heldout: HeldOut, samples: list[Tensor]) -> dict[str, dict[str, Any]]:
    """Unlearning by one direction, found from raw residuals [N, D] of forget text and of every kind
    of retain text.

    The direction is clamped as a feature is, through the same settings, on the same texts. AxBench
    (arXiv 2501.17148) finds such directions ahead of SAEs at steering and detection.
    """
    results, pair = {}, (samples[0], torch.cat(samples[1:]))
    for name, find in (("mean_difference", mean_difference),
                       ("logistic_regression", logistic_regression)):
        sae = one_direction(find(*pair), samples[1:])
        sets = []
        for k, rate in enumerate(RATES):
            feature = torch.tensor([k])
            f_N = sae.encode(samples[0], feature).squeeze(1)
            size = f_N.sum() / (f_N > 0).sum().clamp(min=1)
            sets.append(feature_set(sae, heldout, rate, 1, feature, size[None]))
        results[name] = clamp_and_ask(sae, heldout, sets)
    return results


def mean_difference(forget_ND: Tensor, retain_ND: Tensor) -> Tensor:
    """The direction [D] from the mean of retain to that of forget residuals."""
    return forget_ND.mean(0) - retain_ND.mean(0)


def logistic_regression(forget_ND: Tensor, retain_ND: Tensor) -> Tensor:
    """The direction [D] of a logistic regression on standardised residuals."""
    mixed_N = torch.randperm(len(retain_ND), generator=randomness("yardstick"))
    parts = forget_ND[:PROBE_TOKENS], retain_ND[mixed_N[:PROBE_TOKENS]]
    x, y = torch.cat(parts).numpy(), [True] * len(parts[0]) + [False] * len(parts[1])
    scaler = StandardScaler()
    probe = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.fit_transform(x), y)
    return torch.from_numpy(probe.coef_[0] / scaler.scale_).float()


def one_direction(w_D: Tensor, retain: list[Tensor]) -> ExportedSAE:
    """The direction as an SAE of one feature a rate, all alike but for their thresholds; `retain`
    holds residuals [N, D] by kind."""
    w_D = torch.nn.functional.normalize(w_D, dim=0)
    threshold_F = torch.stack([torch.quantile(x_ND @ w_D, 1 - torch.tensor(RATES))
                               for x_ND in retain if len(x_ND)]).amax(0)
    n = len(RATES)
    return ExportedSAE(w_D[:, None].expand(-1, n).clone(), -threshold_F, w_D.expand(n, -1).clone(),
                       torch.zeros_like(w_D))
