"""Held-out text: residuals, losses and questions that all evaluations share, and clamps on them."""

import dataclasses

import pytest
import torch
from tiny_substrate import QUESTIONS, WIDTH, TinySource, random_sae, tiny_substrate

from lab.evaluations import unlearning
from lab.evaluations.heldout import HeldOut, paraphrased, survival
from lab.evaluations.prompt_trees import Questions
from lab.evaluations.unlearning import Clamp, answers, rises
from lab.language_model import LanguageModel, losses
from lab.substrates.texts import DOMAINS, FORGET, OTHER, RETAIN


@pytest.fixture
def tiny(tmp_path, processor):
    """In float32, so that what must be equal is."""
    processor(bfloat16=False)
    return tiny_substrate(tmp_path, questions=QUESTIONS * 3)


@pytest.fixture
def heldout(tiny):
    return HeldOut(tiny)


def test_residuals_are_the_language_models_of_all_ask_contexts(tiny, heldout):
    tokens, domain = tiny.ask
    assert torch.equal(heldout["tokens"], tokens)
    assert torch.equal(heldout["domain"], domain)
    torch.testing.assert_close(heldout["x"], tiny.lm.residual(tokens))
    assert bool(heldout["keep"].all())  # no sinks in a random model


def test_frontier_contexts_are_the_first_of_each_domain(tiny, heldout):
    size = tiny.sizes.frontier_contexts
    assert heldout.domain_R.tolist() == [k for k in range(len(DOMAINS)) for _ in range(size)]
    for k in range(len(DOMAINS)):
        first = (heldout["domain"] == k).nonzero()[:size, 0]
        assert torch.equal(heldout["rows"][heldout.domain_R == k], first)


def test_losses_are_of_the_unmodified_model_and_with_zeros_in_place_of_residuals(tiny, heldout):
    rows = heldout["rows"]
    tokens, x = heldout["tokens"][rows], heldout["x"][rows]
    torch.testing.assert_close(heldout["base"], losses(tiny.lm, tokens, x))
    torch.testing.assert_close(heldout["zero"], losses(tiny.lm, tokens, torch.zeros_like(x)))
    assert float((heldout["zero"] - heldout["base"]).abs().min()) > 0


def test_residuals_come_by_domain_without_sinks(heldout):
    heldout["keep"][0, 3] = False
    first = int(heldout["domain"][0])
    tokens = heldout["tokens"].shape[1]
    for k in range(len(DOMAINS)):
        expected = heldout["x"][heldout["domain"] == k].reshape(-1, WIDTH)
        if k == first:
            expected = torch.cat([expected[:3], expected[4:]])
        assert torch.equal(heldout.residuals(k), expected)
    both = int((heldout["domain"] != OTHER).sum()) * tokens - 1
    assert len(heldout.residuals()) == len(heldout.residuals(FORGET, RETAIN)) == both


def test_sinks_are_kept_when_the_others_are_set_to_zero(tiny, heldout, monkeypatch):
    residual = LanguageModel.residual

    def with_sink(lm, tokens, layout=None):
        x = residual(lm, tokens, layout).clone()
        x[:, 0] *= 1000
        return x

    monkeypatch.setattr(LanguageModel, "residual", with_sink)
    rows = heldout["rows"]
    assert not heldout["keep"][:, 0].any()
    assert bool(heldout["keep"][:, 1:].all())
    ablated = torch.zeros_like(heldout["x"][rows])
    ablated[:, 0] = heldout["x"][rows][:, 0]
    expected = losses(tiny.lm, heldout["tokens"][rows], ablated)
    torch.testing.assert_close(heldout["zero"], expected)


def test_the_frontier_as_trees_has_the_losses_of_the_contexts(tiny, heldout):
    frontier = heldout.frontier
    everything = torch.ones(len(frontier.token_N), dtype=torch.bool)
    log_probs = frontier.log_probs(tiny.lm, frontier.x_ND, everything)
    torch.testing.assert_close(-log_probs.view_as(heldout["base"]), heldout["base"],
                               atol=1e-4, rtol=1e-4)
    changed = frontier.log_probs(tiny.lm, frontier.x_ND * 0.5, everything)
    rows = heldout["rows"]
    expected = losses(tiny.lm, heldout["tokens"][rows], heldout["x"][rows] * 0.5)
    torch.testing.assert_close(-changed.view_as(expected), expected, atol=1e-4, rtol=1e-4)


def test_everything_is_computed_once_for_all_runs(tiny, heldout, monkeypatch):
    x, (questions, counts) = heldout["x"], heldout.asked
    again = type(tiny)(tiny.source, tiny.sizes, tiny.cache, tiny.processes)
    again.sink_norm, again.ask, again.corpus  # noqa: B018 - read from the cache
    monkeypatch.setattr(TinySource, "load_model", lambda *_: pytest.fail("the model was run"))
    other = HeldOut(again)
    assert torch.equal(other["x"], x)
    assert other.asked[1] == counts
    assert torch.equal(other.asked[0].base_S, questions.base_S)


# -- Questions -----------------------------------------------------------------------------------


