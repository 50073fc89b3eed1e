"""Sparse probing: how well few features tell texts of a class from others."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lab.console import progress
from lab.language_model import LanguageModel
from lab.sparse import ExportedSAE
from lab.storage import code_digest, digest
from lab.substrates import Substrate
from lab.substrates.texts import Sizes, shuffled

K_VALUES = (1, 2, 5, 10, 20, 50)  # features that a sparse probe may use
SEED = 42  # of the choice of texts
LEAST_TEXTS = 4  # of a part of a task
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # C between which a reference probe chooses
FOLDS = 3  # of its training part
TEXTS_AT_ONCE = 32  # through the language model
TOKENS_AT_ONCE = 4096  # through the SAE

Tasks = dict[str, dict[str, np.ndarray]]  # by class and part: texts, positives first


class ProbeSet(NamedTuple):
    """Texts of a probing task: residuals of all their tokens, owners, labels, parts."""

    name: str
    acts_ND: Tensor  # raw, in half precision
    owner_N: Tensor  # which text a token is of
    labels: np.ndarray
    parts: np.ndarray  # train | test
    causes: tuple  # what determines all of these
    attributes: np.ndarray | None = None  # beside the class, of two values: gender, rating

    def pooled(self, add_: Callable[[Tensor, Tensor, Tensor], Any], width: int,
               chunk: int = TOKENS_AT_ONCE) -> np.ndarray:
        """Mean over each text's tokens, float32 [texts, width]; `add_` adds up raw activations'
        rows in the total of the text that owns them."""
        total = torch.zeros(len(self.labels), width)
        for acts, owner in zip(self.acts_ND.split(chunk), self.owner_N.split(chunk)):
            add_(total, owner, acts.float())
        counts = torch.bincount(self.owner_N, minlength=len(total)).clamp(min=1)
        return (total / counts[:, None]).numpy()


class PooledSet(NamedTuple):
    """A probing set without tokens: each text is their mean. Evaluations of one SAE share it."""

    sae: ExportedSAE
    name: str
    residuals_OD: np.ndarray  # O texts
    features_OF: np.ndarray
    labels: np.ndarray
    parts: np.ndarray
    causes: tuple  # what determines all of these but the features
    attributes: np.ndarray | None = None


def pooled_for(sae: ExportedSAE, texts: ProbeSet | PooledSet) -> PooledSet:
    """The set with the pooled features of `sae`; raises ValueError if it has another SAE's."""
    if isinstance(texts, ProbeSet):
        features_OF = texts.pooled(functools.partial(add_features_, sae), sae.d_sae)
        return PooledSet(sae, texts.name, texts.pooled(add_rows_, sae.d_in), features_OF,
                         texts.labels, texts.parts, texts.causes, texts.attributes)
    if texts.sae is not sae:
        raise ValueError(f"{texts.name} has the features of another SAE")
    return texts


def add_rows_(total_OD: Tensor, owner_N: Tensor, x_ND: Tensor) -> None:
    total_OD.index_add_(0, owner_N, x_ND)


def add_features_(sae: ExportedSAE, total_OF: Tensor, owner_N: Tensor, x_ND: Tensor) -> None:
    code = sae.code(x_ND)
    place_N = owner_N[code.row_N] * sae.d_sae + code.column_N
    total_OF.view(-1).index_add_(0, place_N, code.value_N)


def probe_sets(substrate: Substrate) -> Iterator[ProbeSet]:
    """Residuals at the hook of every probing text, real tokens only, from the cache if there; one
    set at a time is in memory."""
    for name, content in substrate.corpus["probes"].items():
        yield read_probe_set(substrate, name, content["rows"])


def read_probe_set(substrate: Substrate, name: str, rows: list) -> ProbeSet:
    """Texts of a class in a fixed order, at most as many as a task has positives. A row is (part,
    class, text), and has the attribute as a fourth where there is one."""
    wanted = {"train": substrate.sizes.probe_train // 2, "test": substrate.sizes.probe_test // 2}
    chosen = []
    for label in sorted({row[1] for row in rows}):
        for part, most in wanted.items():
            texts = [row for row in rows if row[0] == part and row[1] == label]
            chosen += shuffled(texts, f"probe {SEED}")[:most]
    parts, labels, texts, *attributes = map(list, zip(*chosen))
    causes = (digest(texts), substrate.sizes.context_length, substrate.sink_norm,
              code_digest(text_residuals, LanguageModel, Substrate))
    kept = substrate.cached(f"probe-{name.replace('/', '_')}",
                            lambda: (text_residuals(substrate, texts, name), None), *causes)[0]
    return ProbeSet(name, kept["acts"], kept["owner"], np.array(labels), np.array(parts),
                    (*substrate.causes, *causes, digest(chosen)), *map(np.array, attributes))


def text_residuals(substrate: Substrate, texts: list[str], name: str) -> dict[str, Tensor]:
    """Residuals of texts, cut to the context length, as one flat list of tokens with owners."""
    lm, limit = substrate.lm, substrate.sizes.context_length - 1
    documents = [ids[:limit] for ids in lm.tokenize(texts)]
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    batches = [order[start : start + TEXTS_AT_ONCE]
               for start in range(0, len(order), TEXTS_AT_ONCE)]
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
                            sets: Iterable[ProbeSet | PooledSet]) -> dict[str, Any]:
    """How well single features, or few, tell texts of a class from others; higher is better,
    chance is 0.5.

    SAEBench's sparse probing; its full-width probe is trained otherwise, and chosen by its accuracy
    on test data, which ours is not. The reference are probes on the raw residual stream (`llm_…`).
    They are given what they need to be good: standardised inputs, and a strength that is chosen by
    cross-validation on the training part. `texts` of a data set are those that each class's task
    used. `skipped` has the sets and classes without a task; they count for nothing. What it cannot
    tell: whether a feature means the class or something that goes with it.
    """
    details, skipped = [], {}
    for texts in (pooled_for(sae, one) for one in sets):
        tasks, left_out = probe_tasks(texts, substrate.sizes)
        skipped |= left_out
        if tasks:
            tables = {"llm": llm_table(substrate, texts, tasks),
                      "sae": probe_table(texts.features_OF, texts, tasks)}
            details.append({"dataset_name": f"{texts.name}_results",
                            **{f"{side}_{key}": accuracy for side, table in tables.items()
                               for key, accuracy in table.items()}, "texts": sizes_of(tasks)})
    names = [f"{side}_{score(k)}" for side in ("llm", "sae") for k in (*K_VALUES, None)]
    return {**{name: float(np.mean([row[name] for row in details])) if details else None
               for name in names}, "details": details, "skipped": skipped}


