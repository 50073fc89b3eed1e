"""Sparse probing: how well few features tell texts of a class from others."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

CustomSAEConfig = Any


K_VALUES = (1, 2, 5, 10, 20, 50)  # sparse probing


class ProbeSet(NamedTuple):
    """Texts of a probing task: residuals of all their tokens, owners, labels, parts."""

    acts_ND: Tensor  # float16, raw
    owner_N: Tensor  # which text a token is of
    labels: np.ndarray
    parts: np.ndarray  # train | test
    causes: tuple  # what its texts and tokens depend on

    def pooled(self, add_: Callable[[Tensor, Tensor, Tensor], Any], width: int,
               chunk: int = 4096) -> np.ndarray:
        """Mean over each text's tokens, float32 [texts, width]; `add_` adds up raw activations'
        rows in the total of the text that owns them."""
        total = torch.zeros(len(self.labels), width)
        for acts, owner in zip(self.acts_ND.split(chunk), self.owner_N.split(chunk)):
            add_(total, owner, acts.float())
        counts = torch.bincount(self.owner_N, minlength=len(total)).clamp(min=1)
        return (total / counts[:, None]).numpy()


def add_rows_(total_OD: Tensor, owner_N: Tensor, x_ND: Tensor) -> None:
    total_OD.index_add_(0, owner_N, x_ND)


def probe_accuracy(train: tuple, test: tuple, k: int | None) -> float:
    """Test accuracy of a logistic regression on the k columns with the largest difference of class
    means on the training part (all columns for None): Kantamneni et al. 2025, SAEBench."""
    (x, y), (x_test, y_test) = train, test
    if k is not None:
        gap = np.abs(x[y].mean(0) - x[~y].mean(0))
        best = np.argsort(-gap, kind="stable")[:k]
        x, x_test = x[:, best], x_test[:, best]
    probe = LogisticRegression(C=1.0, max_iter=1000)
    return float((probe.fit(x, y).predict(x_test) == y_test).mean())


def binary_task(labels: np.ndarray, parts: np.ndarray, part: str, label: str,
                most: int) -> np.ndarray:
    """Texts of one class, and as many of all other classes in equal numbers; positives first."""
    inside = parts == part
    positive = np.flatnonzero(inside & (labels == label))[: most // 2]
    others = [name for name in np.unique(labels) if name != label]
    each = math.ceil(len(positive) / max(1, len(others)))
    pools = [np.flatnonzero(inside & (labels == name))[:each] for name in others]
    negative = np.concatenate(pools)[: len(positive)] if pools else positive[:0]
    positive = positive[: len(negative)]
    return np.concatenate([positive, negative])


def probe_table(features: np.ndarray, texts: ProbeSet, config: CustomSAEConfig) -> dict[str, float]:
    """Accuracies of one data set, mean over its classes one against the rest, by k."""
    table: dict[str, list[float]] = {}
    for label in np.unique(texts.labels):
        parts = {}
        for part, most in (("train", config.probe_train), ("test", config.probe_test)):
            index = binary_task(texts.labels, texts.parts, part, label, most)
            parts[part] = features[index], texts.labels[index] == label
        if min(len(parts["train"][1]), len(parts["test"][1])) < 4:
            continue  # too few texts of this class for a task: it does not count
        for k in (*K_VALUES, None):
            name = "test_accuracy" if k is None else f"top_{k}_test_accuracy"
            table.setdefault(name, []).append(probe_accuracy(parts["train"], parts["test"], k))
    return {name: float(np.mean(values)) for name, values in table.items()}
