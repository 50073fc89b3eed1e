"""The supervised yardstick: directions that the labels give, clamped as features are."""

import numpy as np
import pytest
import torch
from tiny_substrate import QUESTIONS, WIDTH, knowing_substrate, rare_sae

from lab.console import Clock
from lab.evaluations import directions, evaluate, unlearning, yardstick
from lab.evaluations.heldout import HeldOut
from lab.evaluations.prompt_trees import PromptTrees, Questions
from lab.evaluations.unlearning import Clamp, fires
from lab.evaluations.yardstick import (
    PROBE_TOKENS,
    RATES,
    evaluate_directions,
    logistic_regression,
    mean_difference,
    one_direction,
)
from lab.results.frontier import METRICS
from lab.storage import randomness
from lab.substrates.texts import FORGET


def cosine(one, other):
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def planted(generator, n=3000, d=12):
    """Residuals of forget and of retain text, which differ by two of the first coordinate and one
    of the second; the first is also noisy."""
    noise = torch.ones(d)
    noise[0] = 10.0
    forget, retain = (noise * torch.randn(n, d, generator=generator) + 5 for _ in range(2))
    forget[:, 0] += 2.0
    forget[:, 1] += 1.0
    return forget, retain


# -- Directions ------------------------------------------------------------------------------------


def test_the_difference_of_means_by_hand():
    forget, retain = torch.tensor([[3.0, 1], [5, 1]]), torch.tensor([[0.0, 0], [2, 0], [1, 6]])
    assert mean_difference(forget, retain).tolist() == [3.0, -1.0]


def test_planted_differences_are_found(generator):
    forget, retain = planted(generator)
    shift = torch.zeros(12)
    shift[:2] = torch.tensor([2.0, 1.0])
    assert cosine(mean_difference(forget, retain), shift) > 0.95
    best = torch.zeros(12)
    best[:2] = torch.tensor([2.0 / 100, 1.0])  # the shift by the variance: Fisher's
    assert cosine(logistic_regression(forget, retain), best) > 0.95


def test_a_logistic_regression_has_the_scale_of_raw_residuals(generator):
    """Its score of a residual rises along the direction as the standardised one's does."""
    forget, retain = planted(generator)
    one = logistic_regression(forget, retain)
    other = logistic_regression(1000 * forget, 1000 * retain)
    torch.testing.assert_close(one, 1000 * other, rtol=1e-3, atol=1e-4)


def test_a_logistic_regression_is_learned_from_as_many_tokens_of_both_texts(monkeypatch, generator):
    forget, retain = planted(generator)
    """Of retain text any, whatever the order of its kinds."""
    monkeypatch.setattr(yardstick, "PROBE_TOKENS", 500)
    drawn = torch.randperm(len(retain), generator=randomness("yardstick"))[:500]
    torch.testing.assert_close(logistic_regression(forget, retain),
                               logistic_regression(forget[:500], retain[drawn]),
                               rtol=1e-3, atol=1e-3)
    assert PROBE_TOKENS >= 10_000


def test_a_direction_fires_on_each_rate_of_the_retain_tokens(generator):
    forget, retain = planted(generator, n=20_000)
    w = torch.randn(12, generator=generator)
    sae = one_direction(w, [retain])
    rate_K = (sae.encode(retain) > 0).float().mean(0)
    assert rate_K.tolist() == pytest.approx(RATES, abs=2e-4)
    unit = w / w.norm()
    for k in range(len(RATES)):
        threshold = np.quantile((retain @ unit).numpy(), 1 - RATES[k])
        expected = torch.relu(forget @ unit - float(threshold))
        f = sae.encode(forget, torch.tensor([k])).squeeze(1)
        torch.testing.assert_close(f, expected, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(sae.W_dec[k], unit)


def test_a_direction_fires_on_no_kind_of_retain_text_more_often_than_its_rate(generator):
    _, retain = planted(generator, n=20_000)
    other = retain + 3.0
    w = torch.ones(12)
    sae = one_direction(w, [retain, other, retain[:0]])
    assert (sae.encode(other) > 0).float().mean(0).tolist() == pytest.approx(RATES, abs=2e-4)
    assert bool(((sae.encode(retain) > 0).float().mean(0) < torch.tensor(RATES)).all())


def test_a_clamped_direction_ends_below_its_threshold_by_so_many_mean_activations(generator):
    forget, retain = planted(generator)
    sae = one_direction(mean_difference(forget, retain), [retain])
    k, size = len(RATES) - 1, 3.0
    fired = sae.encode(forget)[:, k] > 0
    changed = Clamp(torch.tensor([k]), torch.tensor([-2 * size])).of(
        sae, forget, torch.ones(len(forget), dtype=torch.bool))
    after = changed[fired] @ sae.W_dec[k]
    torch.testing.assert_close(after, (-sae.b_enc[k] - 2 * size).expand_as(after), atol=1e-3,
                               rtol=1e-4)
    assert torch.equal(changed[~fired], forget[~fired])
    others = torch.eye(12) - torch.outer(sae.W_dec[k], sae.W_dec[k])
    torch.testing.assert_close(changed @ others, forget @ others, atol=1e-4, rtol=1e-4)


def test_there_are_as_many_sets_of_a_direction_as_of_an_saes_features():
    assert len(RATES) == len(unlearning.THRESHOLDS) * len(unlearning.SET_SIZES)
    assert list(RATES) == sorted(set(RATES))


# -- The evaluation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        heldout = HeldOut(knowing_substrate(tmp_path_factory.mktemp("knowing"), QUESTIONS * 3,
                                            frontier_contexts=6, guard_contexts=40))
        heldout["x"]  # noqa: B018 - read while it is float32
        questions = Questions.from_text(QUESTIONS * 3, heldout.substrate.lm)
    questions.answer_Q = questions.scores(questions.base_S).argmax(1)
    heldout.__dict__["asked"] = questions, {"forget": {"kept": 3}, "retain": {"kept": 6}}
    return heldout


