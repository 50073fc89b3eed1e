"""Texts as trees, run once from the hook on: the same numbers as plain sequences of their own."""

import dataclasses

import pytest
import torch
from random_models import KINDS, make
from tiny_substrate import QUESTIONS, TinySource

from lab.evaluations.prompt_trees import BRANCHES, OPTIONS, PromptTrees, Questions
from lab.storage import randomness
from lab.substrates.texts import FORGET, RETAIN


def plain_scores(model, lm, question):
    """Each option in a sequence of its own, by the model's plain forward pass."""
    scores = []
    for option in question.options:
        total = 0.0
        for sign, prompt in ((1, question.prompt), (-1, question.empty)):
            head, tail = lm.tokenize([prompt])[0], lm.tokenize([" " + option])[0]
            tokens = torch.tensor([[0, *head, *tail]])
            log_probs = model(tokens).logits.log_softmax(-1)[0]
            for i, token in enumerate(tail):
                total += sign * float(log_probs[len(head) + i, token])
        scores.append(total)
    return torch.tensor(scores)


def all_of(trees):
    return torch.ones(len(trees.token_N), dtype=torch.bool)


@KINDS
def test_scores_of_options_are_those_of_plain_sequences(kind):
    model, lm = make(kind)
    questions = Questions.from_text(QUESTIONS, lm)
    expected = torch.stack([plain_scores(model, lm, question) for question, _ in QUESTIONS])
    scores = questions.scores(questions.base_S)
    torch.testing.assert_close(scores, expected, atol=2e-4, rtol=1e-4)
    assert questions.right(questions.base_S).tolist() == [
        int(row.argmax()) == question.answer for row, (question, _) in zip(expected, QUESTIONS)]


