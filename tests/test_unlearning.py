"""Unlearning: which features are clamped, what a clamp does, what is measured and what is not."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_substrate import (
    QUESTIONS,
    identity_sae,
    knowing_substrate,
    random_sae,
    rare_sae,
    tiny_substrate,
)

from lab.evaluations import unlearning
from lab.evaluations.heldout import HeldOut
from lab.evaluations.prompt_trees import Questions
from lab.evaluations.unlearning import (
    ASKED_OF,
    MULTIPLIERS,
    NO_EFFECT,
    QUANTILES,
    SET_SIZES,
    START,
    Clamp,
    FeatureSet,
    Measurement,
    answers,
    evaluate_unlearning,
    feature_sets,
    feature_statistics,
    matched_features,
    numbers,
    rises,
    select_features,
    shares,
)
from lab.language_model import losses
from lab.results.frontier import (
    AREAS,
    COST_GRID,
    EVERY,
    METRICS,
    OFFICIAL_MULTIPLIERS,
    SAE_BENCH_SIZE,
    crossfitted,
    summarize,
    text_tables,
    unlearning_area,
)
from lab.storage import to_json
from lab.substrates.texts import FORGET, RETAIN

# -- Which features --------------------------------------------------------------------------------


def test_features_are_chosen_by_their_firing_on_forget_and_retain_text():
    #                     forget                      retain
    rate = torch.tensor([[0.5, 0.4, 0.3, 0.0, 0.2], [0.02, 0.005, 0.0, 0.0, 0.0005]])
    assert select_features(rate, 0.01, 10).tolist() == [1, 2, 4]
    assert select_features(rate, 0.001, 1).tolist() == [2]
    assert select_features(rate, 1e-9, 5).tolist() == [2]
    assert select_features(rate, 0.005, 5).tolist() == [2, 4]  # at the threshold is too often
    assert len(select_features(torch.zeros(2, 5), 0.01, 5)) == 0


def test_a_feature_that_fires_on_one_kind_of_retain_text_is_not_chosen():
    #                     forget           one kind         another
    rate = torch.tensor([[0.5, 0.4, 0.3], [0.0, 0.02, 0.0], [0.02, 0.0, 0.009]])
    assert select_features(rate, 0.01, 10).tolist() == [2]


def test_use_of_features_by_hand():
    """Four forget tokens, two retain tokens; features are the parts of two coordinates."""
    forget = torch.tensor([[3.0, 0], [1.0, -2], [0, 0], [0, 0]])
    retain = torch.tensor([[0, 5.0], [0, 0]])
    statistics = feature_statistics(identity_sae(2), [forget, retain])
    assert statistics.rate_KF.tolist() == [[0.5, 0, 0, 0.25], [0, 0.5, 0, 0]]
    assert statistics.use_KF.tolist() == [[1.0, 0, 0, 0.5], [0, 2.5, 0, 0]]
    assert statistics.size_F.tolist() == [2.0, 0, 0, 2.0]  # on the forget tokens where it fires
    assert statistics.tokens_K == (4, 2)


def test_features_that_never_fire_are_never_chosen():
    statistics = feature_statistics(random_sae(bias=-1e6), [torch.randn(50, 32)] * 2)
    assert len(select_features(statistics.rate_KF, 0.01, 10)) == 0
    assert bool(torch.isfinite(statistics.size_F).all())


def test_control_features_fire_as_often_and_are_others(generator):
    rate = torch.rand(2, 200, generator=generator)
    chosen = rate[0].topk(10).indices
    control = matched_features(rate, chosen, seed=0)
    assert len(set(control.tolist())) == 10
    assert not set(control.tolist()) & set(chosen.tolist())
    assert float((rate[0][control] - rate[0][chosen]).abs().max()) < 0.3
    assert torch.equal(control, matched_features(rate, chosen, seed=0))
    assert not torch.equal(control, matched_features(rate, chosen, seed=1))


# -- What a clamp does -----------------------------------------------------------------------------


def test_a_clamp_by_hand():
    """x' = x + (target − f) w where the feature is active and the token is no sink."""
    x = torch.tensor([[2.0, -4, 0, 6], [-2, 4, 1, 1], [2, 0, 0, 0]])
    keep = torch.tensor([True, True, False])
    # feature 0 is the positive part of coordinate 0, active on rows 0 and 2; row 2 is a sink
    changed = Clamp(torch.tensor([0]), torch.tensor([-5.0])).of(identity_sae(4), x, keep)
    expected = x.clone()
    expected[0, 0] = -5.0
    assert torch.equal(changed, expected)