def right_answers(monkeypatch, first, again):
    """What the unmodified model answers right under the two wordings, by domain."""
    answered = iter([first[FORGET], again[FORGET], first[RETAIN], again[RETAIN]])
    plain = Questions.right

    def right(questions, log_prob_S):
        planned = next(answered, None)
        return plain(questions, log_prob_S) if planned is None else torch.tensor(planned)

    monkeypatch.setattr(Questions, "right", right)


def test_only_questions_answered_right_in_both_wordings_are_asked(tiny, heldout, monkeypatch):
    """Of three forget questions one survives, of six retain questions two."""
    right_answers(monkeypatch,
                  {FORGET: [True, True, False], RETAIN: [True, False, True, True, True, False]},
                  {FORGET: [False, True, True], RETAIN: [True, True, True, False, False, False]})
    questions, counts = heldout.asked
    assert questions.domain_Q.tolist() == [FORGET, RETAIN, RETAIN]
    forget, retain = ([question for question, domain in QUESTIONS * 3 if domain == k]
                      for k in (FORGET, RETAIN))
    expected = Questions.from_text([(forget[1], FORGET), (retain[0], RETAIN), (retain[2], RETAIN)],
                                   tiny.lm)
    assert torch.equal(questions.token_N, expected.token_N)
    assert {name: (part["asked"], part["right"], part["again"], part["survived"])
            for name, part in counts.items()} == {"forget": (3, 2, 2, 1), "retain": (6, 4, 3, 2)}


def test_no_more_questions_are_asked_than_the_budget_says(tiny, heldout, monkeypatch):
    tiny.sizes = dataclasses.replace(tiny.sizes, question_candidates=2, questions=1)
    right_answers(monkeypatch, *[{FORGET: [True, True], RETAIN: [True, True]}] * 2)
    questions, counts = heldout.asked
    assert questions.domain_Q.tolist() == [FORGET, RETAIN]
    assert {part["asked"] for part in counts.values()} == {2}


def test_the_second_wording_says_the_same_in_other_words():
    question = paraphrased(QUESTIONS[0][0])
    assert question.prompt == "Read this definition: a tall thing that grows\nThe term is"
    assert question.empty == "The term is"
    assert (question.options, question.answer) == (QUESTIONS[0][0].options, 0)
    with pytest.raises(ValueError, match="is not two lines"):
        paraphrased(QUESTIONS[0][0]._replace(prompt="Which term?"))


def test_survival_is_told_beside_what_a_guess_gives():
    right, again = torch.tensor([True, True, True, False]), torch.tensor([True, False, True, True])
    told = survival(right, again)
    assert (told["asked"], told["right"], told["again"], told["survived"]) == (4, 3, 3, 2)
    assert told["expected_by_chance"] == 1.0
    assert told["p_value"] == pytest.approx(4 * 0.25**3 * 0.75 + 0.25**4)


# -- Clamps --------------------------------------------------------------------------------------


def test_a_clamps_effect_is_that_of_the_plain_intervention(tiny, heldout, monkeypatch):
    """Skipping what sees no change changes no number: the same as clamping and running it all."""
    questions = Questions.from_text(QUESTIONS, tiny.lm)
    questions.answer_Q = (questions.scores(questions.base_S).argmax(1) + torch.arange(3) % 2) % 4
    heldout.__dict__["asked"] = questions, {}
    monkeypatch.setattr(unlearning, "RETAINED", 0.0)  # all is asked
    x = heldout["x"][heldout["rows"]]
    sae = random_sae(bias=0.0)
    before_NF = ((torch.cat([x.flatten(0, 1), questions.x_ND]) - sae.b_dec) @ sae.W_enc)
    sae = dataclasses.replace(sae, b_enc=-before_NF.quantile(0.99, dim=0))
    chosen, target = torch.arange(6), torch.full((6,), -3.0 * float(x.norm(dim=-1).mean()))
    clamp = Clamp(chosen, target)

    def clamped(x):
        f = sae.encode(x)
        changed = f.clone()
        changed[..., chosen] = torch.where(f[..., chosen] > 0, target, f[..., chosen])
        return x + (changed - f) @ sae.W_dec

    rise = losses(tiny.lm, heldout["tokens"][heldout["rows"]], clamped(x)) - heldout["base"]
    plain = dataclasses.replace(questions, memory={})
    everything = torch.ones(len(plain.token_N), dtype=torch.bool)
    right = plain.right(plain.log_probs(tiny.lm, clamped(plain.x_ND), everything))

    rise_R = rises(sae, heldout, clamp)
    torch.testing.assert_close(rise_R, rise.mean(1), atol=1e-4, rtol=1e-3)
    right_Q, all_asked = answers(sae, heldout, clamp)
    assert all_asked
    assert torch.equal(right_Q, right)
    assert 0 < int(right_Q.sum()) < 3
    assert not torch.equal(right, plain.right(plain.base_S))
    untouched = (sae.encode(x)[..., chosen] == 0).all(-1).all(-1)
    assert 0 < int(untouched.sum()) < len(untouched), "the case must have both kinds"
    assert torch.equal(rise_R[untouched], torch.zeros(int(untouched.sum())))

