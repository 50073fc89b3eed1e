"""Sparse probing: how well few features tell texts of a class from others."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lab.console import progress
from lab.language_model import LanguageModel
from lab.sparse import ExportedSAE
from lab.storage import code_digest, digest
from lab.substrates import Substrate
from lab.substrates.texts import Sizes, shuffled

K_VALUES = (1, 2, 5, 10, 20, 50)  # features that a sparse probe may use
MOST_TEXTS = {"train": 600, "test": 600}  # a class


class ProbeSet(NamedTuple):
    """Texts of a probing task: residuals of all their tokens, owners, labels, parts."""

    name: str
    acts_ND: Tensor  # raw, in half precision
    owner_N: Tensor  # which text a token is of
    labels: np.ndarray
    parts: np.ndarray  # train | test
    causes: tuple  # what determines all of these

    def pooled(self, add_: Callable[[Tensor, Tensor, Tensor], Any], width: int,
               chunk: int = 4096) -> np.ndarray:
        """Mean over each text's tokens, float32 [texts, width]; `add_` adds up raw activations'
        rows in the total of the text that owns them."""
        total = torch.zeros(len(self.labels), width)
        for acts, owner in zip(self.acts_ND.split(chunk), self.owner_N.split(chunk)):
            add_(total, owner, acts.float())
        counts = torch.bincount(self.owner_N, minlength=len(total)).clamp(min=1)
        return (total / counts[:, None]).numpy()


def probe_sets(substrate: Substrate) -> list[ProbeSet]:
    """Residuals at the hook of every probing text, real tokens only, from the cache if there."""
    return [read_probe_set(substrate, name, content["rows"])
            for name, content in substrate.corpus["probes"].items()]


def read_probe_set(substrate: Substrate, name: str, rows: list) -> ProbeSet:
    """Texts of a class in a fixed order, at most as many as the protocol uses."""
    wanted = {"train": substrate.sizes.probe_train // 2, "test": substrate.sizes.probe_test // 2}
    chosen = []
    for label in sorted({label for _, label, _ in rows}):
        for part, most in wanted.items():
            texts = [row for row in rows if row[0] == part and row[1] == label]
            chosen += shuffled(texts, "probe")[: min(most, MOST_TEXTS[part])]
    texts = [text for _, _, text in chosen]
    causes = (digest(texts), substrate.sizes.context_length, substrate.sink_norm,
              code_digest(text_residuals, LanguageModel))
    kept = substrate.cached(f"probe-{name.replace('/', '_')}",
                            lambda: (text_residuals(substrate, texts, name), None), *causes)[0]
    return ProbeSet(name, kept["acts"], kept["owner"], np.array([label for _, label, _ in chosen]),
                    np.array([part for part, _, _ in chosen]),
                    (*substrate.causes, *causes, digest(chosen)))


def text_residuals(substrate: Substrate, texts: list[str], name: str) -> dict[str, Tensor]:
    """Residuals of texts, cut to the context length, as one flat list of tokens with owners."""
    lm, limit = substrate.lm, substrate.sizes.context_length - 1
    documents = [ids[:limit] for ids in lm.tokenize(texts)]
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    batches = [order[start : start + 32] for start in range(0, len(order), 32)]
    acts, owner = [], []
    for batch in progress(batches, f"probing texts of {name}"):
        width = max(len(documents[i]) for i in batch)
        tokens = torch.full((len(batch), width + 1), lm.separator)
        for row, i in enumerate(batch):  # causal: padding on the right is never seen
            tokens[row, 1 : len(documents[i]) + 1] = torch.tensor(documents[i])
        x = lm.residual(tokens).cpu()
        real = torch.tensor([[0 < t <= len(documents[i]) for t in range(width + 1)]
                             for i in batch])
        real &= substrate.is_plain(x)
        acts.append(substrate.compact(x[real]))
        owner.append(torch.tensor(batch)[:, None].expand_as(real)[real])
    return {"acts": torch.cat(acts), "owner": torch.cat(owner)}


def evaluate_sparse_probing(sae: ExportedSAE, substrate: Substrate,
                            sets: list[ProbeSet]) -> dict[str, Any]:
    """How well single features, or few, tell texts of a class from others; higher is better,
    chance is 0.5.

    SAEBench's sparse probing without its choice of the full-width probe on test data. The
    same probes on the raw residual stream (`llm_…`) are the reference. What it cannot tell:
    whether a feature means the class or something that goes with it.
    """

    def add_features_(total_OF: Tensor, owner_N: Tensor, x_ND: Tensor) -> None:
        code = sae.code(x_ND)
        place_N = owner_N[code.row_N] * sae.d_sae + code.column_N
        total_OF.view(-1).index_add_(0, place_N, code.value_N)

    details = []
    for texts in sets:
        table = probe_table(texts.pooled(add_features_, sae.d_sae), texts, substrate.sizes)
        details.append({"dataset_name": f"{texts.name}_results",
                        **{f"llm_{key}": value for key, value in llm_table(substrate,
                                                                           texts).items()},
                        **{f"sae_{key}": value for key, value in table.items()}})
    names = [key for key in details[0] if key != "dataset_name"] if details else []
    means = {name: float(np.mean([row[name] for row in details if name in row])) for name in names}
    return {**means, "details": details}


def llm_table(substrate: Substrate, texts: ProbeSet) -> dict[str, float]:
    """The same probes on the residual stream itself, computed once a substrate."""
    causes = (substrate.sizes.probe_train, substrate.sizes.probe_test, texts.causes,
              code_digest(probe_table, add_rows_))
    return substrate.cached(
        f"probe-llm-{texts.name.replace('/', '_')}",
        lambda: ({}, probe_table(texts.pooled(add_rows_, texts.acts_ND.shape[1]), texts,
                                 substrate.sizes)), *causes)[1]


def add_rows_(total_OD: Tensor, owner_N: Tensor, x_ND: Tensor) -> None:
    total_OD.index_add_(0, owner_N, x_ND)


def probe_table(features: np.ndarray, texts: ProbeSet, sizes: Sizes) -> dict[str, float]:
    """Accuracies of one data set, mean over its classes one against the rest, by k."""
    table: dict[str, list[float]] = {}
    for label in np.unique(texts.labels):
        parts = {}
        for part, most in (("train", sizes.probe_train), ("test", sizes.probe_test)):
            index = binary_task(texts.labels, texts.parts, part, label, most)
            parts[part] = features[index], texts.labels[index] == label
        if min(len(parts["train"][1]), len(parts["test"][1])) < 4:
            continue  # too few texts of this class for a task: it does not count
        for k in (*K_VALUES, None):
            name = "test_accuracy" if k is None else f"top_{k}_test_accuracy"
            table.setdefault(name, []).append(probe_accuracy(parts["train"], parts["test"], k))
    return {name: float(np.mean(values)) for name, values in table.items()}


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
