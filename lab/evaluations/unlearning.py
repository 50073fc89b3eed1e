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
from lab.results.frontier import (
    COST_GRID,
    METRICS,
    OFFICIAL_MULTIPLIERS,
    RETAINED,
    SAE_BENCH_SIZE,
    has_texts,
    summarize,
)
from lab.sparse import ExportedSAE
from lab.storage import randomness
from lab.substrates.texts import FORGET, NAMED, RETAIN, sides

THRESHOLDS = (0.001, 0.01)  # largest firing frequency on retain text of what may be clamped
SET_SIZES = (10, 20, 50, 100)  # features clamped
MULTIPLIERS = tuple(2.0**k for k in range(-1, 9))  # clamp value, in mean activations: 0.5 to 256
START = 8.0  # the multiplier that is measured first
ASKED_OF = ("unlearning_area", "unlearning_area_sae_bench")  # whose settings are asked
NO_EFFECT = 0.025  # nats: where a static clamp costs less, no smaller multiplier is measured
THIRDS = 3  # parts in which contexts that are to be kept are run
QUANTILES = (0.5, 0.9, 0.99)  # of the share of tokens with a chosen feature, on learn retain text
SPARE = 1.1  # times what the frontier affords: beyond it nothing more of a setting is measured


class FeatureStatistics(NamedTuple):
    """How features are used on the learn text of each domain, never on what is asked about."""

    rate_KF: Tensor  # fraction of tokens on which a feature fires
    use_KF: Tensor  # mean activation over all tokens
    size_F: Tensor  # mean activation on the forget tokens on which it fires
    tokens_K: tuple[int, ...]  # of how many tokens these are


def feature_statistics(sae: ExportedSAE, samples: Sequence[Tensor]) -> FeatureStatistics:
    """From raw residuals [N, D] of every domain of learn text, forget text first."""
    rates, uses = [], []
    for sample in samples:
        fired, total = torch.zeros(2, sae.d_sae)
        for x in sample.split(4096) if len(sample) else ():
            code = sae.code(x)
            fired += torch.bincount(code.column_N, minlength=len(fired))
            total.index_add_(0, code.column_N, code.value_N)
        rates.append(fired / max(1, len(sample)))
        uses.append(total / max(1, len(sample)))
    size_F = uses[FORGET] / rates[FORGET].clamp(min=1e-12)
    return FeatureStatistics(torch.stack(rates), torch.stack(uses), size_F,
                             tuple(map(len, samples)))


def select_features(rate_KF: Tensor, threshold: float, n: int) -> Tensor:
    """The n features that fire most on forget text among those that fire on less than `threshold`
    of the tokens of every kind of retain text (Farrell et al. 2024, SAEBench)."""
    rate_F, retain_F = sides(rate_KF)
    rate_F = rate_F.where(retain_F < threshold, 0.0)
    order = rate_F.argsort(descending=True, stable=True)[:n]
    return order[rate_F[order] > 0]


class FeatureSet(NamedTuple):
    """Features that are clamped together, their values, and when a context is left alone."""

    threshold: float
    n_features: int  # asked for; there may be fewer
    features: Tensor
    size_F: Tensor  # mean activation of each of them on the forget tokens on which it fires
    limits: tuple[float, ...]  # shares above which a context is clamped: −1, then QUANTILES


def feature_sets(sae: ExportedSAE, heldout: HeldOut,
                 statistics: FeatureStatistics) -> list[FeatureSet]:
    """Every threshold with every size, each set of features once."""
    sets: dict[tuple, FeatureSet] = {}
    for threshold in THRESHOLDS:
        for n in SET_SIZES:
            features = select_features(statistics.rate_KF, threshold, n)
            if len(features) and tuple(features.tolist()) not in sets:
                sets[tuple(features.tolist())] = feature_set(
                    sae, heldout, threshold, n, features, statistics.size_F[features])
    return list(sets.values())


def feature_set(sae: ExportedSAE, heldout: HeldOut, threshold: float, n: int, features: Tensor,
                size_F: Tensor) -> FeatureSet:
    """With limits from quantiles of the share of tokens with a chosen feature, by context of learn
    retain text (Dynamic SAE Guardrails, arXiv 2504.08192)."""
    share_N = fires(sae, features, heldout["guard_x"], heldout["guard_keep"]).float().mean(1)
    limits = torch.quantile(share_N, torch.tensor(QUANTILES)).tolist()
    return FeatureSet(threshold, n, features, size_F, (-1.0, *limits))


