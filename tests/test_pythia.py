"""Pythia's probing sets and downloads, from rows in memory."""

import itertools
import math
import re

import pytest
from tiny_substrate import tiny_substrate

from lab.console import UserError
from lab.evaluations.probing import read_probe_set
from lab.storage import Cache
from lab.substrates.pythia import PAPER, PROBE_MEGABYTES, TEXT_MEGABYTES, Pythia, megabytes
from lab.substrates.pythia_probes import AMAZON, LONGEST, NEWS, PROBE_SOURCES, read_probe_sets
from lab.substrates.texts import SIZES, Sizes, normalised

SMALL = Sizes(probe_train=40, probe_test=20)
BIOS = "LabHC/bias_in_bios"
PROFESSIONS = sorted({c for name, one in PROBE_SOURCES.items() if "bios" in name
                      for c in one.classes})


def biographies(split, each=30):
    """Rows of all professions in turn; of women in profession 13 only at the very end."""
    rows = [{"hard_text": f"A life of {split}, work {job}, sex {gender}, number {i}",
             "profession": job, "gender": gender}
            for i in range(each) for job in PROFESSIONS for gender in (0, 1)]
    return sorted(rows, key=lambda row: (row["profession"], row["gender"]) == (13, 1))


def reviews(split, each=30):
    return [{"text": f"Thing of {split}, kind {kind}, {stars} stars, number {i}", "category": kind,
             "rating": stars} for i in range(each) for kind in range(8) for stars in (1.0, 5.0)]


def news(split, each=60):
    return [{"text": f"News of {split}, topic {label}, number {i}", "label": label}
            for i in range(each) for label in range(4)]


def code(each=90):
    return [{"code": f"{'x' * 150} {language} {i} " + f"line {i} " * 60, "language": language}
            for i in range(each) for language in ("C", "Python", "HTML", "Java", "PHP", "Perl")]


def speeches(pair, each=90):
    return [{"translation": {language: f"{language} speech {i}" for language in pair.split("-")}}
            for i in range(each)]


class Hub:
    """Rows by place; keeps the passes and counts the rows. A data set, named by the first word of
    its name, may be given other rows, or an error."""

    def __init__(self, **changed):
        self.changed = changed
        self.passes = []
        self.rows_read = {}

    def __call__(self, path, config, split):
        self.passes.append((path, config, split))
        for row in self.rows(path, config, split):
            self.rows_read[path] = self.rows_read.get(path, 0) + 1
            yield row

    def rows(self, path, config, split):
        made = self.changed.get(re.split("[-_]", path.split("/")[1])[0])
        if isinstance(made, Exception):
            raise made
        if made is not None:
            return made(split)
        return {BIOS: lambda: biographies(split), AMAZON: lambda: reviews(split),
                NEWS: lambda: news(split), "codeparrot/github-code": code,
                "Helsinki-NLP/europarl": lambda: speeches(config)}[path]()


def cells(rows):
    """How many texts there are by part, class and attribute."""
    counts = {}
    for part, label, _, *attribute in rows:
        counts[part, label, *attribute] = counts.get((part, label, *attribute), 0) + 1
    return counts


def test_every_split_is_read_in_one_pass_for_all_its_sets_rare_classes_included():
    hub = Hub()
    probes, skipped = read_probe_sets(hub, SMALL)
    assert (list(probes), skipped) == (list(PROBE_SOURCES), {})
    assert len(set(hub.passes)) == len(hub.passes)
    for path in (BIOS, AMAZON, NEWS):
        assert [place for place in hub.passes if place[0] == path] == [
            (path, None, "train"), (path, None, "test")]
    assert cells(probes[f"{BIOS}_class_set2"]["rows"])["train", "13", "1"] == 10