def test_a_clamp_leaves_other_features_and_the_saes_error_alone(generator):
    sae, x = random_sae(d=6, f=24, bias=0.0), torch.randn(50, 6, generator=generator)
    chosen, targets = torch.tensor([3, 7]), torch.tensor([-0.3, -0.7])
    f = sae.encode(x)
    g = f.clone()
    g[:, chosen] = torch.where(f[:, chosen] > 0, targets, f[:, chosen])
    expected = x + (g - f) @ sae.W_dec
    changed = Clamp(chosen, targets).of(sae, x, torch.ones(50, dtype=torch.bool))
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=1e-5)
    idle = (f[:, chosen] == 0).all(1)
    assert 0 < int(idle.sum()) < 50
    assert torch.equal(changed[idle], x[idle])


def test_sets_of_which_the_same_features_are_active_give_the_same_bits(generator):
    """Whatever else is in them, and in which order."""
    sae, x = random_sae(f=24, bias=-0.5), torch.randn(400, 32, generator=generator)
    few, many = torch.tensor([7, 3, 5]), torch.tensor([3, 9, 7, 5, 11])
    targets, everywhere = -torch.rand(24, generator=generator), torch.ones(400, dtype=torch.bool)
    one, other = (Clamp(chosen, targets[chosen]).of(sae, x, everywhere) for chosen in (few, many))
    active = sae.encode(x) > 0
    alike = ~active[:, [9, 11]].any(1)
    assert int((alike & (active[:, few].sum(1) > 1)).sum()) > 5
    assert torch.equal(one[alike], other[alike])
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_clamp_keeps_the_precision_of_the_residuals(generator, dtype):
    x = torch.randn(50, 6, generator=generator).to(dtype)
    changed = Clamp(torch.arange(3), torch.full((3,), -9.0)).of(
        random_sae(d=6, f=24, bias=-1.0), x, torch.ones(50, dtype=torch.bool))
    assert changed.dtype == dtype
    same = (changed == x).all(1)
    assert 0 < int(same.sum()) < 50


# -- Asking ----------------------------------------------------------------------------------------


class Asked:
    """Questions whose answers are known: `wrong` are lost under the clamp. Counts who is asked.

    Each has as many tokens as `fires` has letters: f where the feature fires, e where it fires in
    the tree of the empty prompt.
    """

    def __init__(self, n_forget, n_retain, wrong, fires):
        n = n_forget + n_retain
        letters = [letter for _ in range(n) for letter in fires]
        self.domain_Q = torch.tensor([FORGET] * n_forget + [RETAIN] * n_retain)
        self.owner_N = torch.arange(n).repeat_interleave(len(fires))
        self.x_ND = torch.tensor([[float(letter in "fe"), 0.0] for letter in letters])
        self.is_empty_N = torch.tensor([letter in "e_" for letter in letters])
        self.wrong, self.asked = torch.tensor(wrong, dtype=torch.long), []

    def __len__(self):
        return len(self.domain_Q)

    def margins(self):  # the last retain question is the least sure
        return torch.arange(len(self), 0, -1.0)

    def log_probs(self, lm, x_ND, touched_N):
        self.asked.append(self.owner_N[touched_N].unique().tolist())
        return touched_N

    def right(self, touched_N):
        right_Q = torch.ones(len(self), dtype=torch.bool)
        right_Q[self.wrong] = False
        return right_Q