@torch.no_grad()
def fires(sae: ExportedSAE, features: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """Whether any of the features is active, bool of the shape of `keep`."""
    return (sae.encode(x.float(), features) > 0).any(-1) & keep


class Clamp(NamedTuple):
    """Features, and the value that each is set to wherever it is active, in raw units."""

    features: Tensor
    targets: Tensor

    @torch.no_grad()
    def of(self, sae: ExportedSAE, x: Tensor, keep: Tensor) -> Tensor:
        """Residuals x [..., D] under the clamp: x' = x + Σ_j (target_j − f_j) w_j over active j.

        Other features and the SAE's error stay. Where none is active, and at sinks (not `keep`),
        x' is x to the last bit. Sets of which the same features are active give the same bits.
        """
        order = self.features.argsort()
        features, x_ND = self.features[order], x.float().flatten(0, -2)
        active = (sae.encode(x_ND, features) > 0) & keep.flatten()[:, None]
        place_A, which_A = active.nonzero(as_tuple=True)
        w_AD, b_A = sae.W_enc.T[features[which_A]], sae.b_enc[features[which_A]]
        f_A = torch.linalg.vecdot(x_ND[place_A] - sae.b_dec, w_AD) + b_A
        change_AD = (self.targets[order][which_A] - f_A)[:, None] * sae.W_dec[features[which_A]]
        return x_ND.index_add(0, place_A, change_AD).to(x.dtype).view_as(x)


def clamped(sae: ExportedSAE, heldout: HeldOut, clamp: Clamp,
            trees: PromptTrees) -> tuple[Tensor, Tensor]:
    """Residuals under the clamp, and which tokens' differ."""
    x_ND = clamp.of(sae, trees.x_ND, heldout.substrate.is_plain(trees.x_ND))
    return x_ND, (x_ND != trees.x_ND).any(-1)


def rises(sae: ExportedSAE, heldout: HeldOut, clamp: Clamp, run_R: Tensor) -> Tensor:
    """Rise of cross-entropy in nats a token of the frontier contexts `run_R`, 0 of others, [R]."""
    frontier, n = heldout.frontier, len(heldout["rows"])
    x_ND, touched_N = clamped(sae, heldout, clamp, frontier)
    touched_N &= run_R[torch.arange(len(touched_N)) // (len(touched_N) // n)]
    log_prob_S = frontier.log_probs(heldout.substrate.lm, x_ND, touched_N)
    return (frontier.base_S - log_prob_S).view(n, -1).mean(1)


class Measurement:
    """Rises of the frontier contexts under static clamps of a feature set, as far as anything can
    afford them.

    A dynamic clamp's rise is the static one's where the context's share is above the limit, and 0
    elsewhere: it needs no forward pass. Costs grow with the multiplier, if not strictly. So larger
    ones are tried while a variant may be afforded by a kind of text that is to be kept, smaller
    ones while the static clamp has a cost. Contexts of a kind are run while a variant that clamps
    them is not far beyond what this kind affords on both halves, whatever the rest of them adds.
    """

    def __init__(self, sae: ExportedSAE, heldout: HeldOut, chosen: FeatureSet):
        self.sae, self.heldout, self.chosen = sae, heldout, chosen
        x, keep = heldout.of_frontier("x"), heldout.of_frontier("keep")
        self.share_R = fires(sae, chosen.features, x, keep).float().mean(1).numpy()
        self.rise_MR = np.full((len(MULTIPLIERS), len(x)), np.nan)  # nats; NaN: not measured
        self.kinds = kinds_of(heldout)
        every = {kind: list(chosen.limits) for kind in self.kinds if kind != NAMED[FORGET]}
        limits, start = every, MULTIPLIERS.index(START)
        for m in range(start, len(MULTIPLIERS)):
            if any(limits.values()):
                limits = self.run_(m, limits)
        for m in reversed(range(start)):
            if max((max(self.costs(m + 1, kind, -1.0)) for kind in every), default=0) > NO_EFFECT:
                self.run_(m, every)

    def run_(self, m: int, limits: dict[str, list[float]]) -> dict[str, list[float]]:
        """Measure what the variants with these limits clamp; returns those that may be afforded."""
        place_R = sum((np.cumsum(of) - 1) * of for of in self.kinds.values())
        for third in range(THIRDS):
            self.run_contexts_(m, place_R // 2 % THIRDS == third, limits)  # all kinds at once
            limits = {kind: [limit for limit in left
                             if min(self.costs(m, kind, limit)) <= SPARE * COST_GRID[-1]]
                      for kind, left in limits.items()}
        self.run_contexts_(m, place_R >= 0, {NAMED[FORGET]: sum(limits.values(), [])})
        return limits

    def run_contexts_(self, m: int, among_R: np.ndarray, limits: dict[str, list[float]]) -> None:
        least_R = np.full(len(among_R), math.inf)
        for kind, left in limits.items():
            least_R[self.kinds.get(kind, [])] = min(left, default=math.inf)
        run_R = among_R & (self.share_R > least_R)
        if run_R.any():
            clamp = Clamp(self.chosen.features, -MULTIPLIERS[m] * self.chosen.size_F)
            rise_R = rises(self.sae, self.heldout, clamp, torch.from_numpy(run_R)).numpy()
            self.rise_MR[m, run_R] = rise_R[run_R]

    def costs(self, m: int, kind: str, limit: float) -> list[float]:
        """A variant's mean rise on each half of a kind's contexts; what was not run counts as 0."""
        rise_R = np.where(self.share_R > limit, np.nan_to_num(self.rise_MR[m]), 0.0)
        return [float(rise_R[self.kinds[kind]][half::2].mean()) for half in (0, 1)]


def answers(sae: ExportedSAE, heldout: HeldOut, chosen: FeatureSet, multiplier: float,
            limit: float) -> tuple[Tensor, bool]:
    """Right answers [Q] under a static or dynamic clamp, and whether all was asked.

    Questions of which nothing is touched keep their right answer: the filter let no other through.
    Retain questions come first, the ones answered by the least margin before the others. Asking
    ends as soon as more answers are lost, of either half of them, than any summary admits.
    """
    questions, _ = heldout.asked
    x_ND, touched_N = clamped(sae, heldout, Clamp(chosen.features, -multiplier * chosen.size_F),
                              questions)
    owner_N, n = questions.owner_N, len(questions)
    touched_N &= (shares(sae, heldout, chosen.features) > limit)[owner_N]
    touched_Q = torch.bincount(owner_N[touched_N], minlength=n) > 0
    right_Q = torch.ones(n, dtype=torch.bool)
    order, retain = questions.margins().argsort(), (questions.domain_Q == RETAIN).nonzero()[:, 0]
    for domain, at_once in ((RETAIN, 20), (FORGET, max(1, n))):
        for part in order[questions.domain_Q[order] == domain].split(at_once):
            here_N = touched_N & torch.isin(owner_N, part)
            log_prob_S = questions.log_probs(heldout.substrate.lm, x_ND, here_N)
            right_Q[part] = (questions.right(log_prob_S) | ~touched_Q)[part]
            lost = (~right_Q[retain]).double()
            if len(lost) > 1 and min(lost[half::2].mean() for half in (0, 1)) > 1 - RETAINED:
                return right_Q, False
    return right_Q, True


def shares(sae: ExportedSAE, heldout: HeldOut, features: Tensor) -> Tensor:
    """By question [Q]: of the tokens of prompt and options, those with a chosen feature."""
    questions, _ = heldout.asked
    fires_N = fires(sae, features, questions.x_ND, heldout.substrate.is_plain(questions.x_ND))
    fired_Q, all_Q = (torch.bincount(questions.owner_N[among_N], minlength=len(questions))
                      for among_N in (fires_N & ~questions.is_empty_N, ~questions.is_empty_N))
    return fired_Q / all_Q.clamp(min=1)


def evaluate_unlearning(sae: ExportedSAE, heldout: HeldOut, statistics: FeatureStatistics,
                        seed: int) -> dict[str, Any]:
    """How much of the forget domain goes when its features are clamped, at which cost elsewhere.

    A chosen feature that is active is set to −multiplier times its mean activation on the forget
    tokens on which it fires. Settings: THRESHOLDS × SET_SIZES × MULTIPLIERS × limits. A static
    clamp acts on every context. A dynamic one leaves a context alone unless the share of its tokens
    with a chosen feature is above a limit from learn retain text. Primary number: `unlearning_area`
    in nats, higher is better: the forget cross-entropy rise over costs from 0 to FRONTIER_END,
    chosen on one half of the contexts and judged on the other (`crossfitted`). A setting's cost is
    its largest rise over retain text and every unnamed text: telling the labelled texts apart by
    anything but their subject must not pay. In no context do rises count beyond that of a model
    that knows nothing at the hook. Limit: rises may be of disturbed output, not of lost knowledge.
    """
    sets = feature_sets(sae, heldout, statistics)
    control = control_set(statistics, seed)
    return {**clamp_and_ask(sae, heldout, sets),
            "control": control_rises(sae, heldout, control),
            "frequency_tokens": dict(zip(heldout.substrate.learn_domains, statistics.tokens_K)),
            "selected": {str(t): select_features(statistics.rate_KF, t, max(SET_SIZES)).tolist()
                         for t in THRESHOLDS}}


def clamp_and_ask(sae: ExportedSAE, heldout: HeldOut, sets: list[FeatureSet]) -> dict[str, Any]:
    """Rises of every set, then answers under the settings that the frontiers use."""
    kinds = kinds_of(heldout)
    measured = [numbers(Measurement(sae, heldout, one))
                for one in progress(sets, "unlearning, feature sets")]
    part = {"contexts": {name: int(of.sum()) for name, of in kinds.items()}, "sets": measured,
            "reference_rise": []}
    if NAMED[FORGET] in kinds:
        blank_R = (heldout["blank"] - heldout["base"]).mean(1).numpy()[kinds[NAMED[FORGET]]]
        part["reference_rise"] = np.round(blank_R, 4).tolist()
    asked = [ask(sae, heldout, sets[s], s, m, i)
             for s, m, i in progress(worth_asking(part, sets), "unlearning, questions")]
    part |= {"asked": asked, "counts": heldout.asked[1]}
    return {**part, **summarize(part, heldout.substrate.sizes.least_questions)}


def kinds_of(heldout: HeldOut) -> dict[str, np.ndarray]:
    """The frontier contexts of each kind of text, bool [R]; of kinds with one for each half."""
    kinds = {name: (heldout.domain_R == k).numpy()
             for k, name in enumerate(heldout.substrate.domains)}
    return {name: of for name, of in kinds.items() if of.sum() > 1}


def worth_asking(part: dict[str, Any], sets: list[FeatureSet]) -> list[tuple[int, int, int]]:
    """Settings that the primary frontier or SAEBench's uses, and those that all sets of SAEBench's
    sizes are asked under; (set, multiplier, limit)."""
    wanted = {(s, m, 0) for s, one in enumerate(sets) if one.n_features <= SAE_BENCH_SIZE
              for m, multiplier in enumerate(MULTIPLIERS) if multiplier in OFFICIAL_MULTIPLIERS}
    for metric in (METRICS[name] for name in ASKED_OF if has_texts(part)):
        labels, used_S = metric.variants(part).labels, metric.policy(part).any(0)
        wanted |= {labels[i] for i in used_S.nonzero()[0]}
    return sorted(wanted)


def ask(sae: ExportedSAE, heldout: HeldOut, chosen: FeatureSet, s: int, m: int,
        i: int) -> dict[str, Any]:
    right_Q, whole = answers(sae, heldout, chosen, MULTIPLIERS[m], chosen.limits[i])
    domain_Q = heldout.asked[0].domain_Q
    right = {name: "".join("01"[int(mark)] for mark in right_Q[domain_Q == k])
             for k, name in enumerate(NAMED)}
    return {"set": s, "n_features": chosen.n_features, "multiplier": MULTIPLIERS[m], "limit": i,
            "whole": whole, "right": right}


def control_set(statistics: FeatureStatistics, seed: int) -> FeatureSet:
    """SAEBench's largest set replaced by random features of matched frequency, under static clamps:
    what any damage costs."""
    chosen = select_features(statistics.rate_KF, max(THRESHOLDS), SAE_BENCH_SIZE)
    features = matched_features(statistics.rate_KF, chosen, seed)
    return FeatureSet(max(THRESHOLDS), SAE_BENCH_SIZE, features, statistics.size_F[features],
                      (-1.0,))


def control_rises(sae: ExportedSAE, heldout: HeldOut, control: FeatureSet) -> list[dict[str, Any]]:
    """Mean rises by kind of text under static clamps of a set, by OFFICIAL_MULTIPLIERS."""
    every_R, rows = torch.ones(len(heldout["rows"]), dtype=torch.bool), []
    for multiplier in OFFICIAL_MULTIPLIERS:
        clamp = Clamp(control.features, -multiplier * control.size_F)
        rise_R = rises(sae, heldout, clamp, every_R).numpy()
        rows.append({"threshold": control.threshold, "n_features": control.n_features,
                     "n_selected": len(control.features), "multiplier": multiplier,
                     **{f"{kind}_ce_rise": float(rise_R[of].mean())
                        for kind, of in kinds_of(heldout).items()}})
    return rows


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


def numbers(measured: Measurement) -> dict[str, Any]:
    """What a result keeps of a set: enough to compute every area anew, also on other texts.

    Shares are whole: rounded, one could be above a limit that it equals.
    """
    chosen = measured.chosen
    return {"threshold": chosen.threshold, "n_features": chosen.n_features,
            "n_selected": len(chosen.features), "limits": list(chosen.limits),
            "multipliers": list(MULTIPLIERS),
            "share": {name: measured.share_R[of].tolist() for name, of in measured.kinds.items()},
            "rise": {name: np.round(measured.rise_MR[:, of], 4).tolist()
                     for name, of in measured.kinds.items()}}
