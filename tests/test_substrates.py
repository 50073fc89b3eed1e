"""Substrates: no text on both sides, questions, contexts, and what all runs share of them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from tiny_substrate import TinySource, tiny_substrate

from experiment import ActivationBuffer
from lab.console import UserError
from lab.language_model import LanguageModel
from lab.storage import Cache, randomness
from lab.substrates import Pythia, Standin, choose_source
from lab.substrates.texts import (
    SIZES,
    Document,
    cloze_questions,
    distinct,
    divided,
    families,
    halved,
    hash_fraction,
    is_about_options,
    laid_out,
    normalised,
    pack_contexts,
    probe_rows,
    shuffled,
    without_copies,
)


def sentence(seed, n=50):
    """Words that no other seed has in this order."""
    words = torch.randint(0, 200, (n,), generator=randomness("words", seed)).tolist()
    return " ".join(f"word{word}" for word in words)


SENTENCES = [sentence(seed) for seed in range(400)]

# -- The same text on one side -------------------------------------------------------------------


def test_a_text_is_the_same_whatever_its_case_white_space_and_punctuation():
    assert normalised("The  “Mill”,\nby the River!") == normalised("the mill by the river")
    assert normalised("a mill") != normalised("the mill")
    assert distinct(["The mill.", "the  MILL", "a mill"], str) == ["The mill.", "a mill"]


def test_halves_are_halves():
    learn, ask = divided(SENTENCES, str)
    assert sorted(learn + ask) == sorted(SENTENCES)
    assert 0.4 < len(learn) / len(SENTENCES) < 0.6
    assert 0.68 < len(divided(SENTENCES, str, lambda _: 0.75)[0]) / len(SENTENCES) < 0.82
    assert divided(SENTENCES, str, lambda _: 0.0)[0] == []
    assert divided(SENTENCES, str, lambda _: 1.0)[1] == []


def test_halves_depend_on_the_text_alone():
    learn, ask = divided(SENTENCES, str)
    others = divided([text.upper() + "!" for text in reversed(SENTENCES)], str)
    assert {normalised(text) for text in others[0]} == {normalised(text) for text in learn}
    assert {normalised(text) for text in others[1]} == {normalised(text) for text in ask}


def test_of_a_text_that_is_there_twice_one_stays():
    halves = divided([*SENTENCES, *(text.title() for text in SENTENCES)], str)
    assert sorted(itertools.chain(*halves)) == sorted(SENTENCES)


@pytest.mark.parametrize("copy", [
    lambda text, other: text + " " + other,  # the same beginning
    lambda text, other: " ".join(other.split()[:20] + text.split()[5:40] + other.split()[20:]),
], ids=["a beginning", "a passage"])
def test_a_near_copy_is_in_the_same_half_and_the_same_part(copy):
    copies = [copy(text, SENTENCES[200 + i]) for i, text in enumerate(SENTENCES[:100])]
    texts = SENTENCES[:100] + copies
    learn, ask = divided(texts, str)
    part = {text: part for part, _, text in probe_rows([("class", text) for text in texts])}
    assert learn
    assert ask
    assert set(part.values()) == {"train", "test"}
    for text, near in zip(texts[:100], copies):
        assert (text in learn) == (near in learn)
        assert part[text] == part[near]


def test_texts_that_share_a_few_words_are_no_copies():
    texts = [" ".join([*text.split()[:20], *SENTENCES[0].split()[:28]]) for text in SENTENCES[1:50]]
    assert len(set(families(texts))) == len(texts)


def test_a_family_has_the_same_name_in_any_order():
    middle = f"{SENTENCES[0]} {SENTENCES[1]}"
    texts = [SENTENCES[0], SENTENCES[1], middle, SENTENCES[2]]
    for order in itertools.permutations(texts):
        names = dict(zip(order, families(order)))
        assert names[SENTENCES[0]] == names[SENTENCES[1]] == names[middle]
        assert names[SENTENCES[2]] == normalised(SENTENCES[2])


def test_texts_that_are_elsewhere_too_are_left_out():
    texts = [SENTENCES[0], SENTENCES[1], SENTENCES[1].upper(), SENTENCES[2]]
    others = [SENTENCES[0] + " and more", SENTENCES[3]]
    assert without_copies(texts, others) == [SENTENCES[1], SENTENCES[2]]


def of_kind(kind, texts):
    return [Document(kind, text, i) for i, text in enumerate(texts)]


def test_each_kind_of_text_goes_to_the_learn_half_in_its_own_part():
    learn = {"half": 0.5, "most": 0.75, "asked": 0.0, "learnt": 1.0}
    items = [one for k, kind in enumerate(learn)
             for one in of_kind(kind, SENTENCES[100 * k : 100 * k + 100])]
    halves = halved(items, learn)
    counts = {kind: len(halves["learn"][kind]) for kind in learn}
    assert 38 < counts["half"] < 62
    assert 64 < counts["most"] < 86
    assert (counts["asked"], counts["learnt"]) == (0, 100)
    for kind in learn:
        texts = [one.text for half in halves.values() for one in half[kind]]
        assert sorted(texts) == sorted(one.text for one in items if one.kind == kind)


def test_copies_of_different_kinds_go_together_to_where_the_least_learnt_kind_goes():
    learn = {"asked": 0.0, "half": 0.5, "most": 0.9}
    copies = [f"{text} and {other}" for text, other in zip(SENTENCES[:100], SENTENCES[200:])]
    halves = halved([*of_kind("most", copies), *of_kind("half", SENTENCES[:50]),
                     *of_kind("asked", SENTENCES[50:100])], learn)
    half_of = {one.text: half for half, kinds in halves.items() for items in kinds.values()
               for one in items}
    for text, copy in zip(SENTENCES[:100], copies):
        assert half_of[text] == half_of[copy]
    assert {half_of[text] for text in SENTENCES[50:100]} == {"ask"}
    assert 12 < sum(half_of[text] == "learn" for text in SENTENCES[:50]) < 38


def test_a_kind_that_is_learnt_whole_is_never_asked_and_loses_its_copies_of_what_is():
    copies = [f"{text} and {other}" for text, other in zip(SENTENCES[:100], SENTENCES[200:])]
    halves = halved([*of_kind("half", SENTENCES[:100]), *of_kind("prose", copies)],
                    {"half": 0.5, "prose": 1.0})
    assert halves["ask"]["prose"] == []
    assert ([one.source for one in halves["learn"]["prose"]]
            == [one.source for one in halves["learn"]["half"]])


def test_a_corpus_is_laid_out_by_half_and_domain_and_its_documents_are_counted():
    halves = {half: {"a": of_kind("a", [f"{half} 1", f"{half} 2"]), "b": of_kind("b", [half]),
                     "c": []} for half in ("learn", "ask")}
    out = laid_out(halves, {"forget": ("a", "b"), "retain": ("c",)}, lambda one: one.text.title())
    assert out["learn"] == {"forget": ["Learn 1", "Learn 2", "Learn"], "c": []}
    assert out["ask"] == {"forget": ["Ask 1", "Ask 2", "Ask"], "retain": []}
    assert out["documents"] == {half: {"a": 2, "b": 1, "c": 0} for half in ("learn", "ask")}


def test_a_fifth_of_the_probing_texts_is_tested_on():
    rows = probe_rows([(i % 3, text) for i, text in enumerate(SENTENCES)])
    assert [(label, text) for _, label, text in rows] == [
        (i % 3, text) for i, text in enumerate(SENTENCES)]
    assert 0.13 < np.mean([part == "test" for part, _, _ in rows]) < 0.27


def test_what_is_chosen_by_hash_is_chosen_alike_on_every_machine():
    assert hash_fraction("a text", "half") == pytest.approx(0.9955793, abs=1e-6)
    assert shuffled(["a", "b", "c", "d"], "salt") == shuffled(["d", "c", "b", "a"], "salt")
    assert shuffled(list("abcdefgh"), "salt") != shuffled(list("abcdefgh"), "other salt")


# -- Questions and contexts ----------------------------------------------------------------------

MEANINGS = {
    **{f"term{i} word{i}": "A definition that is long enough and says nothing of it " + "x" * i
       for i in range(8)},
    "telling name": "This definition is telling what it is about, word for word",
    "a name that is much too long": "A definition that is long enough for a question",
    "short": "Not long enough",
}


def test_each_question_has_one_right_name_of_four_and_none_that_its_definition_gives_away():
    questions = cloze_questions(MEANINGS)
    assert len(questions) == 8
    for question in questions:
        assert len(set(question.options)) == 4
        right = question.options[question.answer]
        assert question.prompt == f"Definition: {MEANINGS[right]}\nTerm:"
        assert question.empty == "Term:"


def test_answers_are_in_all_places_alike():
    answers = [question.answer for question in cloze_questions(MEANINGS)]
    assert sorted(answers) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_questions_depend_on_the_meanings_alone():
    assert cloze_questions(dict(reversed(MEANINGS.items()))) == cloze_questions(MEANINGS)


@pytest.mark.parametrize("option", [
    "All of the above", "all the above.", "ALL OF THE ABOVE!", "All-of-the-above", "All above",
    "None of these", "none of the other answers", "None of the above are correct",
    "None of these statements is true", "Any of the above", "All three options", "Two of the above",
    "More than one of the above", "Neither", "both", "Neither of the above",
    "The above are all true", "Both A and B", "A and C", "a and b", "(a) and (b)", "A, B, and C",
    "A & B", "Either A or B", "Neither A nor B", "A and B but not C", "B only", "Only A",
    "Both (A) and (C) are correct", "Answers A and B", "Options B, C",
])
def test_an_option_that_speaks_of_the_others_is_known(option):
    assert is_about_options(option)


@pytest.mark.parametrize("option", [
    "A", "Blood group A", "AB", "Vitamins A and E", "hepatitis B and C", "All cells of the body",
    "None were elected", "Both kidneys", "all of the patients", "I and II only", "E. coli",
    "One of the largest rivers", "Some of the protein", "both chambers of Congress", "Three",
    "above the line", "True, True", "two statements", "a bed", "some options remain open",
])
def test_an_option_with_a_content_of_its_own_stays(option):
    assert not is_about_options(option)


def test_contexts_are_packed_without_padding_and_only_the_last_tokens_are_lost():
    contexts = pack_contexts([[1, 2, 3], [4], [5, 6, 7, 8]], 0, 4)
    assert contexts.tolist() == [[0, 1, 2, 3], [0, 4, 0, 5]]  # the rest is less than a context
    assert pack_contexts([[1]], 0, 4).shape == pack_contexts([], 0, 4).shape == (0, 4)


# -- What runs share -----------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, processor):
    processor(bfloat16=False)
    return tiny_substrate(tmp_path)


def test_training_text_is_half_forget_text_as_far_as_there_is_enough(tiny):
    tokens, domain = tiny.learn
    assert tokens.numel() == tiny.sizes.learn_tokens
    assert float((domain > 0).double().mean()) == 0.5
    tiny.sizes = dataclasses.replace(tiny.sizes, learn_tokens=100_000)
    del tiny.learn
    tokens, domain = tiny.learn  # all of both texts, 40 documents and 52
    assert float((domain > 0).double().mean()) == pytest.approx(52 / 92, abs=0.02)
    assert tokens.numel() < 100_000


def test_contexts_of_both_domains_are_mixed_the_same_way_each_time(tiny, tmp_path):
    tokens, domain = tiny.learn
    assert not torch.equal(domain, domain.sort().values)
    again = tiny_substrate(tmp_path / "another cache").learn
    assert torch.equal(again.tokens_NT, tokens)
    assert again.checksum() == tiny.learn.checksum()


def test_every_context_of_retain_text_is_of_one_kind_and_kinds_share_what_room_there_is(tiny):
    def runs(ids):
        return {tuple(ids[i : i + 4]) for i in range(len(ids) - 3) if 0 not in ids[i : i + 4]}

    tokens, domain = tiny.learn
    known = [set().union(*map(runs, tiny.lm.tokenize(texts)))
             for texts in tiny.corpus["learn"].values()]
    for row, k in zip(tokens.tolist(), domain.tolist(), strict=True):
        assert runs(row) <= known[k]
    whole = [int((domain == k).sum()) for k in (1, 2)]
    tiny.sizes = dataclasses.replace(tiny.sizes, learn_tokens=64 * 16)
    del tiny.learn
    few = [int((tiny.learn.domain_N == k).sum()) for k in (1, 2)]
    assert sum(few) == 32 < sum(whole)
    assert few[1] / 32 == pytest.approx(whole[1] / sum(whole), abs=0.15)


def test_unnamed_texts_are_evaluated_on_and_never_trained_on(tiny):
    assert tiny.domains == ("forget", "retain", "other")
    assert tiny.learn_domains == ("forget", "retain", "retain too")
    assert set(tiny.learn.domain_N.tolist()) == {0, 1, 2}
    assert set(tiny.ask.domain_N.tolist()) == {0, 1, 2}


def test_several_unnamed_texts_are_domains_of_their_own(tmp_path, processor, monkeypatch):
    processor(bfloat16=False)
    monkeypatch.setattr(TinySource, "unnamed", ("other", "more"))
    substrate = tiny_substrate(tmp_path)
    substrate.corpus["ask"]["more"] = [f"m{i} m{i + 1} " * 20 for i in range(9)]
    assert substrate.domains == ("forget", "retain", "other", "more")
    assert substrate.ask.domain_N.unique().tolist() == [0, 1, 2, 3]
    assert substrate.learn.domain_N.unique().tolist() == [0, 1, 2]
    assert substrate.texts()["tokens"]["ask"]["more"] == 8 * 16


def test_results_say_how_much_text_there_is_by_half_and_domain_and_where_it_is_from(tiny):
    texts = tiny.texts()
    for half, names in (("learn", tiny.learn_domains), ("ask", tiny.domains)):
        contexts = getattr(tiny, half)
        assert texts["tokens"][half].keys() == {*names}
        for k, name in enumerate(names):
            tokens = contexts.tokens_NT[contexts.domain_N == k]
            assert texts["tokens"][half][name] == tokens.numel()
    assert texts["documents"] == tiny.corpus["documents"]
    assert texts["sources"] == tiny.source.sources()
    tiny.corpus["sources"] = {"words": "at commit 7"}  # the corpus knows better
    assert tiny.texts()["sources"] == {"words": "at commit 7"}


def test_too_little_text_to_train_on_is_named(tiny):
    tiny.sizes = dataclasses.replace(tiny.sizes, learn_tokens=16)
    with pytest.raises(UserError, match="no context of 16 tokens of forget text to train on"):
        tiny.learn  # noqa: B018


def test_an_attention_sink_is_ten_median_norms_long(tiny):
    x = tiny.lm.residual(tiny.learn.tokens_NT[:64])
    median = float(x.norm(dim=-1).median())
    assert tiny.sink_norm == pytest.approx(10 * median)
    long = torch.zeros(3, 32)
    long[:, 0] = torch.tensor([0.0, 9.99, 10.01]) * median
    assert tiny.is_plain(long).tolist() == [True, True, False]


@pytest.mark.parametrize(("size", "dtype"), [(1.0, torch.float16), (1e6, torch.bfloat16)])
def test_probing_texts_keep_residuals_beyond_the_range_of_float16(tmp_path, processor, monkeypatch,
                                                                  size, dtype):
    processor(bfloat16=False)
    residual = LanguageModel.residual
    monkeypatch.setattr(LanguageModel, "residual",
                        lambda *arguments: residual(*arguments) * size)
    substrate = tiny_substrate(tmp_path)
    x = substrate.lm.residual(substrate.learn.tokens_NT[:4])
    compact = substrate.compact(x)
    assert compact.dtype == dtype
    assert bool(torch.isfinite(compact).all())
    assert (float(x.abs().max()) > torch.finfo(torch.float16).max) == (dtype == torch.bfloat16)
    torch.testing.assert_close(compact.float(), x, rtol=1e-2, atol=1e-2 * size)


def test_residuals_that_are_not_finite_are_named_before_anything_is_kept(tmp_path, processor,
                                                                         monkeypatch):
    processor(bfloat16=False)
    residual = LanguageModel.residual
    monkeypatch.setattr(LanguageModel, "residual",
                        lambda *arguments: residual(*arguments) * torch.nan)
    substrate = tiny_substrate(tmp_path)
    with pytest.raises(UserError, match="^the language model gives residuals that are not finite$"):
        ActivationBuffer.read(substrate)
    kept = [path.name for path in (tmp_path / "tiny").iterdir()]
    assert all(name.startswith(("corpus", "contexts-learn")) for name in kept), kept


def test_text_is_read_once_for_all_runs(tiny, monkeypatch):
    learn, ask, norm = tiny.learn, tiny.ask, tiny.sink_norm
    monkeypatch.setattr(TinySource, "load_model", lambda *_: pytest.fail("the model was run"))
    monkeypatch.setattr(tiny.source, "corpus", lambda *_: pytest.fail("the text was read"))
    again = type(tiny)(tiny.source, tiny.sizes, tiny.cache, tiny.processes)
    assert torch.equal(again.learn.tokens_NT, learn.tokens_NT)
    assert torch.equal(again.ask.tokens_NT, ask.tokens_NT)
    assert again.sink_norm == norm


def test_a_model_in_another_precision_has_a_cache_of_its_own(tmp_path, processor):
    causes = []
    for has in (True, False):
        processor(bfloat16=has)
        substrate = tiny_substrate(tmp_path)
        causes.append(substrate.causes)
        assert substrate.precision == ("bfloat16" if has else "float32")
    assert causes[0] != causes[1]


# -- The choice ----------------------------------------------------------------------------------


def test_an_unknown_substrate_is_named_with_the_ones_there_are(tmp_path):
    with pytest.raises(UserError, match="SAE_SUBSTRATE='gpt9' is unknown; use auto, pythia or st"):
        choose_source("gpt9", Cache(tmp_path))


def test_auto_takes_the_standin_where_the_hub_is_not_to_be_had_and_says_why(tmp_path, monkeypatch,
                                                                            capsys):
    def refuse(self):
        raise UserError("no network here")

    monkeypatch.setattr(Pythia, "check", refuse)
    cache = Cache(tmp_path)
    assert isinstance(choose_source("auto", cache), Standin)
    told = f"substrate: standin ({Standin.model_name}); no network here\n"
    assert capsys.readouterr().err == told
    with pytest.raises(UserError, match="no network here"):
        choose_source("pythia", cache)
    monkeypatch.setattr(Pythia, "check", lambda self: None)
    assert isinstance(choose_source("auto", cache), Pythia)
    assert isinstance(choose_source("standin", cache), Standin)


def test_a_smoke_run_uses_less_text_of_every_kind():
    full, smoke = (dataclasses.asdict(SIZES[budget]) for budget in ("full", "smoke"))
    same = {name for name in full if smoke[name] == full[name]}
    assert same == {"context_length", "frontier_length"}
    assert all(smoke[name] <= full[name] for name in full)