def ask(n_forget, n_retain, wrong, limit=-1.0, fires="f"):
    questions = Asked(n_forget, n_retain, wrong, fires)
    substrate = SimpleNamespace(lm=None, is_plain=lambda x: torch.ones(len(x), dtype=torch.bool))
    chosen = FeatureSet(0.01, 1, torch.tensor([0]), torch.tensor([1.0]), (-1.0, limit))
    heldout = SimpleNamespace(asked=(questions, {}), substrate=substrate)
    return (*answers(identity_sae(2), heldout, chosen, 1.0, limit), questions)


def test_all_questions_are_asked_where_the_retain_answers_stay():
    right_Q, whole, questions = ask(5, 60, wrong=[0, 3, 7])  # one retain answer of 60 lost
    assert whole
    assert (~right_Q).nonzero()[:, 0].tolist() == [0, 3, 7]
    assert sorted(sum(questions.asked, [])) == list(range(65))


def test_asking_ends_as_soon_as_too_many_retain_answers_of_each_half_are_lost():
    """More than 5 % of 30, among the twenty least sure: no forget question is asked any more."""
    right_Q, whole, questions = ask(5, 60, wrong=[0, 61, 62, 63, 64])
    assert not whole
    assert questions.asked == [list(range(45, 65))]
    assert bool(right_Q[:5].all())


def test_a_setting_that_one_half_of_the_retain_questions_affords_is_asked_to_the_end():
    """It may be chosen on that half. Retain questions of odd place are all lost."""
    right_Q, whole, _ = ask(4, 60, wrong=[0, *range(5, 64, 2)])
    assert whole
    assert int((~right_Q).sum()) == 31


def test_questions_of_which_nothing_is_touched_count_as_right():
    """Whatever the model would answer: the filter let only right answers through."""
    for limit, fires in ((-1.0, "-"), (0.5, "f-"), (0.99, "fff-")):
        right_Q, whole, questions = ask(5, 60, wrong=range(65), limit=limit, fires=fires)
        assert whole
        assert bool(right_Q.all())
        assert sum(questions.asked, []) == []
    assert not ask(5, 60, wrong=range(65), limit=0.49, fires="f-")[1]


def test_the_share_of_a_question_is_of_prompt_and_options_not_of_the_empty_prompt():
    questions = Asked(1, 1, [], "f--ee_e")
    heldout = SimpleNamespace(asked=(questions, {}), substrate=SimpleNamespace(
        is_plain=lambda x: torch.ones(len(x), dtype=torch.bool)))
    share_Q = shares(identity_sae(2), heldout, torch.tensor([0]))
    assert share_Q.tolist() == pytest.approx([1 / 3] * 2)


def test_the_two_trees_of_a_question_are_told_apart(tmp_path, processor):
    processor(bfloat16=False)
    lm = tiny_substrate(tmp_path).lm
    questions = Questions.from_text(QUESTIONS[:1], lm)
    question = QUESTIONS[0][0]
    options = [len(ids) - 1 for ids in lm.tokenize(question.options)]  # the last is never read
    sizes = [1 + len(lm.tokenize([text])[0]) + sum(options)
             for text in (question.prompt, question.empty)]
    assert questions.is_empty_N.tolist() == [False] * sizes[0] + [True] * sizes[1]


LENGTH = 12  # of frontier contexts; other contexts have sixteen tokens


# -- What is measured ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """Held-out text that its model knows, in float32; it answers all questions right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        heldout = HeldOut(knowing_substrate(
            tmp_path_factory.mktemp("knowing"), QUESTIONS * 3, frontier_contexts=8,
            frontier_length=LENGTH, guard_contexts=40))
        heldout["x"]  # noqa: B018 - read while it is float32
        questions = Questions.from_text(QUESTIONS * 3, heldout.substrate.lm)
    questions.answer_Q = questions.scores(questions.base_S).argmax(1)
    counts = {"forget": {"kept": 3}, "retain": {"kept": 6}}
    heldout.__dict__["asked"] = questions, counts
    return heldout


@pytest.fixture(autouse=True)
def more_often(monkeypatch):
    """A small model's features fire on more tokens."""
    monkeypatch.setattr(unlearning, "THRESHOLDS", (0.03, 0.4))


