"""Texts: domains, learn and ask halves, cloze questions."""

import hashlib
import re
from typing import NamedTuple

import torch
from torch import Tensor

FORGET, RETAIN, OTHER = 0, 1, 2  # domains of text; OTHER is only evaluated on, never named
DOMAINS = ("forget", "retain", "other")


class Question(NamedTuple):
    """Four-way cloze: which option follows `prompt`, given what follows `empty` anyway."""

    prompt: str
    empty: str
    options: list[str]
    answer: int


def lot(identity: str, purpose: str) -> float:
    """A number in [0, 1) that is the same for this identity and purpose on every machine."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{identity}".encode()).digest()[:6]) / 2**48


def in_learn_half(identity: str) -> bool:
    """Whether a document may be trained on; the other half is what questions ask about."""
    return lot(identity, "half") < 0.5


def probe_part(identity: str) -> str:
    return "test" if lot(identity, "probe") < 0.2 else "train"


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