@KINDS
def test_scores_under_an_intervention_are_those_of_a_hook_on_the_plain_model(kind):
    model, lm = make(kind)
    questions = Questions.from_text(QUESTIONS, lm)
    log_probs = questions.log_probs(lm, questions.x_ND * 0.5, all_of(questions))
    scores = questions.scores(log_probs)
    block = model.base_model.layers[TinySource.layer]
    handle = block.register_forward_hook(lambda _module, _inputs, output: output * 0.5)
    expected = torch.stack([plain_scores(model, lm, question) for question, _ in QUESTIONS])
    handle.remove()
    torch.testing.assert_close(scores, expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(scores, questions.scores(questions.base_S), atol=1e-2)


@KINDS
def test_only_what_can_see_a_change_is_run_again_and_the_numbers_are_those_of_running_all(
        kind, monkeypatch):
    """For any set of changed tokens."""
    _, lm = make(kind)
    questions = Questions.from_text(QUESTIONS, lm)
    plain = dataclasses.replace(questions, memory={})
    questions.remember_(lm)
    run, final = [], lm.final

    def counted(tokens, *rest):
        run.append(tokens.numel())
        return final(tokens, *rest)

    monkeypatch.setattr(lm, "final", counted)
    for seed in range(6):
        touched = torch.rand(len(questions.token_N), generator=randomness(seed)) < 0.15
        changed = torch.where(touched[:, None], questions.x_ND * 0.3, questions.x_ND)
        run.clear()
        questions.known.clear()
        saved = questions.log_probs(lm, changed, touched)
        reached = questions.reached(touched)
        assert sum(run) == int(reached.sum()) < len(touched)  # one row, without padding
        whole = plain.log_probs(lm, changed, all_of(plain))
        torch.testing.assert_close(saved, whole, atol=1e-4, rtol=1e-4)
        seen = reached[questions.before_S]
        assert torch.equal(saved[~seen], questions.base_S[~seen])
        assert not torch.isclose(saved[seen], questions.base_S[seen]).all()
    assert not plain.memory


@KINDS
def test_where_nothing_changes_nothing_is_run_and_no_bit_changes(kind, monkeypatch):
    _, lm = make(kind)
    questions = Questions.from_text(QUESTIONS, lm)
    questions.remember_(lm)
    monkeypatch.setattr(lm, "final", lambda *_: pytest.fail("the language model was run"))
    unchanged = questions.log_probs(lm, questions.x_ND, ~all_of(questions))
    assert torch.equal(unchanged, questions.base_S)


def test_a_change_reaches_what_follows_in_its_branch_and_of_a_prompt_all_its_options():
    questions = Questions.from_text(QUESTIONS, make("llama")[1])
    for changed in range(len(questions.token_N)):
        touched = torch.arange(len(questions.token_N)) == changed
        branch, place = questions.branch_N, questions.place_N
        own = (branch == branch[changed]) & (place >= place[changed])
        if int(branch[changed]) % BRANCHES == 0:
            own |= (branch // BRANCHES == branch[changed] // BRANCHES) & (place >= place[changed])
        assert torch.equal(questions.reached(touched), own)


@pytest.mark.parametrize("width", [1, 20, 500])
def test_rows_hold_every_token_once_beside_the_rest_of_its_tree(width):
    questions = Questions.from_text(QUESTIONS, make("llama")[1])
    wanted = torch.arange(len(questions.token_N)) % 3 > 0
    batches = list(questions.batches(wanted, width, per_batch=2))
    run, rest = (torch.cat([part.flatten() for part in parts]) for parts in zip(*batches))
    assert run[run >= 0].sort().values.tolist() == wanted.nonzero()[:, 0].tolist()
    assert rest[rest >= 0].sort().values.tolist() == (~wanted).nonzero()[:, 0].tolist()
    for batch in batches:
        for row, beside in zip(batch.run_RT, batch.rest_RP):
            trees, others = (set((questions.branch_N[part[part >= 0]] // BRANCHES).tolist())
                             for part in (row, beside))
            assert others <= trees


def test_rows_have_hardly_an_empty_place():
    """Whatever part of the trees is run; each row is about as long as it may be."""
    for seed in range(5):
        sizes = torch.randint(5, 33, (60,), generator=randomness(seed)).tolist()
        branch = torch.cat([torch.full((size,), BRANCHES * t) for t, size in enumerate(sizes)])
        place = torch.cat([torch.arange(size) for size in sizes])
        nothing = torch.zeros(0, dtype=torch.long)
        trees = PromptTrees(place, branch, place, *[nothing] * 3, torch.zeros(len(place), 1),
                            nothing)
        run = torch.rand(60, generator=randomness("run", seed))[branch // BRANCHES] < 0.5
        run &= place > 3
        rows = [batch.run_RT for batch in trees.batches(run, width=64, per_batch=4)]
        assert sum(part.numel() for part in rows) < 1.1 * int(run.sum())
        assert max(part.shape[1] for part in rows) <= 64 + 33


def test_no_questions_are_no_crash():
    _, lm = make("llama")
    questions = Questions.from_text([], lm)
    assert len(questions) == len(questions.margins()) == 0
    assert len(questions.right(questions.base_S)) == 0
    nothing = torch.zeros(0, dtype=torch.bool)
    assert len(questions.log_probs(lm, questions.x_ND, nothing)) == 0


def test_some_of_the_questions_are_as_they_were_read():
    _, lm = make("llama")
    every = Questions.from_text([*QUESTIONS, *QUESTIONS], lm)
    some = every.only(torch.tensor([1, 3, 5]))
    expected = Questions.from_text([QUESTIONS[1], QUESTIONS[0], QUESTIONS[2]], lm)
    for name, part in expected.tensors().items():
        torch.testing.assert_close(getattr(some, name), part, atol=1e-4, rtol=1e-4)
    assert len(every.only(torch.zeros(0, dtype=torch.long))) == 0


@KINDS
def test_no_tree_is_run_twice_with_the_same_residuals(kind, monkeypatch):
    """Nor is one taken for another: other residuals, or others of its tokens, are run."""
    _, lm = make(kind)
    questions = Questions.from_text(QUESTIONS, lm)
    questions.remember_(lm)
    run, final = [], lm.final
    monkeypatch.setattr(lm, "final", lambda *inputs: run.append(inputs[0]) or final(*inputs))
    first, second = ((questions.branch_N == BRANCHES * tree) & (questions.place_N == place)
                     for tree, place in ((0, 2), (2, 3)))

    def answers(touched, factor):
        changed = torch.where(touched[:, None], questions.x_ND * factor, questions.x_ND)
        run.clear()
        result = questions.log_probs(lm, changed, touched)
        return result, sum(int(part.numel()) for part in run)

    alone, n = answers(first, 0.3)
    both, n_both = answers(first | second, 0.3)
    of_first = questions.branch_S // BRANCHES == 0
    assert torch.equal(both[of_first], alone[of_first])
    assert 0 < n_both == int(questions.reached(second).sum())
    again, none = answers(first | second, 0.3)
    assert none == 0
    assert torch.equal(again, both)
    assert answers(first, 0.4)[1] == answers(first.roll(1), 0.3)[1] + 1 == n
    assert not torch.isclose(alone[of_first], questions.base_S[of_first]).all()


def test_a_margin_is_what_the_answers_score_is_above_the_next_one():
    questions = Questions.from_text(QUESTIONS[:1], make("llama")[1])
    for option, score in enumerate((2.0, -1.0, 1.5, 0.0)):
        index = (questions.branch_S == 1 + option).nonzero()[:, 0]
        questions.base_S[index] = score / len(index)
        questions.base_S[questions.branch_S == BRANCHES + 1 + option] = 0
    assert questions.margins().tolist() == [pytest.approx(0.5)]


def test_tokens_know_their_question_and_questions_their_domain():
    questions = Questions.from_text(QUESTIONS, make("llama")[1])
    assert questions.domain_Q.tolist() == [FORGET, RETAIN, RETAIN]
    assert questions.answer_Q.tolist() == [0, 2, 1]
    lengths = [len(question.prompt.split()) + len(question.empty.split()) + 2 + 2 * sum(
        len(option.split()) - 1 for option in question.options) for question, _ in QUESTIONS]
    assert torch.bincount(questions.owner_N).tolist() == lengths
    assert len(QUESTIONS[0][0].options) == OPTIONS


def test_what_is_kept_in_the_cache_makes_the_same_questions():
    _, lm = make("llama")
    questions = Questions.from_text(QUESTIONS, lm)
    questions.remember_(lm)
    again = Questions(**questions.tensors())
    assert not again.memory
    assert torch.equal(again.scores(again.base_S), questions.scores(questions.base_S))