def statistics_of(sae, heldout):
    return feature_statistics(sae, [heldout.residuals(FORGET), heldout.residuals(RETAIN)])


def sae_for(heldout, seed, scale):
    return rare_sae(heldout["x"].flatten(0, 1).float(), seed=seed, scale=scale)


def plain_share(sae, features, x, keep):
    return ((sae.encode(x)[..., features] > 0).any(-1) & keep).float().mean(1)


def measured_in_full(sae, heldout):
    """Every setting on every context by the plain intervention, in the form of a result."""
    statistics = statistics_of(sae, heldout)
    tokens, x, keep = (heldout[name][heldout["rows"]][:, :LENGTH]
                       for name in ("tokens", "x", "keep"))
    kinds = {name: (heldout.domain_R == k).numpy()
             for k, name in enumerate(heldout.substrate.domains)}
    sets, seen = [], set()
    for threshold, n in itertools.product((0.03, 0.4), SET_SIZES):
        features = select_features(statistics.rate_KF, threshold, n)
        if tuple(features.tolist()) in seen:
            continue
        seen.add(tuple(features.tolist()))
        guards = plain_share(sae, features, heldout["guard_x"].float(), heldout["guard_keep"])
        share = plain_share(sae, features, x, keep).numpy()
        f = sae.encode(x)
        table = []
        for multiplier in MULTIPLIERS:
            clamped = f.clone()
            clamped[..., features] = torch.where(
                f[..., features] > 0, -multiplier * statistics.size_F[features], 0.0)
            changed = x + ((clamped - f) * keep[..., None]) @ sae.W_dec
            loss = losses(heldout.substrate.lm, tokens, changed)
            table.append((loss - heldout["base"]).mean(1).numpy())
        sets.append({"n_features": n, "limits": [-1.0, *np.quantile(guards, QUANTILES)],
                     "share": {name: share[of] for name, of in kinds.items()},
                     "rise": {name: np.array(table)[:, of] for name, of in kinds.items()}})
    blank = (heldout["blank"] - heldout["base"]).mean(1).numpy()[kinds["forget"]]
    return {"contexts": dict.fromkeys(kinds, 8), "sets": sets, "reference_rise": blank}


@pytest.mark.parametrize(("seed", "scale"), [(0, 1.0), (1, 3.0), (5, 3.0)])
def test_what_is_not_measured_changes_no_area(knowing, monkeypatch, seed, scale):
    """All areas are those of a plain evaluation that runs every setting on every context."""
    monkeypatch.setattr(unlearning, "NO_EFFECT", -1.0)  # down to the smallest multiplier
    sae = sae_for(knowing, seed, scale)
    whole = measured_in_full(sae, knowing)
    results = evaluate_unlearning(sae, knowing, statistics_of(sae, knowing), seed=0)
    assert any(np.isnan(one["rise"]["retain"]).any() for one in results["sets"]), "none is left out"
    texts = [name for name, metric in METRICS.items() if metric.of == "texts"]
    for name in texts:
        metric = METRICS[name]
        assert results[name] == pytest.approx(metric.statistic(*metric.tables(whole)), abs=2e-3)
    assert len({round(results[name], 3) for name in texts}) > 1, "the metrics must differ"
    assert results["unlearning_area"] > 0.1
    for kind, area in results["area_by_cost"].items():
        expected = unlearning_area(*text_tables(whole, **EVERY, kept=[kind]))
        assert area == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("seed", "scale"), [(0, 3.0), (2, 1.0), (5, 3.0)])