@pytest.fixture(scope="module")
def samples(knowing):
    """Residuals of learn text."""
    learn = knowing.substrate.learn
    x = [knowing.substrate.lm.residual(learn.tokens_NT[learn.domain_N == k]) for k in range(3)]
    return [part.flatten(0, 1) for part in x]


def test_both_directions_go_through_all_that_features_go_through(knowing, samples):
    results = evaluate_directions(knowing, samples)
    assert list(results) == ["mean_difference", "logistic_regression"]
    for part in results.values():
        assert part["contexts"] == {"forget": 6, "retain": 6, "other": 6}
        assert [one["threshold"] for one in part["sets"]] == list(RATES)
        assert {one["n_selected"] for one in part["sets"]} == {1}
        for name, metric in METRICS.items():
            assert part[name] == metric.statistic(*metric.tables(part))
            assert len(part[f"{name}_interval"]) == 2
        assert part["coverage"]["unlearning_area"].keys() == {"forget", "retain", "other"}
    assert results["mean_difference"]["sets"] != results["logistic_regression"]["sets"]


def test_nothing_of_the_ask_half_enters_directions_thresholds_sizes_and_limits(
        knowing, samples, monkeypatch):
    """They are there where there is nothing but learn text."""
    seen = []
    monkeypatch.setattr(yardstick, "clamp_and_ask",
                        lambda sae, heldout, sets: seen.append((sae, sets)))
    blind = HeldOut(knowing.substrate)
    blind.__dict__["tensors"] = {name: knowing[name] for name in ("guard_x", "guard_keep")}
    evaluate_directions(blind, samples)
    retain = torch.cat(samples[1:])
    for (sae, sets), find in zip(seen, (mean_difference, logistic_regression)):
        w = find(samples[0], retain)
        torch.testing.assert_close(sae.W_dec[0], w / w.norm())
        for k, one in enumerate(sets):
            assert one.features.tolist() == [k]
            f = sae.encode(samples[FORGET])[:, k]
            size = float(f.sum()) / max(1, int((f > 0).sum()))  # none where it never fires
            assert float(one.size_F) == pytest.approx(size, rel=1e-4)
            share = fires(sae, one.features, knowing["guard_x"], knowing["guard_keep"])
            expected = np.quantile(share.float().mean(1).numpy(), unlearning.QUANTILES)
            assert one.limits == pytest.approx((-1.0, *expected), abs=1e-6)


def test_the_yardstick_is_computed_once_a_substrate(knowing, samples, monkeypatch):
    made = []

    def clamp_and_ask(sae, heldout, sets):
        made.append(len(sets))
        return {"unlearning_area": float(len(made))}

    monkeypatch.setattr(yardstick, "clamp_and_ask", clamp_and_ask)
    first = directions(knowing, lambda domain: samples[domain])
    assert directions(knowing, lambda domain: samples[domain]) == first
    assert made == [len(RATES)] * 2
    other = directions(knowing, lambda domain: samples[domain][: 5 * WIDTH])
    assert other != first  # of other learn text it is another one
    assert len(made) == 4


def test_the_yardstick_remembers_no_text_again(knowing, samples, monkeypatch):
    """The unmodified keys and values that features needed serve it, too."""
    remembered, remember = [], PromptTrees.remember_

    def counted(trees, lm):
        remembered.append(tuple(trees.token_N.tolist()))
        remember(trees, lm)

    monkeypatch.setattr(PromptTrees, "remember_", counted)
    monkeypatch.setattr(unlearning, "THRESHOLDS", (0.03, 0.4))
    sae = rare_sae(knowing["x"].flatten(0, 1).float(), scale=3.0)
    evaluate({0: sae, 1: sae}, knowing.substrate, lambda domain: samples[domain], Clock())
    assert remembered
    assert len(set(remembered)) == len(remembered)
