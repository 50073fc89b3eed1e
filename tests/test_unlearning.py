"""Unlearning: which features are clamped, what a clamp does, and when a score is undefined."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_substrate import QUESTIONS, identity_sae, random_sae, tiny_substrate

from lab.evaluations import unlearning
from lab.evaluations.heldout import HeldOut
from lab.evaluations.prompt_trees import Questions
from lab.evaluations.unlearning import (
    COSTS,
    MULTIPLIERS,
    SET_SIZES,
    THRESHOLDS,
    Clamp,
    Effect,
    answers,
    areas,
    evaluate_unlearning,
    feature_statistics,
    matched_features,
    rises,
    select_features,
    summarize_unlearning,
    too_few,
)
from lab.results.statistics import unlearning_area
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
    """Questions whose answers are known: `wrong` are lost under the clamp. Counts who is asked."""

    def __init__(self, n_forget, n_retain, wrong):
        n = n_forget + n_retain
        self.domain_Q = torch.tensor([FORGET] * n_forget + [RETAIN] * n_retain)
        self.owner_N, self.x_ND = torch.arange(n), torch.ones(n, 2)
        self.wrong, self.asked = torch.tensor(wrong, dtype=torch.long), []

    def __len__(self):
        return len(self.domain_Q)

    def margins(self):  # the last retain question is the least sure
        return torch.arange(len(self), 0, -1.0)

    def log_probs(self, lm, x_ND, touched_N):
        self.asked.append(touched_N.nonzero()[:, 0].tolist())
        return touched_N

    def right(self, touched_N):
        right_Q = torch.ones(len(self), dtype=torch.bool)
        right_Q[self.wrong] = False
        return right_Q


def ask(n_forget, n_retain, wrong):
    questions = Asked(n_forget, n_retain, wrong)
    substrate = SimpleNamespace(lm=None, is_plain=lambda x: torch.ones(len(x), dtype=torch.bool))
    clamp = Clamp(torch.tensor([0]), torch.tensor([-1.0]))
    heldout = SimpleNamespace(asked=(questions, {}), substrate=substrate)
    return (*answers(identity_sae(2), heldout, clamp), questions)


def test_all_questions_are_asked_where_the_retain_answers_stay():
    right_Q, whole, questions = ask(5, 60, wrong=[0, 3, 7])  # one retain answer of 60 lost
    assert whole
    assert (~right_Q).nonzero()[:, 0].tolist() == [0, 3, 7]
    assert sorted(sum(questions.asked, [])) == list(range(65))


def test_asking_ends_as_soon_as_too_many_retain_answers_are_lost():
    """More than 5 % of 60, among the twenty least sure: no forget question is asked any more."""
    right_Q, whole, questions = ask(5, 60, wrong=[0, 61, 62, 63, 64])
    assert not whole
    assert questions.asked == [list(range(45, 65))]
    assert bool(right_Q[:5].all())


# -- Summaries -------------------------------------------------------------------------------------


def summary(n_forget=4, n_retain=4, least=3, asked=(True, True), domains=(0, 0, 1, 1, 2, 2)):
    """Two settings, of which the first loses half of the forget answers and raises forget loss."""
    domain_Q = torch.tensor([FORGET] * n_forget + [RETAIN] * n_retain)
    rises = torch.tensor([[3.0, 0.1, 0.3][k] for k in domains])
    right = torch.ones(n_forget + n_retain, dtype=torch.bool)
    right[: n_forget // 2] = False
    effects = [Effect(rises, right, asked[0]),
               Effect(torch.zeros(len(domains)), torch.ones_like(right), asked[1])]
    heldout = SimpleNamespace(
        domain_R=torch.tensor(domains), asked=(SimpleNamespace(domain_Q=domain_Q), {"asked": 9}),
        substrate=SimpleNamespace(sizes=SimpleNamespace(least_questions=least)))
    return summarize_unlearning([{"n_features": 10}, {"n_features": 20}], effects, heldout)


def test_a_summary_by_hand():
    results = summary()
    first, second = results["settings"]
    assert first == {"n_features": 10, "forget_accuracy": 0.5, "retain_accuracy": 1.0,
                     "forget_ce_rise": pytest.approx(3.0), "retain_ce_rise": pytest.approx(0.1),
                     "other_ce_rise": pytest.approx(0.3)}
    assert second["forget_accuracy"] == 1.0
    assert results["area"] == pytest.approx(1.5)  # cost 0.3, of the third text
    assert results["area_labelled"] == pytest.approx(3 * (0.1 / 2 + 0.2) / 0.3, rel=1e-3)
    assert results["score"] == results["accuracy_area"] == 0.5
    assert [results[f"forget_rise_at_{cost}"] for cost in COSTS] == pytest.approx(
        [10 * cost for cost in COSTS])
    assert (results["n_forget_questions"], results["n_retain_questions"]) == (4, 4)
    assert results["score_reason"] is None
    assert results["counts"] == {"asked": 9}


def test_samples_are_what_the_numbers_can_be_computed_from_again():
    results = summary()
    samples = results["samples"]
    assert samples["forget_right"] == ["0011", "1111"]
    assert samples["retain_right"] == ["1111", "1111"]
    texts = [np.array(samples[f"{name}_rise"]) for name in ("forget", "retain", "other")]
    assert unlearning_area(*texts) == pytest.approx(results["area"], abs=1e-3)


def test_a_score_of_too_few_questions_is_undefined_and_says_why():
    results = summary(n_forget=2, n_retain=4, least=3)
    assert results["score"] is results["accuracy_area"] is None
    assert results["score_interval"] is results["accuracy_area_interval"] is None
    assert results["score_reason"] == "2 forget questions survive the filter; a score needs 3"
    assert results["area"] == pytest.approx(1.5)  # of texts, not of questions
    assert too_few([np.ones((1, 0)), np.ones((1, 2))], 20) == (
        "0 forget questions and 2 retain questions survive the filter; a score needs 20")
    assert too_few([np.ones((1, 0)), np.ones((1, 2))], 0).startswith("0 forget questions survive")
    assert too_few([np.ones((1, 20))] * 2, 20) is None


def test_a_domain_without_questions_takes_no_accuracy_from_the_other():
    first = summary(n_retain=0)["settings"][0]
    assert first["retain_accuracy"] is None
    assert first["forget_accuracy"] == 0.5


def test_a_setting_that_was_not_asked_to_the_end_has_no_accuracies():
    first, second = summary(asked=(False, True))["settings"]
    assert first["forget_accuracy"] is first["retain_accuracy"] is None
    assert second["forget_accuracy"] == 1.0
    assert first["forget_ce_rise"] == pytest.approx(3.0)


def test_without_a_third_text_the_damage_is_that_on_retain_text():
    results = summary(domains=(0, 0, 1, 1))
    assert results["settings"][0]["other_ce_rise"] is None
    assert results["area"] == results["area_labelled"] == pytest.approx(2.5, rel=1e-3)


@pytest.mark.parametrize("domains", [(0, 0, 2, 2), (1, 1, 2, 2)])
def test_without_forget_or_retain_text_the_areas_are_undefined(domains):
    results = summary(domains=domains)
    assert results["area"] is results["area_labelled"] is results["area_interval"] is None
    assert {results[f"forget_rise_at_{cost}"] for cost in COSTS} == {None}
    assert results["score"] == 0.5  # of questions, not of texts


def test_intervals_lie_around_their_numbers():
    rng = np.random.default_rng(0)
    texts = [rng.normal(mean, 0.5, (3, 40)) for mean in (2.0, 0.1, 0.1)]
    replies = [rng.random((3, 60)) < share for share in (0.5, 0.999)]
    results = areas(texts, replies, enough=True)
    for name in ("area", "area_labelled", "accuracy_area", "score"):
        low, high = results[f"{name}_interval"]
        assert low <= results[name] <= high


# -- The evaluation --------------------------------------------------------------------------------


@pytest.fixture
def heldout(tmp_path, processor):
    processor(bfloat16=False)
    heldout = HeldOut(tiny_substrate(tmp_path, questions=QUESTIONS))
    questions = Questions.from_text(QUESTIONS, heldout.substrate.lm)
    questions.answer_Q = questions.scores(questions.base_S).argmax(1)  # it knows all
    heldout.__dict__["asked"] = questions, {}
    return heldout


def test_every_setting_is_measured_and_what_it_was_chosen_on_is_recorded(heldout, monkeypatch):
    monkeypatch.setattr(unlearning, "THRESHOLDS", (0.3, 0.6))
    sae = random_sae(bias=-0.2)
    samples = [heldout.residuals(FORGET), heldout.residuals(RETAIN)[:100]]
    statistics = feature_statistics(sae, samples)
    results = evaluate_unlearning(sae, heldout, statistics, seed=0)
    settings = [(s["threshold"], s["n_features"], s["multiplier"]) for s in results["settings"]]
    assert settings == [(t, n, m) for t in (0.3, 0.6) for n in SET_SIZES for m in MULTIPLIERS]
    assert results["frequency_tokens"] == {"forget": 128, "retain": 100}
    for setting, rise_R in zip(results["settings"], results["samples"]["forget_rise"]):
        features = select_features(statistics.rate_KF, setting["threshold"], setting["n_features"])
        assert setting["n_selected"] == len(features)
        # a feature becomes −multiplier times its mean where it fires on forget text
        clamp = Clamp(features, -setting["multiplier"] * statistics.size_F[features])
        expected_R = rises(sae, heldout, clamp)[heldout.domain_R == FORGET]
        assert rise_R == pytest.approx(expected_R.tolist(), abs=1e-4)
        assert setting["forget_ce_rise"] == pytest.approx(float(expected_R.mean()), abs=1e-5)
    assert results["selected"] == {
        str(t): select_features(statistics.rate_KF, t, max(SET_SIZES)).tolist()
        for t in (0.3, 0.6)}
    assert len(results["control"]) == 2
    assert results["control"][0]["n_selected"] == results["settings"][-1]["n_selected"] > 0
    assert results["area"] == pytest.approx(unlearning_area(*(
        np.array(results["samples"][f"{name}_rise"]) for name in ("forget", "retain", "other"))),
        abs=1e-3)


def test_an_sae_without_features_of_the_forget_text_unlearns_nothing(heldout):
    sae = random_sae(bias=-1e6)
    statistics = feature_statistics(sae, [heldout.residuals(FORGET), heldout.residuals(RETAIN)])
    results = evaluate_unlearning(sae, heldout, statistics, seed=0)
    assert len(results["settings"]) == len(THRESHOLDS) * len(SET_SIZES) * len(MULTIPLIERS)
    assert {setting["n_selected"] for setting in results["settings"]} == {0}
    assert results["area"] == results["score"] == results["accuracy_area"] == 0
    assert {setting["forget_ce_rise"] for setting in results["settings"]} == {0.0}