def test_no_setting_that_a_half_of_the_contexts_affords_is_left_out(knowing, seed, scale):
    """Neither by all texts that are to be kept nor by one of them."""
    sae = sae_for(knowing, seed, scale)
    everywhere = torch.ones(len(knowing.domain_R), dtype=torch.bool)
    left_out = 0
    for chosen in feature_sets(sae, knowing, statistics_of(sae, knowing)):
        measured = Measurement(sae, knowing, chosen)
        for m in range(MULTIPLIERS.index(START), len(MULTIPLIERS)):
            clamp = Clamp(chosen.features, -MULTIPLIERS[m] * chosen.size_F)
            rise_R = rises(sae, knowing, clamp, everywhere).numpy()
            known_R = np.isfinite(measured.rise_MR[m])
            assert measured.rise_MR[m][known_R] == pytest.approx(rise_R[known_R], abs=1e-4)
            for limit, kept in itertools.product(chosen.limits, ((1, 2), (1,), (2,))):
                clamped_R = measured.share_R > limit
                cost = min(max(np.where(clamped_R, rise_R, 0)[knowing.domain_R == k][half::2].mean()
                               for k in kept) for half in (0, 1))
                needed_R = clamped_R & np.isin(knowing.domain_R, (FORGET, *kept))
                missing = bool((needed_R & ~known_R).any())
                assert not (missing and cost <= COST_GRID[-1])
                left_out += missing
    assert left_out > 0, "the case must have both kinds"


def test_smaller_multipliers_are_measured_until_the_static_clamp_costs_nothing(knowing):
    lowest = set()
    for seed, scale in ((0, 0.1), (5, 3.0)):
        sae = sae_for(knowing, seed, scale)
        for chosen in feature_sets(sae, knowing, statistics_of(sae, knowing)):
            measured = Measurement(sae, knowing, chosen)
            known = [m for m in range(len(MULTIPLIERS)) if np.isfinite(measured.rise_MR[m]).any()]
            assert known == list(range(known[0], known[-1] + 1))
            costs = [max(max(measured.costs(m, kind, -1.0)) for kind in ("retain", "other"))
                     for m in range(len(MULTIPLIERS))]
            assert known[0] == 0 or costs[known[0]] <= NO_EFFECT
            below = costs[known[0] + 1 : MULTIPLIERS.index(START) + 1]
            assert all(cost > NO_EFFECT for cost in below)
            lowest.add(known[0])
    assert len(lowest) > 1, "the case must have both kinds"


def test_contexts_that_no_affordable_variant_clamps_are_not_run(knowing, monkeypatch):
    """Beyond the frontier's end, a third of the contexts that are to be kept at the most."""
    runs = []

    def counted(sae, heldout, clamp, run_R):
        runs.append(run_R.numpy())
        return rises(sae, heldout, clamp, run_R) + 100 * (heldout.domain_R != FORGET)

    monkeypatch.setattr(unlearning, "rises", counted)
    sae = sae_for(knowing, 0, 1.0)
    chosen = feature_sets(sae, knowing, statistics_of(sae, knowing))[0]._replace(limits=(-1.0,))
    measured = Measurement(sae, knowing, chosen)
    assert all(int(run_R.sum()) <= 2 * 4 for run_R in runs)
    assert not np.isfinite(measured.rise_MR[:, (knowing.domain_R == FORGET).numpy()]).any()
    assert len(runs) == 1 + MULTIPLIERS.index(START)  # both kinds at once: the first, all below


def test_limits_are_quantiles_of_shares_on_learn_retain_text_alone(knowing, monkeypatch):
    """Of what is asked nothing enters: the limits are there without it."""
    sae = sae_for(knowing, 0, 1.0)
    statistics = statistics_of(sae, knowing)
    guards = HeldOut(knowing.substrate)
    guards.__dict__["tensors"] = {name: knowing[name] for name in ("guard_x", "guard_keep")}
    chosen, *_ = feature_sets(sae, guards, statistics)
    share = plain_share(sae, chosen.features, knowing["guard_x"].float(), knowing["guard_keep"])
    assert chosen.limits[0] < 0
    assert chosen.limits[1:] == pytest.approx(np.quantile(share, QUANTILES))


def test_each_set_of_features_is_measured_once(knowing):
    """A hundred are asked for where there may be fewer than fifty: the smaller size stands."""
    sae = sae_for(knowing, 0, 1.0)
    rate_KF = statistics_of(sae, knowing).rate_KF.clone()
    rate_KF[FORGET, 30:] = 0
    statistics = statistics_of(sae, knowing)._replace(rate_KF=rate_KF)
    sets = feature_sets(sae, knowing, statistics)
    assert len({tuple(one.features.tolist()) for one in sets}) == len(sets)
    assert {one.n_features for one in sets} == {10, 20, 50}
    for one in sets:
        expected = select_features(rate_KF, one.threshold, one.n_features)
        assert torch.equal(one.features, expected)
        assert torch.equal(one.size_F, statistics.size_F[expected])


