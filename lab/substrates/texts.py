"""Texts: documents, domains, learn and ask halves, cloze questions."""

import array
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

FORGET, RETAIN = 0, 1  # domains that labels name; what comes after is only evaluated on. Of learn
# text the kinds of retain text are domains of their own, from RETAIN on
NAMED = ("forget", "retain")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Sizes:
    """How much text a budget uses: the same for all runs that are compared."""

    context_length: int = 128  # tokens
    learn_tokens: int = 1_000_000  # unique training tokens, at most
    frequency_tokens: int = 100_000  # learn tokens a domain for firing frequencies, at most
    heldout_contexts: int = 256  # ask-half contexts a domain: reconstruction, conditioning
    frontier_contexts: int = 36  # a domain, the ones whose cross-entropy is measured
    frontier_length: int = 32  # tokens of each of them: more contexts tell more than long ones
    guard_contexts: int = 200  # learn retain contexts from which dynamic clamps have their limits
    question_candidates: int = 420  # a domain, before the filter
    questions: int = 200  # a domain, after it
    least_questions: int = 20  # a domain, with fewer of which a score is undefined
    probe_train: int = 4000  # texts a binary probing task, where the data allow
    probe_test: int = 1000


ALL = 10**9  # as many as there are
SIZES = {
    "full": Sizes(),
    "paper": Sizes(learn_tokens=ALL, frequency_tokens=1024 * 1024, heldout_contexts=200 * 16,
                   frontier_contexts=160, frontier_length=128, guard_contexts=1024,
                   question_candidates=ALL, questions=ALL),  # SAEBench's, where ours are smaller
    "smoke": Sizes(learn_tokens=30_000, frequency_tokens=8_000, heldout_contexts=24,
                   frontier_contexts=4, guard_contexts=8, question_candidates=16, questions=5,
                   least_questions=2, probe_train=80, probe_test=40),
}


def sides(number_KF: Tensor, by_KF: Tensor | None = None) -> Tensor:
    """A feature's two sides [2, F] of numbers by learn domain: forget text's, and that of the kind
    of retain text which has the largest of `by_KF`, the numbers themselves unless told."""
    by_KF = number_KF if by_KF is None else by_KF
    most_1F = by_KF[RETAIN:].argmax(0)[None]
    return torch.cat([number_KF[:RETAIN], number_KF[RETAIN:].gather(0, most_1F)])


class Document(NamedTuple):
    """A text, what it was made of, and its kind."""

    kind: str
    text: str
    source: Any


class Question(NamedTuple):
    """Four-way cloze: which option follows `prompt`, given what follows `empty` anyway."""

    prompt: str
    empty: str
    options: list[str]
    answer: int


def normalised(text: str) -> str:
    """Words in lower case, without punctuation: what makes two texts the same text."""
    return " ".join(re.findall(r"\w+", text.casefold()))


PASSAGE = 30  # words in a row that two texts share only if one has them from the other
OPENING = 200  # characters with which only copies begin alike


def families(texts: Sequence[str]) -> list[str]:
    """For every text the name of its family: texts of which one may be a near-copy of another.

    Two texts are of a family if they begin alike or share a passage, or through a third. The name
    is the least normalised text of the family, so that it depends on no order. Time and memory are
    linear in the words.
    """
    plain = [normalised(text) for text in texts]
    parent = list(range(len(plain)))

    def head(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, text in enumerate(plain):
        parent[head(i)] = head(first.setdefault(text[:OPENING], i))
    for i, j in sharing_passages(plain):
        parent[head(i)] = head(j)
    names: dict[int, str] = {}
    for i, text in enumerate(plain):
        names[head(i)] = min(text, names.get(head(i), text))
    return [names[head(i)] for i in range(len(plain))]


def sharing_passages(plain: Sequence[str], bins: int = 16) -> Iterator[tuple[int, int]]:
    """Pairs of normalised texts with a passage in common, enough to link all that share one.

    A passage is a number of 64 bits made of its words' hashes. All of them are sorted, a part at a
    time, which takes 12 bytes a word and a dictionary ten times as much.
    """
    weights = np.cumprod(np.full(PASSAGE, 0x9E3779B97F4A7C15, dtype=np.uint64))  # wraps around
    marks, owners = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int32)]
    for i, text in enumerate(plain):
        words = np.array([hash(word) for word in text.split()], dtype=np.int64).view(np.uint64)
        if len(words) >= PASSAGE:
            marks.append(np.convolve(words, weights, "valid"))
            owners.append(np.full(len(marks[-1]), i, dtype=np.int32))
    mark_W, owner_W = np.concatenate(marks), np.concatenate(owners)
    for part in range(bins):
        chosen = np.flatnonzero(mark_W % np.uint64(bins) == part)
        chosen = chosen[np.argsort(mark_W[chosen])]
        same = np.flatnonzero(mark_W[chosen[1:]] == mark_W[chosen[:-1]])
        pairs = np.stack([owner_W[chosen[same]], owner_W[chosen[same + 1]]], axis=1)
        yield from np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0).tolist()


