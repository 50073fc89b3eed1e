"""Unlearning: what clamping features takes from the forget domain, and at what cost elsewhere."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.console import progress
from lab.evaluations.heldout import HeldOut
from lab.evaluations.prompt_trees import PromptTrees
from lab.results.statistics import (
    RETAINED,
    accuracy_area,
    concave_envelope,
    interval,
    official_score,
    resampled,
    unlearning_area,
)
from lab.sparse import ExportedSAE
from lab.storage import randomness
from lab.substrates.texts import DOMAINS, FORGET, OTHER, RETAIN

THRESHOLDS = (0.001, 0.01)  # largest firing frequency on retain text of what may be clamped
SET_SIZES = (10, 20)  # features clamped
MULTIPLIERS = (0.5, 2.0, 8.0, 32.0)  # clamp value, in mean activations of the feature
COSTS = (0.01, 0.05, 0.1)  # nats at which the frontier is reported


class FeatureStatistics(NamedTuple):
    """How features are used on the learn text of each domain, never on what is asked about."""

    rate_KF: Tensor  # fraction of tokens on which a feature fires
    use_KF: Tensor  # mean activation over all tokens
    size_F: Tensor  # mean activation on the forget tokens on which it fires
    tokens_K: tuple[int, ...]  # of how many tokens these are


def feature_statistics(sae: ExportedSAE, samples: Sequence[Tensor]) -> FeatureStatistics:
    """From raw residuals [N, D] of forget and of retain text."""
    rates, uses = [], []
    for sample in samples:
        fired, total = torch.zeros(2, sae.d_sae)
        for x in sample.split(4096):
            code = sae.code(x)
            fired += torch.bincount(code.column_N, minlength=len(fired))
            total.index_add_(0, code.column_N, code.value_N)
        rates.append(fired / len(sample))
        uses.append(total / len(sample))
    size_F = uses[FORGET] / rates[FORGET].clamp(min=1e-12)
    return FeatureStatistics(torch.stack(rates), torch.stack(uses), size_F,
                             tuple(map(len, samples)))


def select_features(rate_KF: Tensor, threshold: float, n: int) -> Tensor:
    """The n features that fire most on forget text among those that fire on less than `threshold`
    of retain tokens (Farrell et al. 2024, SAEBench)."""
    rate_F = rate_KF[FORGET].where(rate_KF[RETAIN] < threshold, 0.0)
    order = rate_F.argsort(descending=True, stable=True)[:n]
    return order[rate_F[order] > 0]


def matched_features(rate_KF: Tensor, chosen: Tensor, seed: int) -> Tensor:
    """Random other features that fire about as often on forget text as the chosen ones."""
    distance = (rate_KF[FORGET][:, None] - rate_KF[FORGET][chosen]).abs()
    distance[chosen] = math.inf
    picks: list[int] = []
    for column, rank in enumerate(torch.randint(0, 10, (len(chosen),),
                                                generator=randomness("control", seed))):
        near = distance[:, column].argsort(stable=True).tolist()
        picks.append([i for i in near[:40] if i not in picks][int(rank)])
    return torch.tensor(picks, dtype=torch.long)


class Clamp(NamedTuple):
    """Features, and the value that each is set to wherever it is active, in raw units."""

    features: Tensor
    targets: Tensor

    @torch.no_grad()
    def of(self, sae: ExportedSAE, x: Tensor, keep: Tensor) -> Tensor:
        """Residuals x [..., D] under the clamp: x' = x + Σ_j (target_j − f_j) w_j over active j.

        Other features and the SAE's error stay. Where none is active, and at sinks (not `keep`),
        x' is x to the last bit.
        """
        f = sae.encode(x.float(), self.features) * keep[..., None]
        change = (self.targets - f).where(f > 0, 0.0) @ sae.W_dec[self.features]
        return torch.where((f > 0).any(-1, keepdim=True), (x.float() + change).to(x.dtype), x)


class Effect(NamedTuple):
    """What one setting did: rises of cross-entropy by context, right answers by question."""

    rise_R: Tensor  # nats a token, for each frontier context
    right_Q: Tensor  # bool
    asked: bool  # False: asking ended early, the setting costs too much


def rises(sae: ExportedSAE, heldout: HeldOut, clamp: Clamp) -> Tensor:
    """Rise of cross-entropy of each frontier context [R], in nats a token."""
    frontier = heldout.frontier
    log_prob_S = frontier.log_probs(heldout.substrate.lm, *clamped(sae, heldout, clamp, frontier))
    return (frontier.base_S - log_prob_S).view(len(heldout["rows"]), -1).mean(1)


def clamped(sae: ExportedSAE, heldout: HeldOut, clamp: Clamp,
            trees: PromptTrees) -> tuple[Tensor, Tensor]:
    """Residuals under the clamp, and which tokens' differ. What sees none of these keeps its
    unmodified output, which is exact."""
    x_ND = clamp.of(sae, trees.x_ND, heldout.substrate.is_plain(trees.x_ND))
    return x_ND, (x_ND != trees.x_ND).any(-1)


def answers(sae: ExportedSAE, heldout: HeldOut, clamp: Clamp) -> tuple[Tensor, bool]:
    """Right answers [Q], and whether all was asked.

    Retain questions come first, the ones answered by the least margin before the others. Asking
    ends as soon as more answers are lost than any summary admits.
    """
    questions, _ = heldout.asked
    x_ND, touched_N = clamped(sae, heldout, clamp, questions)
    right_Q = torch.ones(len(questions), dtype=torch.bool)  # the filter's meaning
    order, owner_N = questions.margins().argsort(), questions.owner_N
    most_lost = (1 - RETAINED) * int((questions.domain_Q == RETAIN).sum())
    for domain, at_once in ((RETAIN, 20), (FORGET, len(questions))):
        for part in order[questions.domain_Q[order] == domain].split(max(1, at_once)):
            here_N = touched_N & torch.isin(owner_N, part)
            log_prob_S = questions.log_probs(heldout.substrate.lm, x_ND, here_N)
            right_Q[part] = questions.right(log_prob_S)[part]
            if int((~right_Q[questions.domain_Q == RETAIN]).sum()) > most_lost:
                return right_Q, False
    return right_Q, True


def evaluate_unlearning(sae: ExportedSAE, heldout: HeldOut, statistics: FeatureStatistics,
                        seed: int) -> dict[str, Any]:
    """How much of the forget domain goes when its features are clamped, at which cost elsewhere.

    Settings: 2 thresholds × 2 set sizes × multipliers. A chosen feature that is active is set to
    −multiplier times its mean activation on the forget tokens on which it fires. Primary number:
    `area` in nats, higher is better: the largest forget cross-entropy rise on the concave envelope,
    averaged over costs from 0 to FRONTIER_END. A setting's cost is the larger of the rises on
    retain text and on a third text: telling the two labelled texts apart by anything but their
    subject must not pay. `area_labelled` counts retain text alone. `score` is SAEBench's, and
    coarse. `accuracy_area` is the area of question accuracies, over settings that keep 95 % of the
    retain answers; at others accuracies are null. Both are null, for a `score_reason`, where too
    few questions survive the filter. Limit: cross-entropy may rise because output is disturbed
    rather than because knowledge is gone. The questions are the check on that.
    """
    settings, effects = [], []
    for threshold in THRESHOLDS:
        for size in SET_SIZES:
            features = select_features(statistics.rate_KF, threshold, size)
            for multiplier in MULTIPLIERS:
                settings.append(dict(threshold=threshold, n_features=size, multiplier=multiplier,
                                     n_selected=len(features), features=features))
    done: dict[tuple, Effect] = {}
    for setting in progress(settings, "unlearning settings"):
        features = setting.pop("features")
        key = (*features.tolist(), setting["multiplier"])
        if key not in done:
            clamp = Clamp(features, -setting["multiplier"] * statistics.size_F[features])
            done[key] = Effect(rises(sae, heldout, clamp), *answers(sae, heldout, clamp))
        effects.append(done[key])
    return {**summarize_unlearning(settings, effects, heldout),
            "frequency_tokens": dict(zip(DOMAINS, statistics.tokens_K)),
            "control": control_effects(sae, heldout, statistics, seed),
            "selected": {str(t): select_features(statistics.rate_KF, t, max(SET_SIZES)).tolist()
                         for t in THRESHOLDS}}


def control_effects(sae: ExportedSAE, heldout: HeldOut, statistics: FeatureStatistics,
                    seed: int) -> list[dict[str, Any]]:
    """The largest set replaced by random features of matched frequency: what any damage costs."""
    chosen = select_features(statistics.rate_KF, max(THRESHOLDS), max(SET_SIZES))
    features = matched_features(statistics.rate_KF, chosen, seed)
    rows = []
    for multiplier in MULTIPLIERS[:2]:
        rise_R = rises(sae, heldout, Clamp(features, -multiplier * statistics.size_F[features]))
        rows.append({"threshold": None, "n_features": max(SET_SIZES), "multiplier": multiplier,
                     "n_selected": len(features),
                     **{f"{name}_ce_rise": float(rise_R[heldout.domain_R == k].mean())
                        for k, name in enumerate(DOMAINS)}})
    return rows


def summarize_unlearning(settings: list[dict], effects: list[Effect],
                         heldout: HeldOut) -> dict[str, Any]:
    """Settings with their means, the areas and the score with bootstrap intervals, and samples."""
    questions, counts = heldout.asked
    rise_SR = np.stack([effect.rise_R.numpy() for effect in effects])
    texts = [rise_SR[:, heldout.domain_R.numpy() == k] for k in range(len(DOMAINS))]
    right_SQ = np.stack([effect.right_Q.numpy() for effect in effects])
    replies = [right_SQ[:, questions.domain_Q.numpy() == k] for k in (FORGET, RETAIN)]
    reason = too_few(replies, heldout.substrate.sizes.least_questions)
    for i, setting in enumerate(settings):
        asked = effects[i].asked
        setting |= {f"{name}_accuracy": float(part[i].mean()) if asked and part.shape[1] else None
                    for name, part in zip(DOMAINS, replies)}
        setting |= {f"{name}_ce_rise": float(part[i].mean()) if part.shape[1] else None
                    for name, part in zip(DOMAINS, texts)}
    return {"settings": settings, "counts": counts,
            **{f"n_{name}_questions": part.shape[1] for name, part in zip(DOMAINS, replies)},
            **areas(texts, replies, enough=reason is None), "score_reason": reason,
            "samples": {
                **{f"{name}_rise": np.round(part, 4).tolist()
                   for name, part in zip(DOMAINS, texts)},
                **{f"{name}_right": ["".join("01"[int(v)] for v in row) for row in part]
                   for name, part in zip(DOMAINS, replies)}}}


def too_few(replies: list[np.ndarray], least: int) -> str | None:
    """Why there is no score; None where enough questions of both domains are asked."""
    few = [f"{part.shape[1]} {name} questions" for name, part in zip(DOMAINS, replies)
           if part.shape[1] < max(1, least)]
    return f"{' and '.join(few)} survive the filter; a score needs {least}" if few else None


def areas(texts: list[np.ndarray], replies: list[np.ndarray], enough: bool) -> dict[str, Any]:
    """Summary numbers with 95 % intervals over texts or questions, and the frontier at COSTS.

    What is measured on texts or questions that there are none of, or not `enough`, is None.
    """
    usable = texts if texts[OTHER].shape[1] else texts[:OTHER]
    labelled = all(part.shape[1] for part in texts[:OTHER])
    result: dict[str, Any] = {}
    for name, statistic, samples, sound in (("area", unlearning_area, usable, labelled),
                                            ("area_labelled", unlearning_area, texts[:OTHER],
                                             labelled),
                                            ("accuracy_area", accuracy_area, replies, enough),
                                            ("score", official_score, replies, enough)):
        result[name] = statistic(*samples) if sound else None
        result[f"{name}_interval"] = interval(resampled(statistic, *samples)) if sound else None
    if not labelled:
        return {**result, **{f"forget_rise_at_{at}": None for at in COSTS}}
    cost = np.max([part.mean(1) for part in usable[1:]], axis=0)
    gain = concave_envelope(cost, texts[FORGET].mean(1), np.array(COSTS))
    return {**result, **{f"forget_rise_at_{at}": float(rise) for at, rise in zip(COSTS, gain)}}
