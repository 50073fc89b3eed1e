"""Held-out text: residuals, losses and questions that all evaluations share, and clamps on them."""

import dataclasses

import pytest
import torch
from tiny_substrate import QUESTIONS, WIDTH, TinySource, random_sae, tiny_substrate

from lab.evaluations import unlearning
from lab.evaluations.heldout import HeldOut, paraphrased, survival
from lab.evaluations.prompt_trees import Questions
from lab.evaluations.unlearning import Clamp, FeatureSet, answers, rises
from lab.language_model import LanguageModel, losses
from lab.substrates.texts import FORGET, RETAIN

OTHER = 2  # the unnamed text
LENGTH = 12  # tokens of a frontier context, of sixteen


@pytest.fixture
def tiny(tmp_path, processor):
    """In float32, so that what must be equal is."""
    processor(bfloat16=False)
    return tiny_substrate(tmp_path, questions=QUESTIONS * 3, frontier_length=LENGTH)


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
    assert heldout.domain_R.tolist() == [k for k in range(3) for _ in range(size)]
    for k in range(3):
        first = (heldout["domain"] == k).nonzero()[:size, 0]
        assert torch.equal(heldout["rows"][heldout.domain_R == k], first)


def test_losses_are_of_the_unmodified_model_and_with_zeros_in_place_of_residuals(tiny, heldout):
    rows = heldout["rows"]
    tokens, x = heldout["tokens"][rows, :LENGTH], heldout["x"][rows, :LENGTH]
    torch.testing.assert_close(heldout["base"], losses(tiny.lm, tokens, x))
    torch.testing.assert_close(heldout["zero"], losses(tiny.lm, tokens, torch.zeros_like(x)))
    assert float((heldout["zero"] - heldout["base"]).abs().min()) > 0


def test_the_reference_knows_nothing_but_the_mean_of_learn_retain_text(tiny, heldout):
    guards = tiny.learn.tokens_NT[tiny.learn.domain_N >= RETAIN][:12, :LENGTH]
    x = tiny.lm.residual(guards)
    torch.testing.assert_close(heldout["guard_x"], x)
    assert heldout["guard_keep"].shape == (12, LENGTH)
    assert bool(heldout["guard_keep"].all())  # no sinks in a random model
    rows = heldout["rows"]
    blank = x.flatten(0, 1).mean(0).expand(len(rows), LENGTH, WIDTH)
    expected = losses(tiny.lm, heldout["tokens"][rows, :LENGTH], blank)
    torch.testing.assert_close(heldout["blank"], expected)


def test_the_frontiers_tokens_are_the_first_of_its_contexts(heldout):
    for name in ("tokens", "x", "keep"):
        assert torch.equal(heldout.of_frontier(name), heldout[name][heldout["rows"]][:, :LENGTH])


def test_residuals_come_by_domain_without_sinks(heldout):
    heldout["keep"][0, 3] = False
    first = int(heldout["domain"][0])
    tokens = heldout["tokens"].shape[1]
    for k in range(3):
        expected = heldout["x"][heldout["domain"] == k].reshape(-1, WIDTH)
        if k == first:
            expected = torch.cat([expected[:3], expected[4:]])
        assert torch.equal(heldout.residuals(k), expected)
    both = int((heldout["domain"] != OTHER).sum()) * tokens - 1
    assert len(heldout.residuals()) == len(heldout.residuals(FORGET, RETAIN)) == both


def test_sinks_are_kept_when_the_others_are_replaced(tiny, heldout, monkeypatch):
    residual = LanguageModel.residual

    def with_sink(lm, tokens, layout=None):
        x = residual(lm, tokens, layout).clone()
        x[:, 0] *= 1000
        return x

    monkeypatch.setattr(LanguageModel, "residual", with_sink)
    rows = heldout["rows"]
    for keep in (heldout["keep"], heldout["guard_keep"]):
        assert not keep[:, 0].any()
        assert bool(keep[:, 1:].all())
    x = heldout["x"][rows, :LENGTH]
    mean = heldout["guard_x"][:, 1:].flatten(0, 1).mean(0)  # the sinks are no part of it
    for name, instead in (("zero", torch.zeros(WIDTH)), ("blank", mean)):
        ablated = instead.expand(x.shape).clone()
        ablated[:, 0] = x[:, 0]
        expected = losses(tiny.lm, heldout["tokens"][rows, :LENGTH], ablated)
        torch.testing.assert_close(heldout[name], expected)