# -- The evaluation --------------------------------------------------------------------------------


def test_what_the_areas_were_chosen_from_is_kept_in_the_result(knowing):
    sae = sae_for(knowing, 0, 1.0)
    statistics = statistics_of(sae, knowing)
    results = evaluate_unlearning(sae, knowing, statistics, seed=0)
    assert results["contexts"] == {"forget": 8, "retain": 8, "other": 8}
    sets = feature_sets(sae, knowing, statistics)
    measured = [numbers(Measurement(sae, knowing, one)) for one in sets]
    assert to_json(results["sets"]) == to_json(measured)  # NaN, too, is the same
    for name, metric in METRICS.items():
        assert metric.statistic(*metric.tables(results)) == results[name]
        low, high = results[f"{name}_interval"]
        assert low <= high
    curve = crossfitted(*METRICS["unlearning_area"].tables(results))
    assert results["frontier"] == [{"cost": cost, "forget_rise": rise}
                                   for cost, rise in zip(COST_GRID, curve)]
    assert results["frequency_tokens"] == {"forget": 128, "retain": 128}
    assert results["selected"] == {str(t): select_features(statistics.rate_KF, t, 100).tolist()
                                   for t in (0.03, 0.4)}
    assert {row["n_selected"] for row in results["control"]} == {20}
    assert {(row["threshold"], row["n_features"]) for row in results["settings"]} <= {
        (one.threshold, one.n_features) for one in sets}
    assert results["coverage"].keys() == set(AREAS)
    assert 0 < results["coverage"]["unlearning_area"]["forget"] < 1


def test_saebenchs_settings_and_those_on_its_or_the_primary_frontier_are_asked(knowing):
    sae = sae_for(knowing, 1, 3.0)
    results = evaluate_unlearning(sae, knowing, statistics_of(sae, knowing), seed=0)
    asked = {(one["set"], MULTIPLIERS.index(one["multiplier"]), one["limit"])
             for one in results["asked"]}
    assert len(asked) == len(results["asked"])
    official = {(s, MULTIPLIERS.index(multiplier), 0) for s, one in enumerate(results["sets"])
                if one["n_features"] <= SAE_BENCH_SIZE for multiplier in OFFICIAL_MULTIPLIERS}
    used = set()
    for metric in (METRICS[name] for name in ASKED_OF):
        labels = metric.variants(results).labels
        used |= {labels[i] for i in metric.policy(results).any(0).nonzero()[0]}
    assert asked == official | used
    assert used - official
    for one in results["asked"]:
        assert (len(one["right"]["forget"]), len(one["right"]["retain"])) == (3, 6)


def test_answers_under_a_dynamic_clamp_are_those_of_the_static_one_where_it_clamps(knowing):
    sae = sae_for(knowing, 1, 3.0)
    chosen = feature_sets(sae, knowing, statistics_of(sae, knowing))[-1]
    chosen = chosen._replace(features=chosen.features[:10], size_F=chosen.size_F[:10])
    share_Q = shares(sae, knowing, chosen.features)
    limit = float(share_Q.median())
    questions, _ = knowing.asked
    retained = dataclasses.replace(questions, domain_Q=torch.full_like(questions.domain_Q, FORGET))
    everything = HeldOut(knowing.substrate)
    everything.__dict__.update(tensors=knowing.tensors, asked=(retained, {}))  # all are asked
    static, dynamic = (answers(sae, everything, chosen, 8.0, at)[0] for at in (-1.0, limit))
    assert 0 < int((share_Q > limit).sum()) < len(share_Q)
    assert torch.equal(dynamic, static | (share_Q <= limit))
    assert not torch.equal(dynamic, static)