def llm_table(substrate: Substrate, texts: PooledSet, tasks: Tasks) -> dict[str, float]:
    """Probes on the residual stream itself, the same for all SAEs and so made once."""
    causes = (substrate.sizes.probe_train, substrate.sizes.probe_test, texts.causes,
              code_digest(probe_tasks, probe_table, add_rows_, ProbeSet))
    return substrate.cached(
        f"probe-llm-{texts.name.replace('/', '_')}",
        lambda: ({}, probe_table(texts.residuals_OD, texts, tasks, tuned=True)), *causes)[1]


def probe_tasks(texts: ProbeSet | PooledSet, sizes: Sizes) -> tuple[Tasks, dict[str, str]]:
    """The binary task of each class that has the texts for one, and why others have none."""
    tasks, left_out = {}, {}
    for label in np.unique(texts.labels):
        task = {part: binary_task(texts.labels, texts.parts, part, label, most)
                for part, most in (("train", sizes.probe_train), ("test", sizes.probe_test))}
        if min(map(len, task.values())) >= LEAST_TEXTS:
            tasks[str(label)] = task
        else:
            left_out[f"{texts.name}, class {label}"] = (
                f"its task would have {len(task['train'])} training and {len(task['test'])} test "
                f"texts; {LEAST_TEXTS} of each are needed")
    return tasks, left_out if tasks else {texts.name: "no class has the texts for a task"}


def sizes_of(tasks: Tasks) -> dict[str, dict[str, int]]:
    """Texts of each class's task by part; half of them are of the class."""
    return {label: {part: len(index) for part, index in task.items()}
            for label, task in tasks.items()}


def score(k: int | None) -> str:
    """SAEBench's name of the accuracy on k columns, or on all."""
    return "test_accuracy" if k is None else f"top_{k}_test_accuracy"


def probe_table(features: np.ndarray, texts: PooledSet, tasks: Tasks,
                tuned: bool = False) -> dict[str, float]:
    """Accuracies of one data set, mean over its classes one against the rest, by k."""
    table: dict[str, list[float]] = {score(k): [] for k in (*K_VALUES, None)}
    for label, task in tasks.items():
        parts = [(features[index], texts.labels[index] == label)
                 for index in (task["train"], task["test"])]
        for k in (*K_VALUES, None):
            table[score(k)].append(probe_accuracy(*parts, k, tuned))
    return {name: float(np.mean(values)) for name, values in table.items()}


def binary_task(labels: np.ndarray, parts: np.ndarray, part: str, label: str,
                most: int) -> np.ndarray:
    """Texts of one class, and as many of all other classes, of each equally many as far as they
    go; positives first, at most `most` texts in all."""
    inside = parts == part
    positive = np.flatnonzero(inside & (labels == label))[: most // 2]
    others = [np.flatnonzero(inside & (labels == name)) for name in np.unique(labels)
              if name != label]
    turn = np.concatenate([np.arange(len(pool)) for pool in others] or [positive[:0]])
    pooled = np.concatenate(others or [positive[:0]])
    negative = pooled[np.argsort(turn, kind="stable")][: len(positive)]
    return np.concatenate([positive[: len(negative)], negative])


def probe_accuracy(train: tuple, test: tuple, k: int | None, tuned: bool = False) -> float:
    """Test accuracy of a logistic regression on the k columns with the largest difference of class
    means on the training part (all columns for None): Kantamneni et al. 2025, SAEBench.

    `tuned`: columns are standardised first, and of STRENGTHS the one is taken that is best where
    it is trained on some of the training part and tested on the rest.
    """
    (x, y), (x_test, y_test) = train, test
    if tuned:
        scaler = StandardScaler().fit(x)
        x, x_test = scaler.transform(x), scaler.transform(x_test)
    if k is not None:
        gap = np.abs(x[y].mean(0) - x[~y].mean(0))
        best = np.argsort(-gap, kind="stable")[:k]
        x, x_test = x[:, best], x_test[:, best]
    probe = LogisticRegression(C=1.0, max_iter=1000)
    if tuned:
        folds = min(FOLDS, int(y.sum()), int((~y).sum()))
        probe = GridSearchCV(probe, {"C": STRENGTHS}, cv=folds)
    return float((probe.fit(x, y).predict(x_test) == y_test).mean())