def hash_fraction(name: str, purpose: str) -> float:
    """A number in [0, 1) that is the same for this name and purpose on every machine."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:6]) / 2**48


def divided(items: Sequence[Item], text: Callable[[Item], str],
            learn: Callable[[Item], float] = lambda _: 0.5) -> tuple[list[Item], list[Item]]:
    """The learn and the ask half of `items`: no text is in both, nor a near-copy of one.

    Of items with the same text, but for case, white space and punctuation, the first stays.
    `learn(item)` is the part of its kind that goes to the learn half; the least of a family counts.
    """
    halves: tuple[list[Item], list[Item]] = ([], [])
    items = distinct(items, text)
    names = families([text(item) for item in items])
    part: dict[str, float] = {}
    for item, family in zip(items, names):
        part[family] = min(learn(item), part.get(family, 1.0))
    for item, family in zip(items, names):
        halves[hash_fraction(family, "half") >= part[family]].append(item)
    return halves


Kinds = dict[str, list[Document]]  # documents by kind


def halved(documents: Sequence[Document], learn: dict[str, float]) -> dict[str, Kinds]:
    """The halves of all documents, divided at once: `learn` is the part of each kind that goes to
    the learn half. Of a kind that is learnt whole, copies of what is asked are left out."""
    halves: dict[str, Kinds] = {half: {kind: [] for kind in learn} for half in ("learn", "ask")}
    parts = divided(documents, lambda one: one.text, lambda one: learn[one.kind])
    for half, items in zip(halves, parts):
        for one in items:
            if half == "learn" or learn[one.kind] < 1:
                halves[half][one.kind].append(one)
    return halves


def laid_out(halves: dict[str, Kinds], domains: dict[str, tuple[str, ...]],
             written: Callable[[Document], str]) -> dict[str, Any]:
    """Of a corpus the texts by half and domain, given the kinds of each domain, and `documents`:
    how many there are by half and kind. Every kind of retain text is a learn domain."""
    learnt = {"forget": domains["forget"], **{kind: (kind,) for kind in domains["retain"]}}
    return {
        **{half: {domain: [written(one) for kind in kinds for one in halves[half][kind]]
                  for domain, kinds in of.items()}
           for half, of in (("learn", learnt), ("ask", domains))},
        "documents": {half: {kind: len(items) for kind, items in parts.items()}
                      for half, parts in halves.items()},
    }


def distinct(items: Sequence[Item], text: Callable[[Item], str]) -> list[Item]:
    """The first of all items with the same text."""
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(normalised(text(item)), item)
    return list(first.values())


def without_copies(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """Those of `texts` that are of no family with one of `others`, each once."""
    texts = distinct(texts, str)
    names = families([*texts, *others])
    known = set(names[len(texts):])
    return [text for text, name in zip(texts, names) if name not in known]


def probe_rows(items: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(class, text) pairs as (part, class, text): a fifth to test on, no near-copies across."""
    items = distinct(items, lambda item: item[1])
    return [("test" if hash_fraction(family, "probe") < 0.2 else "train", *item)
            for item, family in zip(items, families([text for _, text in items]))]


def shuffled(items: list, salt: str) -> list:
    """`items` in an order that depends on their content alone."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}{item}".encode()).digest())


def cloze_questions(meanings: dict[str, str], lengths: tuple[int, int] = (30, 90),
                    longest: int = 22) -> list[Question]:
    """Which of four names has this meaning? The wrong names are other right ones.

    Left out are names whose words the meaning gives away, names of more than `longest` characters,
    and meanings whose characters are not within `lengths`.
    """

    def telling(name: str, meaning: str) -> bool:
        stems = {word[:5] for word in re.findall(r"[a-z]{4,}", meaning.lower())}
        return any(word[:5] in stems for word in re.findall(r"[a-z]{4,}", name.lower()))

    pairs = [(name, meaning) for name, meaning in meanings.items()
             if lengths[0] <= len(meaning) <= lengths[1] and len(name) <= longest
             and not telling(name, meaning)]
    pairs = shuffled(pairs, "questions")
    names = shuffled([name for name, _ in pairs], "distractors")
    questions = []
    for i, (name, meaning) in enumerate(pairs[:2000]):
        wrong = [names[(3 * i + j) % len(names)] for j in range(4)]
        options = [other for other in wrong if other != name][:3]
        answer = i % 4
        options.insert(answer, name)
        questions.append(Question(f"Definition: {meaning}\nTerm:", "Term:", options, answer))
    return questions


COUNT = "(all|none|any|both|either|neither|some|most|more than one|one|two|three)( of)?"
ABOUT_OPTIONS = re.compile("|".join((  # of normalised options
    r"(all|none|both|either|neither)$",
    rf"{COUNT} (these|those|them|((the|these|those) )?((first|two|three|four) )?above)\b",
    rf"{COUNT} (the|these|those|three|four) ((other|given|listed|two|three|four) )*"
    r"(others?|options?|answers?|choices?|statements?|foregoing|preceding)\b",
    r".*\b(the above|(options?|answers?|choices?) [a-e])\b",
    r"only [a-e]$|[a-e] only$",
    r"((only|both|either|neither) )?[a-e]( (and|or|nor|but|not|[a-e]))* [a-e]\b"
    r"( (only|both|alone|are|is|correct|true|right|false))*$",
)))


def is_about_options(option: str) -> bool:
    """Whether it speaks of the other options, such as "All of the above" or "Both A and B", and
    so means nothing where an option is scored by itself."""
    return ABOUT_OPTIONS.match(normalised(option)) is not None


def pack_contexts(documents: Iterable[list[int]], separator: int, length: int) -> Tensor:
    """Documents joined by separators and cut into contexts [n, length], nothing padded."""
    stream = array.array("i")
    for document in documents:
        stream.append(separator)
        stream.extend(document)
    n = len(stream) // length
    return torch.from_numpy(np.array(stream[: n * length], dtype=np.int32)).view(n, length)