def test_a_class_has_as_many_texts_as_a_task_asks_in_equal_parts_of_the_second_attribute():
    probes, _ = read_probe_sets(Hub(), SMALL)
    for name, values in ((f"{BIOS}_class_set1", ("0", "1")), (AMAZON, ("1.0", "5.0"))):
        classes = map(str, PROBE_SOURCES[name].classes)
        expected = {(part, label, value): n for label in classes for value in values
                    for part, n in (("train", 10), ("test", 5))}
        assert cells(probes[name]["rows"]) == expected
    assert cells(probes[f"{AMAZON}_sentiment"]["rows"]) == {
        (part, label): n for label in ("1.0", "5.0") for part, n in (("train", 20), ("test", 10))}
    assert cells(probes[NEWS]["rows"]) == {(part, str(label)): n for label in range(4)
                                           for part, n in (("train", 20), ("test", 10))}


def test_parts_are_the_data_sets_own_splits_where_there_are_two():
    probes, _ = read_probe_sets(Hub(), SMALL)
    for name, content in probes.items():
        for part, _, text, *_ in content["rows"]:
            if len(PROBE_SOURCES[name].splits) == 2:
                assert f"of {part}," in text


def test_texts_of_one_split_are_divided_by_us_about_four_to_one():
    probes, _ = read_probe_sets(Hub(), Sizes(probe_train=80, probe_test=20))
    for name in ("codeparrot/github-code", "Helsinki-NLP/europarl"):
        rows = probes[name]["rows"]
        train, test = ({text for part, _, text in rows if part == wanted}
                       for wanted in ("train", "test"))
        assert not train & test
        assert len(PROBE_SOURCES[name].classes) == len({label for _, label, _ in rows})
        assert 3 < len(test) / 5 <= 10
        assert 30 < len(train) / 5 <= 40


def test_each_language_is_the_first_of_its_pair():
    rows = read_probe_sets(Hub(), SMALL)[0]["Helsinki-NLP/europarl"]["rows"]
    assert {label for _, label, _ in rows} == {"en", "fr", "de", "es", "nl"}
    assert all(text.startswith(f"{label} speech") for _, label, text in rows)


def test_code_begins_after_what_may_be_a_licence_and_is_no_longer_than_a_context_needs():
    rows = read_probe_sets(Hub(github=lambda split: [
        {**row, "code": row["code"] * 9} for row in code()]), SMALL)[0][
            "codeparrot/github-code"]["rows"]
    assert all(text.startswith(f" {label} ") and len(text) == LONGEST for _, label, text in rows)
    short = [{"code": "x" * 534, "language": row["language"]} for row in code()]
    assert "has no texts of class 'C'" in read_probe_sets(
        Hub(github=lambda split: short), SMALL)[1]["codeparrot/github-code"]


def test_reading_ends_when_every_class_has_enough_and_some_to_spare():
    hub = Hub(ag=lambda split: (row for i in itertools.count() for row in news(split, 1)
                                if not row.update(text=f"{row['text']}, {i}")))
    assert NEWS in read_probe_sets(hub, SMALL)[0]
    assert hub.rows_read[NEWS] == 4 * (22 + 11)


def test_a_training_text_that_copies_a_tested_one_is_left_out():
    copies = [{**row, "text": row["text"].upper() + "!"} for row in reviews("test", 3)]
    hub = Hub(amazon=lambda split: [*copies, *reviews(split)] if split == "train"
              else reviews(split))
    rows = read_probe_sets(hub, SMALL)[0][AMAZON]["rows"]
    train, test = ({normalised(text) for part, _, text, _ in rows if part == wanted}
                   for wanted in ("train", "test"))
    assert not train & test
    assert min(cells(rows).values()) == 5


def test_a_rare_attribute_makes_its_class_smaller_and_no_other():
    def few(split):
        return [row for row in biographies(split)
                if (row["profession"], row["gender"]) != (13, 1)
                or row["hard_text"].endswith(("number 1", "number 2", "number 3"))]

    counts = cells(read_probe_sets(Hub(bias=few), SMALL)[0][f"{BIOS}_class_set2"]["rows"])
    assert {counts["train", "13", gender] for gender in "01"} == {3}
    assert {counts["train", "11", gender] for gender in "01"} == {10}


