"""Texts: domains, learn and ask halves, cloze questions."""

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FORGET, RETAIN, OTHER = 0, 1, 2  # domains of text; OTHER is only evaluated on, never named
DOMAINS = ("forget", "retain", "other")


@dataclass(frozen=True)
class Sizes:
    """How much text a budget uses: the same for all runs that are compared."""

    context_length: int = 128  # tokens
    learn_tokens: int = 1_000_000  # unique training tokens, at most
    frequency_tokens: int = 100_000  # learn tokens a domain for firing frequencies, at most
    heldout_contexts: int = 256  # ask-half contexts a domain: reconstruction, conditioning
    frontier_contexts: int = 12  # a domain, the ones whose cross-entropy is measured
    question_candidates: int = 420  # a domain, before the filter
    questions: int = 200  # a domain, after it
    probe_train: int = 4000  # texts a binary probing task, where the data allow
    probe_test: int = 1000


SIZES = {
    "full": Sizes(),
    "smoke": Sizes(learn_tokens=30_000, frequency_tokens=8_000, heldout_contexts=24,
                   frontier_contexts=2, question_candidates=16, questions=5, probe_train=80,
                   probe_test=40),
}


class Question(NamedTuple):
    """Four-way cloze: which option follows `prompt`, given what follows `empty` anyway."""

    prompt: str
    empty: str
    options: list[str]
    answer: int


def hash_fraction(identity: str, purpose: str) -> float:
    """A number in [0, 1) that is the same for this identity and purpose on every machine."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{identity}".encode()).digest()[:6]) / 2**48


def in_learn_half(identity: str) -> bool:
    """Whether a document may be trained on; the other half is what questions ask about."""
    return hash_fraction(identity, "half") < 0.5


def probe_part(identity: str) -> str:
    return "test" if hash_fraction(identity, "probe") < 0.2 else "train"


def shuffled(items: list, salt: str) -> list:
    """`items` in an order that depends on their content alone."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}{item}".encode()).digest())


def cloze_questions(meanings: dict[str, str]) -> list[Question]:
    """Which of four names has this definition? Names whose words the definition gives away, and
    long ones, are left out; the wrong names are other right ones."""

    def telling(name: str, definition: str) -> bool:
        stems = {word[:5] for word in re.findall(r"[a-z]{4,}", definition.lower())}
        return any(word[:5] in stems for word in re.findall(r"[a-z]{4,}", name.lower()))

    pairs = [
        (name, definition) for name, definition in meanings.items()
        if 30 <= len(definition) <= 90 and len(name) <= 22 and not telling(name, definition)
    ]
    pairs = shuffled(pairs, "questions")
    names = shuffled([name for name, _ in pairs], "distractors")
    questions = []
    for i, (name, definition) in enumerate(pairs[:2000]):
        wrong = [names[(3 * i + j) % len(names)] for j in range(4)]
        options = [other for other in wrong if other != name][:3]
        answer = i % 4
        options.insert(answer, name)
        questions.append(Question(f"Definition: {definition}\nTerm:", "Term:", options, answer))
    return questions


def pack_contexts(documents: list[list[int]], separator: int, length: int) -> Tensor:
    """Documents joined by separators and cut into contexts [n, length], nothing padded."""
    stream = [token for document in documents for token in (separator, *document)]
    n = len(stream) // length
    return torch.tensor(stream[: n * length], dtype=torch.int32).view(n, length)
