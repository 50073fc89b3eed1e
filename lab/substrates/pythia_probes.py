"""The probing sets of the `pythia` substrate: SAEBench's eight, in the data sets' own splits."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lab.console import UserError, progress, report
from lab.substrates.texts import Sizes, distinct, probe_rows, without_copies

Rows = Callable[[str, str | None, str], Iterable[dict[str, Any]]]  # path, configuration, split
Cells = dict[tuple[Any, Any], list[str]]  # texts by class and attribute
Item = tuple[Any, Any, str]  # class, attribute, text
SPARE = 1.1  # so much more is read than is wanted, since copies are left out
LONGEST = 2_000  # characters of a text: about what a context of 128 tokens holds, or more
MOST_ROWS = 1_000_000  # of a pass: a class that is not there must not keep it going for hours


@dataclass(frozen=True)
class ProbeSource:
    """A probing set: where its rows are, and how a row becomes class, attribute and text."""

    path: str
    classes: tuple[Any, ...]
    label: Callable[[dict], Any]
    text: Callable[[dict], str | None]
    attributes: tuple[Any, ...] = (None,)  # of which a class holds equal parts; None: there is none
    attribute: Callable[[dict], Any] = lambda row: None
    configs: tuple[str | None, ...] = (None,)  # if several, the k-th is read for the k-th class
    splits: tuple[str, ...] = ("train", "test")  # only one: its texts are divided here


def bias_in_bios(*classes: int) -> ProbeSource:
    return ProbeSource("LabHC/bias_in_bios", classes, lambda row: row["profession"],
                       lambda row: row["hard_text"], (0, 1), lambda row: row["gender"])


AMAZON = "canrager/amazon_reviews_mcauley_1and5"
NEWS = "fancyzhx/ag_news"
PROBE_SOURCES = {
    "LabHC/bias_in_bios_class_set1": bias_in_bios(0, 1, 2, 6, 9),
    "LabHC/bias_in_bios_class_set2": bias_in_bios(11, 13, 14, 18, 19),
    "LabHC/bias_in_bios_class_set3": bias_in_bios(20, 21, 22, 25, 26),
    AMAZON: ProbeSource(AMAZON, (1, 2, 3, 5, 6), lambda row: row["category"],
                        lambda row: row["text"], (1.0, 5.0), lambda row: float(row["rating"])),
    f"{AMAZON}_sentiment": ProbeSource(AMAZON, (1.0, 5.0), lambda row: float(row["rating"]),
                                       lambda row: row["text"]),
    "codeparrot/github-code": ProbeSource(
        "codeparrot/github-code", ("C", "Python", "HTML", "Java", "PHP"),
        lambda row: row["language"],
        lambda row: row["code"][150:] if len(row["code"]) > 534 else None,
        configs=("all-all",), splits=("train",)),
    NEWS: ProbeSource(NEWS, (0, 1, 2, 3), lambda row: row["label"], lambda row: row["text"]),
    "Helsinki-NLP/europarl": ProbeSource(
        "Helsinki-NLP/europarl", ("en", "fr", "de", "es", "nl"),
        lambda row: next(iter(row["translation"])),
        lambda row: next(iter(row["translation"].values())),
        configs=("en-fr", "fr-it", "de-en", "es-fr", "nl-pt"), splits=("train",)),
}


def read_probe_sets(read: Rows, sizes: Sizes) -> tuple[dict[str, Any], dict[str, str]]:
    """All probing sets, and why others are left out. Each split of a data set is read once, for all
    the sets that are made of it."""
    wanted = {"train": sizes.probe_train // 2, "test": sizes.probe_test // 2}  # texts a class
    probes: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for path in progress(dict.fromkeys(one.path for one in PROBE_SOURCES.values()),
                         "data sets of probing texts"):
        sources = {name: one for name, one in PROBE_SOURCES.items() if one.path == path}
        parts: list[tuple[Cells, ...]] = []
        with skipping(sources, skipped):
            parts = read_parts(read, list(sources.values()), wanted)
        for (name, source), cells in zip(sources.items(), parts):
            with skipping([name], skipped):
                probes[name] = {"rows": rows_of(source, cells, wanted)}
    return probes, skipped


@contextlib.contextmanager
def skipping(names: Iterable[str], skipped: dict[str, str]) -> Iterator[None]:
    """A data set that cannot be had, or is not as it should be, costs its probing sets alone."""
    try:
        yield
    except (UserError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, UserError) else repr(error)
        for name in names:
            skipped[name] = reason
            report(f"probing set {name} is skipped, in all runs from this cache: {reason}")


def read_parts(read: Rows, sources: Sequence[ProbeSource],
               wanted: dict[str, int]) -> list[tuple[Cells, ...]]:
    """For each source the texts of each split of its data set."""
    splits = sources[0].splits
    sizes = wanted if len(splits) > 1 else {splits[0]: sum(wanted.values())}
    return list(zip(*(read_cells(read, sources, split, sizes[split]) for split in splits)))


def read_cells(read: Rows, sources: Sequence[ProbeSource], split: str,
               wanted: int) -> list[Cells]:
    """Texts of each source from one pass over a split, which ends when every class has `wanted`,
    and some to spare."""
    kept: list[Cells] = [{(label, value): [] for label in one.classes for value in one.attributes}
                         for one in sources]
    configs = sources[0].configs
    for k, config in enumerate(configs):
        open_ = {(i, cell) for i, cells in enumerate(kept) for cell in cells
                 if len(configs) == 1 or cell[0] == sources[i].classes[k]}
        for row in itertools.islice(read(sources[0].path, config, split), MOST_ROWS):
            for i, one in enumerate(sources):
                cell = one.label(row), one.attribute(row)
                if (i, cell) in open_ and (text := one.text(row)):
                    kept[i][cell].append(text[:LONGEST])
                    if len(kept[i][cell]) >= math.ceil(SPARE * wanted / len(one.attributes)):
                        open_.remove((i, cell))
            if not open_:
                break
    return kept


def rows_of(source: ProbeSource, parts: Sequence[Cells],
            wanted: dict[str, int]) -> list[tuple[str, ...]]:
    """Rows (part, class, text) of a set, with the attribute as a fourth where there is one: at most
    `wanted` texts a class and part, equally many of each attribute.

    No text is in both parts, nor a near-copy of one. Raises UserError for a class without texts.
    """
    items = [[(*cell, text) for cell, texts in cells.items() for text in texts] for cells in parts]
    train, test = divided_here(items[0]) if len(items) == 1 else apart(*items)
    rows: list[tuple[str, ...]] = []
    for label in source.classes:
        before = len(rows)
        for part, its in (("train", train), ("test", test)):
            groups = [[item for item in its if item[:2] == (label, value)]
                      for value in source.attributes]
            size = min(wanted[part] // len(groups), *map(len, groups))
            rows += [(part, str(label), text, *([] if value is None else [str(value)]))
                     for group in groups for _, value, text in group[:size]]
        if len(rows) == before:
            of = f" of each of {source.attributes}" if len(source.attributes) > 1 else ""
            raise UserError(f"{source.path} has no texts of class {label!r}{of}")
    return rows


def apart(train: list[Item], test: list[Item]) -> tuple[list[Item], list[Item]]:
    """Each text once, and training texts without near-copies of what is tested on."""
    train, test = (distinct(items, lambda item: item[2]) for items in (train, test))
    kept = set(without_copies([text for *_, text in train], [text for *_, text in test]))
    return [item for item in train if item[2] in kept], test


def divided_here(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """The training and the test part of texts that nobody has divided."""
    parts: dict[str, list[Item]] = {"train": [], "test": []}
    for part, label, text in probe_rows([(label, text) for label, _, text in items]):
        parts[part].append((label, None, text))
    return parts["train"], parts["test"]