def test_the_frontier_as_trees_has_the_losses_of_the_contexts(tiny, heldout):
    frontier = heldout.frontier
    everything = torch.ones(len(frontier.token_N), dtype=torch.bool)
    log_probs = frontier.log_probs(tiny.lm, frontier.x_ND, everything)
    torch.testing.assert_close(-log_probs.view_as(heldout["base"]), heldout["base"],
                               atol=1e-4, rtol=1e-4)
    assert len(frontier.token_N) == heldout["base"].numel()  # the last tokens are not run
    changed = frontier.log_probs(tiny.lm, frontier.x_ND * 0.5, everything)
    rows = heldout["rows"]
    expected = losses(tiny.lm, heldout["tokens"][rows, :LENGTH], heldout["x"][rows, :LENGTH] * 0.5)
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
    answered = iter([[*part[FORGET], *part[RETAIN]] for part in (first, again)])
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


def test_a_question_is_read_once_in_each_wording(tiny, heldout, monkeypatch):
    right = {FORGET: [True] * 3, RETAIN: [True] * 6}
    right_answers(monkeypatch, right, right)
    run, final = [], LanguageModel.final
    monkeypatch.setattr(LanguageModel, "final",
                        lambda lm, *inputs: run.append(inputs[0]) or final(lm, *inputs))
    assert len(heldout.asked[0]) == 3 + 5
    asked = sum(int(part.numel()) for part in run)
    run.clear()
    for again in (lambda question: question, paraphrased):
        Questions.from_text([(again(question), domain) for question, domain in QUESTIONS * 3],
                            tiny.lm)
    assert asked == sum(int(part.numel()) for part in run)


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
    questions.answer_Q = questions.scores(questions.base_S).argmax(1)
    heldout.__dict__["asked"] = questions, {}
    monkeypatch.setattr(unlearning, "RETAINED", 0.0)  # all is asked
    x = heldout.of_frontier("x")
    sae = random_sae(bias=0.0)
    before_NF = ((torch.cat([x.flatten(0, 1), questions.x_ND]) - sae.b_dec) @ sae.W_enc)
    sae = dataclasses.replace(sae, b_enc=-before_NF.quantile(0.99, dim=0))
    size = torch.full((6,), float(x.norm(dim=-1).mean()))
    chosen = FeatureSet(0.01, 6, torch.arange(6), size, (-1.0,))

    def clamped(x):
        f = sae.encode(x)
        changed = f.clone()
        changed[..., :6] = torch.where(f[..., :6] > 0, -3 * size, f[..., :6])
        return x + (changed - f) @ sae.W_dec

    rise = losses(tiny.lm, heldout.of_frontier("tokens"), clamped(x)) - heldout["base"]
    plain = dataclasses.replace(questions, memory={})
    everything = torch.ones(len(plain.token_N), dtype=torch.bool)
    right = plain.right(plain.log_probs(tiny.lm, clamped(plain.x_ND), everything))

    rise_R = rises(sae, heldout, Clamp(chosen.features, -3 * size),
                   torch.ones(len(x), dtype=torch.bool))
    torch.testing.assert_close(rise_R, rise.mean(1), atol=1e-4, rtol=1e-3)
    right_Q, all_asked = answers(sae, heldout, chosen, 3.0, -1.0)
    assert all_asked
    assert torch.equal(right_Q, right)
    assert 0 < int(right_Q.sum()) < 3
    untouched = (sae.encode(x)[..., :6] == 0).all(-1).all(-1)
    assert 0 < int(untouched.sum()) < len(untouched), "the case must have both kinds"
    assert torch.equal(rise_R[untouched], torch.zeros(int(untouched.sum())))
    some_R = torch.arange(len(x)) % 3 == 0  # what is not to be run has no rise
    only_R = rises(sae, heldout, Clamp(chosen.features, -3 * size), some_R)
    torch.testing.assert_close(only_R, torch.where(some_R, rise_R, 0.0), atol=1e-4, rtol=1e-3)
