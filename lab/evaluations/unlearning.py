"""Unlearning: what clamping features takes from the forget domain, and at what cost elsewhere."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.console import progress
from lab.evaluations.prompt_trees import Forest
from lab.results.statistics import concave_envelope, frontier_area
from lab.storage import randomness
from lab.substrates.texts import DOMAINS, FORGET, OTHER, RETAIN

ActivationBuffer = Material = TrainedSAE = Any


THRESHOLDS = (0.001, 0.01)  # unlearning: largest firing frequency on retain text
SET_SIZES = (10, 20)  # unlearning: features clamped
MULTIPLIERS = (0.5, 2.0, 8.0, 32.0)  # unlearning: clamp value, in mean activations of the feature
RETAIN_BUDGETS = (0.01, 0.05, 0.1)  # nats of retain cross-entropy
FRONTIER_END = 0.3  # nats of retain cross-entropy up to which the frontier's area is taken
RETAINED = 0.95  # retain accuracy below which a setting counts as too costly for questions


class FeatureStatistics(NamedTuple):
    """How features are used on the learn text of each domain, never on what is asked about."""

    rate_KF: Tensor  # fraction of tokens on which a feature fires
    use_KF: Tensor  # mean activation over all tokens
    size_F: Tensor  # mean activation on the forget tokens on which it fires


@torch.no_grad()
def feature_statistics(trained: TrainedSAE, buffer: ActivationBuffer,
                       tokens: int) -> FeatureStatistics:
    rates, uses = [], []
    for domain in (FORGET, RETAIN):
        sample = buffer.sample(domain, tokens)
        fired, total = torch.zeros(2, trained.sae.d_sae)
        for z in sample.split(4096):
            code = trained.sae.sparse_code(z)
            fired += torch.bincount(code.column_N, minlength=len(fired))
            total.index_add_(0, code.column_N, code.value_N)
        rates.append(fired / len(sample))
        uses.append(total / len(sample))
    size_F = uses[FORGET] / rates[FORGET].clamp(min=1e-12)
    return FeatureStatistics(torch.stack(rates), torch.stack(uses), size_F)


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


@torch.no_grad()
def clamp(trained: TrainedSAE, features: Tensor, targets: Tensor, x: Tensor,
          keep: Tensor) -> Tensor:
    """Residuals x [..., D] after setting each chosen feature to its target wherever it is active.

    Other features and the SAE's error stay: x' = x + scale · Σ_j (target_j − f_j) w_j over active
    chosen j. Where none is active, and at sinks, x' is x to the last bit.
    """
    f = torch.relu((x.float() / trained.scale - trained.sae.b_dec) @ trained.sae.W_enc[:, features]
                   + trained.sae.b_enc[features]) * keep[..., None]
    change = (targets - f).where(f > 0, 0.0) @ trained.sae.W_dec[features] * trained.scale
    return torch.where((f > 0).any(-1, keepdim=True), (x.float() + change).to(x.dtype), x)


class Effect(NamedTuple):
    """What one setting did: rises of cross-entropy by context, right answers by question."""

    rise_R: Tensor  # nats a token, for each frontier context
    right_Q: Tensor  # bool
    asked: bool  # False: asking ended early, the setting costs too much


def apply_setting(trained: TrainedSAE, material: Material, features: Tensor, targets: Tensor,
                  ask: bool) -> Effect:
    """Clamp and measure. What sees no changed residual keeps its baseline, which is exact. Retain
    questions come first, the ones answered by the least margin before the others, and asking ends
    as soon as more answers are lost than any summary admits."""

    def clamped(forest: Forest) -> tuple[Tensor, Tensor]:
        keep_N = forest.x_ND.float().norm(dim=-1) < material.sink_norm
        x_ND = clamp(trained, features, targets, forest.x_ND, keep_N)
        return x_ND, (x_ND != forest.x_ND).any(-1)

    frontier, n = material.frontier, len(material.heldout["rows"])
    log_prob_S = frontier.log_probs(material.lm, *clamped(frontier))
    rise_R = (frontier.base_S - log_prob_S).view(n, -1).mean(1)
    if not ask:
        return Effect(rise_R, torch.ones(0, dtype=torch.bool), False)
    questions = material.questions[0]
    x_ND, touched_N = clamped(questions)
    right_Q = torch.ones(len(questions), dtype=torch.bool)  # the filter's meaning
    order, owner_N = questions.margins().argsort(), questions.branch_N // 10
    most_lost = (1 - RETAINED) * int((questions.domain_Q == RETAIN).sum())
    for domain, at_once in ((RETAIN, 20), (FORGET, len(questions))):
        for part in order[questions.domain_Q[order] == domain].split(at_once):
            here_N = touched_N & torch.isin(owner_N, part)
            log_prob_S = questions.log_probs(material.lm, x_ND, here_N)
            right_Q[part] = questions.right(log_prob_S)[part]
            if int((~right_Q[questions.domain_Q == RETAIN]).sum()) > most_lost:
                return Effect(rise_R, right_Q, False)
    return Effect(rise_R, right_Q, True)


def bootstrap(statistic: Callable[..., float], *samples: np.ndarray,
              repeats: int = 200) -> list[float]:
    """95 % interval of a statistic of samples whose columns (texts, questions) are resampled."""
    rng = np.random.default_rng(0)
    values = [statistic(*(part[:, rng.integers(0, part.shape[1], part.shape[1])]
                          for part in samples)) for _ in range(repeats)]
    return [float(v) for v in np.quantile(values, (0.025, 0.975))]


def unlearning_area(forget_SR: np.ndarray, retain_SR: np.ndarray,
                    other_SR: np.ndarray | None = None) -> float:
    """Area under the frontier of forget rises against the larger of the two retain rises, in
    nats, from cross-entropy rises by setting and context."""
    cost = retain_SR.mean(1)
    if other_SR is not None and other_SR.shape[1]:
        cost = np.maximum(cost, other_SR.mean(1))
    return frontier_area(cost, forget_SR.mean(1), FRONTIER_END)


def official_score(forget_SQ: np.ndarray, retain_SQ: np.ndarray) -> float:
    """1 − the least forget accuracy among settings with retain accuracy ≥ 0.99; 0 if none."""
    allowed = forget_SQ.mean(1)[retain_SQ.mean(1) >= 0.99]
    return float(1 - allowed.min()) if len(allowed) else 0.0


def accuracy_area(forget_SQ: np.ndarray, retain_SQ: np.ndarray) -> float:
    """Area under the frontier of forget accuracy lost against retain accuracy lost."""
    lost = 1 - retain_SQ.mean(1)
    return frontier_area(lost, 1 - forget_SQ.mean(1), 1 - RETAINED)


def evaluate_unlearning(trained: TrainedSAE, material: Material, statistics: FeatureStatistics,
                        seed: int) -> dict[str, Any]:
    """How much of the forget domain goes when its features are clamped, at which cost elsewhere.

    Settings: 2 thresholds × 2 set sizes × multipliers; a chosen feature that is active is set to
    −multiplier times its mean activation on the forget tokens on which it fires. Primary
    number: `area` (nats, higher is better), the mean over costs from 0 to FRONTIER_END of the
    largest forget cross-entropy rise on the concave envelope. A setting's cost is the larger of
    the rises on retain text and on a third text: telling the two labelled texts apart by anything
    but their subject must not pay. (`area_labelled` counts retain text alone.) It is continuous
    where the official `score` (1 − least forget accuracy at retain accuracy ≥ 0.99) is coarse.
    Questions are those that the unmodified model answers; `accuracy_area` is the same area for
    accuracies up to 5 % retain loss, over the settings that keep 95 %; at others accuracies are
    null, since asking ends as soon as more is lost. Limits: cross-entropy on text may rise
    because output is disturbed rather than because knowledge is gone; questions are the
    check on that.
    """
    settings, effects = [], []
    for threshold in THRESHOLDS:
        for size in SET_SIZES:
            features = select_features(statistics.rate_KF, threshold, size)
            for multiplier in MULTIPLIERS:
                settings.append(dict(threshold=threshold, n_features=size, multiplier=multiplier,
                                     n_selected=len(features), features=features))
    done: dict[tuple, Effect] = {}
    for setting in progress(settings, "unlearning"):
        features = setting.pop("features")
        key = (*features.tolist(), setting["multiplier"])
        if key not in done:
            targets = -setting["multiplier"] * statistics.size_F[features]
            done[key] = apply_setting(trained, material, features, targets, ask=True)
        effects.append(done[key])
    control = control_effects(trained, material, statistics, seed)
    return {**summarize_unlearning(settings, effects, material), "control": control,
            "selected": {str(t): select_features(statistics.rate_KF, t, max(SET_SIZES)).tolist()
                         for t in THRESHOLDS}}


def control_effects(trained: TrainedSAE, material: Material, statistics: FeatureStatistics,
                    seed: int) -> list[dict[str, Any]]:
    """The largest set replaced by random features of matched frequency: what any damage costs."""
    chosen = select_features(statistics.rate_KF, max(THRESHOLDS), max(SET_SIZES))
    features = matched_features(statistics.rate_KF, chosen, seed)
    rows = []
    for multiplier in MULTIPLIERS[:2]:
        targets = -multiplier * statistics.size_F[features]
        effect = apply_setting(trained, material, features, targets, ask=False)
        domain_R = material.heldout["domain"][material.heldout["rows"]]
        rows.append({"threshold": None, "n_features": max(SET_SIZES), "multiplier": multiplier,
                     "n_selected": len(features),
                     **{f"{name}_ce_rise": float(effect.rise_R[domain_R == k].mean())
                        for k, name in enumerate(DOMAINS)}})
    return rows


def summarize_unlearning(settings: list[dict], effects: list[Effect], material: Material) -> dict:
    """Settings with their means, the areas and the score with bootstrap intervals, and samples."""
    questions, counts = material.questions
    rises = np.stack([effect.rise_R.numpy() for effect in effects])
    domain_R = material.heldout["domain"][material.heldout["rows"]].numpy()
    texts = [rises[:, domain_R == k] for k in range(len(DOMAINS))]
    right_SQ = np.stack([effect.right_Q.numpy() for effect in effects])
    answers = [right_SQ[:, questions.domain_Q.numpy() == k] for k in (FORGET, RETAIN)]
    enough = min(part.shape[1] for part in answers) >= 1
    for i, setting in enumerate(settings):
        asked = enough and effects[i].asked
        setting |= {f"{name}_accuracy": float(part[i].mean()) if asked else None
                    for name, part in zip(DOMAINS, answers)}
        setting |= {f"{name}_ce_rise": float(part[i].mean()) if part.shape[1] else None
                    for name, part in zip(DOMAINS, texts)}
    result: dict[str, Any] = {"settings": settings, "counts": counts,
                              **{f"n_{name}_questions": part.shape[1]
                                 for name, part in zip(DOMAINS, answers)}}
    usable = texts if texts[OTHER].shape[1] else texts[:OTHER]
    for name, statistic, samples in (("area", unlearning_area, usable),
                                     ("area_labelled", unlearning_area, texts[:OTHER]),
                                     ("accuracy_area", accuracy_area, answers),
                                     ("score", official_score, answers)):
        sound = all(part.shape[1] for part in samples)
        result[name] = statistic(*samples) if sound else None
        result[f"{name}_interval"] = bootstrap(statistic, *samples) if sound else None
    result["score_reason"] = None if enough else "no question of a domain survives the filter"
    cost = np.max([part.mean(1) for part in usable[1:]], axis=0)
    for budget in RETAIN_BUDGETS:
        rise = concave_envelope(cost, texts[FORGET].mean(1), np.array([budget]))
        result[f"forget_rise_at_{budget}"] = float(rise[0])
    result["samples"] = {
        **{f"{name}_rise": np.round(part, 4).tolist() for name, part in zip(DOMAINS, texts)},
        **{f"{name}_right": ["".join("01"[int(v)] for v in row) for row in part]
           for name, part in zip(DOMAINS, answers)}}
    return result