def test_a_class_without_texts_costs_its_own_set_alone_and_is_named(capsys):
    def no_women_nurses(split):
        return [row for row in biographies(split)
                if (row["profession"], row["gender"]) != (13, 1)]

    probes, skipped = read_probe_sets(Hub(bias=no_women_nurses), SMALL)
    name = f"{BIOS}_class_set2"
    assert set(skipped) == {name}
    assert set(probes) == set(PROBE_SOURCES) - {name}
    assert skipped[name] == f"{BIOS} has no texts of class 13 of each of (0, 1)"
    assert capsys.readouterr().err == (f"probing set {name} is skipped, in all runs from this "
                                       f"cache: {skipped[name]}\n")


@pytest.mark.parametrize(("error", "reason"), [
    (UserError("not to be had"), "not to be had"),
    (KeyError("hard_text"), "KeyError('hard_text')"),
])
def test_a_data_set_that_cannot_be_read_costs_its_sets_alone(error, reason):
    probes, skipped = read_probe_sets(Hub(bias=error), SMALL)
    assert skipped == {f"{BIOS}_class_set{k}": reason for k in (1, 2, 3)}
    assert len(probes) == len(PROBE_SOURCES) - 3


def test_probing_sets_keep_the_second_attribute_of_each_text(tmp_path, processor):
    processor(bfloat16=False)
    rows = read_probe_sets(Hub(), SMALL)[0][AMAZON]["rows"]
    substrate = tiny_substrate(tmp_path, probe_train=20, probe_test=8)
    texts = read_probe_set(substrate, AMAZON, rows)
    plain = read_probe_set(substrate, "plain", [row[:3] for row in rows])
    assert plain.attributes is None
    of_text = {(label, part, value): 0 for _, label, _, value in rows for part in ("train", "test")}
    for key in zip(texts.labels, texts.parts, texts.attributes):
        of_text[key] += 1
    assert set(texts.attributes) == {"1.0", "5.0"}
    assert all(of_text.values())
    assert len(texts.attributes) == len(texts.labels) == 5 * (10 + 4)


# -- Text ----------------------------------------------------------------------------------------


def test_of_a_long_paper_only_the_beginning_is_read_and_headings_are_not(tmp_path, monkeypatch):
    rows = [{"text": "= Heading ="}, {"text": "word " * 4000}, {"text": "x" * 60},
            *({"text": f"{i} " + "y" * 60} for i in range(99))]
    monkeypatch.setattr(Pythia, "rows", lambda self, *place: iter(rows))
    pythia = Pythia(Cache(tmp_path))
    long, short, *rest = pythia.prose("kind", "a", "b", "train", PAPER + 70)
    assert len(long.text) == PAPER - 1  # without the space at its end
    assert (short.text, short.kind, short.source) == ("x" * 60, "kind", None)
    assert len(rest) == 1  # enough
    assert len(pythia.prose("kind", "a", "b", "train", math.inf)) == len(rows) - 1


def test_a_smaller_budget_announces_a_smaller_download():
    full, smoke = (megabytes(SIZES[budget]) for budget in ("full", "smoke"))
    assert full == sum(TEXT_MEGABYTES.values()) + sum(PROBE_MEGABYTES.values())
    assert sum(TEXT_MEGABYTES.values()) < smoke < full / 2


def test_every_repository_that_is_read_has_a_revision_and_a_size():
    sized = {*TEXT_MEGABYTES, *PROBE_MEGABYTES}
    assert sized | {Pythia.model_name} == set(Pythia.revisions)
    assert {source.path for source in PROBE_SOURCES.values()} == set(PROBE_MEGABYTES)