@pytest.mark.filterwarnings("error")
def test_an_sae_without_features_of_the_forget_text_unlearns_nothing(knowing):
    sae = random_sae(bias=-1e6)
    results = evaluate_unlearning(sae, knowing, statistics_of(sae, knowing), seed=0)
    assert results["sets"] == results["asked"] == results["settings"] == []
    assert {results[name] for name in METRICS} == {0.0}
    for name in METRICS:
        assert results[f"{name}_interval"] == [0.0, 0.0]
    assert results["coverage"]["unlearning_area"] == {"forget": 0, "retain": 0, "other": 0}
    assert {row["forget_ce_rise"] for row in results["control"]} == {0.0}


def summary(contexts=("forget", "retain", "news"), kept=(4, 4), least=3):
    """One free set of which the forget rise is 2 throughout, and half of its answers are lost."""
    rise = {kind: [[2.0 * (kind == "forget")] * 2] for kind in contexts}
    one = {"threshold": 0.01, "n_features": 10, "n_selected": 9, "limits": [-1.0], "rise": rise,
           "multipliers": [2.0],
           "share": {kind: [0.5, 0.5] for kind in contexts}}
    right = {"forget": ("01" * kept[0])[: kept[0]], "retain": "1" * kept[1]}
    return summarize({
        "contexts": dict.fromkeys(contexts, 2), "sets": [one], "reference_rise": [9.0, 9.0],
        "counts": {name: {"kept": n} for name, n in zip(("forget", "retain"), kept)},
        "asked": [{"n_features": 10, "multiplier": 8.0, "limit": 0, "whole": True,
                   "right": right}]}, least)


def test_a_summary_by_hand():
    results = summary(kept=(8, 4))
    assert results["settings"] == [{"threshold": 0.01, "n_features": 10, "n_selected": 9,
                                    "multiplier": 2.0, "forget_ce_rise": 2.0,
                                    "retain_ce_rise": 0.0, "news_ce_rise": 0.0}]
    assert results["unlearning_area"] == pytest.approx(2.0)
    assert results["unlearning_area_interval"] == pytest.approx([2.0, 2.0])
    assert results["forget_rise_at_0.05"] == pytest.approx(2.0)
    assert results["unlearning_score"] == 0.5
    assert results["score_reason"] is None
    assert results["coverage"]["unlearning_area"] == {"forget": 0.5, "retain": 0.5, "news": 0.5}


def test_a_score_of_too_few_questions_is_undefined_and_says_why():
    results = summary(kept=(2, 4))
    for name in ("unlearning_score", "accuracy_area"):
        assert results[name] is results[f"{name}_interval"] is None
    assert results["score_reason"] == "undefined: 2 forget questions, fewer than 3"
    assert results["unlearning_area"] == pytest.approx(2.0)  # of texts, not of questions
    assert summary(kept=(0, 1), least=0)["score_reason"] == (
        "undefined: 0 forget questions and 1 retain questions, fewer than 2")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("contexts", [("forget", "news"), ("retain", "news"), ()])
def test_without_forget_or_retain_text_the_areas_are_undefined(contexts):
    results = summary(contexts=contexts)
    for name, metric in METRICS.items():
        assert (results[name] is None) == (metric.of == "texts")
    assert results["coverage"] == {}
    assert "frontier" not in results


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("left", [0, 1])
def test_a_kind_of_text_without_a_context_for_each_half_has_no_say(knowing, left):
    fewer = HeldOut(knowing.substrate)
    stays = (knowing.domain_R != 2) | (torch.arange(len(knowing.domain_R)) % 8 < left)
    tensors = {**knowing.tensors, **{name: knowing[name][stays]
                                     for name in ("rows", "base", "blank")}}
    fewer.__dict__.update(tensors=tensors, asked=knowing.asked)
    sae = sae_for(knowing, 0, 1.0)
    results = evaluate_unlearning(sae, fewer, statistics_of(sae, knowing), seed=0)
    assert results["contexts"] == {"forget": 8, "retain": 8}
    assert results["unlearning_area"] == results["unlearning_area_labelled"] > 0
