"""Separation: how much of one class can be removed without taking the others along."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lab.console import progress
from lab.evaluations.probing import (
    LEAST_TEXTS,
    PooledSet,
    ProbeSet,
    Tasks,
    pooled_for,
    probe_tasks,
)
from lab.sparse import ExportedSAE
from lab.storage import code_digest, digest, randomness
from lab.substrates import Substrate
from lab.substrates.texts import Sizes

N_VALUES = (2, 5, 10, 20, 50, 100, 500)  # features set to zero
LEAST_CLASSES = 3  # of two classes, one probe is the other's opposite: nothing is unintended
LEAST_GAP = 0.001  # of accuracy that the bias costs, below which SCR counts as 0
EPOCHS, BATCH_SIZE, LEARNING_RATE, L1_PENALTY = 20, 16, 1e-3, 1e-3  # of probes, SAEBench's
TPP_KINDS = ("total_metric", "intended_diff_only", "unintended_diff_only")
SCR_KINDS = ("metric", "dir1", "dir2")
BIASED = "biased"  # the probe of SCR that sees class and attribute go together


class Probe(NamedTuple):
    """A text is positive where its pooled residual x̄ [D] has x̄·weight + bias > 0."""

    weight_D: np.ndarray
    bias: float


def evaluate_separation(sae: ExportedSAE, substrate: Substrate,
                        sets: Iterable[ProbeSet | PooledSet]) -> dict[str, Any]:
    """What the accuracy of a class's probe loses when the class's features are set to zero, less
    what the other classes' probes lose; higher is better, 0 is none, about 0.5 the most.

    Targeted probe perturbation and, where texts carry a second attribute, spurious correlation
    removal: Karvonen et al. 2024, SAEBench's `scr_and_tpp`. No loss sees these labels. Numbers
    are means over classes (SCR: pairs), then sets; `details` has each set's, `skipped` the sets
    that TPP leaves out. Probes are SAEBench's linear probes on pooled residuals.

    `tpp_contrast_…` is ours: features are set not to zero but to their mean over training texts of
    other classes. Zero also takes what a feature has on every text, which shifts a probe by a
    constant and costs accuracy although the classes stay as far apart as they were.

    Otherwise than in SAEBench:

    - A probe is taken after its last epoch. SAEBench takes the epoch of best test accuracy.
    - Accuracies before and after are of the same texts. SAEBench draws the negatives anew.
    - Only features with an effect above zero are ablated. Where there are fewer than n, SAEBench
      fills up with others, in no order.
    - Padding takes no part. SAEBench ablates there as well, what fires on a residual of zero.
    - All probing sets count, not two of them; classes have what texts the data allow.
    - SCR pairs neighbouring classes of a set, as SAEBench's pairs cross its sets. Its three tasks
      are of equal size, as there, but of half as many texts.

    What it cannot tell: whether knowledge is gone, or only hidden from a linear probe.
    """
    details, pairs, skipped = [], [], {}
    for texts in (pooled_for(sae, one) for one in sets):
        tasks = probe_tasks(texts, substrate.sizes)[0]
        if len(tasks) < LEAST_CLASSES:
            skipped[texts.name] = f"{len(tasks)} classes with a task; TPP needs {LEAST_CLASSES}"
        else:
            numbers = perturbation(texts, tasks, trained_probes(substrate, texts, tasks))
            details.append({"dataset_name": f"{texts.name}_tpp_results", **numbers})
        for pair, three in correlated_tasks(texts, substrate.sizes).items():
            numbers = correlation_removal(texts, three, trained_probes(substrate, texts, three))
            pairs.append({"dataset_name": f"{texts.name}_scr_{pair}_results", **numbers})
    return {**means(details, tpp_names()), **(means(pairs, scr_names()) if pairs else {}),
            "details": details + pairs, "skipped": skipped}


def tpp_names() -> list[str]:
    """SAEBench's, and ours."""
    return ([f"tpp_threshold_{n}_{kind}" for kind in TPP_KINDS for n in N_VALUES]
            + [f"tpp_contrast_threshold_{n}_total_metric" for n in N_VALUES])


def scr_names() -> list[str]:
    return [f"scr_{kind}_threshold_{n}" for kind in SCR_KINDS for n in N_VALUES]


def means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    return {name: float(np.mean([row[name] for row in rows])) if rows else None for name in names}


def perturbation(texts: PooledSet, tasks: Tasks, probes: Mapping[str, Probe]) -> dict[str, float]:
    """TPP of one set. A feature's effect on class i is max(0, mean f̄ of positives − of negatives)
    × (probe_i · w) on training texts; the class's top n are set to zero in every test text, or
    to the mean of negatives (`contrast`), which moves positive texts by just these effects.

    Intended is the accuracy that probe i loses on its own task, unintended the mean of what the
    others lose on theirs, both signed.
    """
    lost_LCCN = np.empty((2, len(tasks), len(tasks), len(N_VALUES)))  # two levels
    for i, (label, task) in enumerate(tasks.items()):
        positive_F, negative_F = class_means(texts, task)
        gap_F = np.maximum(positive_F - negative_F, 0)
        ranked = ranked_features(gap_F * pull(texts.sae, probes[label]))
        for j, (other, its) in enumerate(tasks.items()):
            for lost_CCN, level_F in zip(lost_LCCN, (0 * gap_F, negative_F)):
                accuracy = accuracies(texts, probes[other], its["test"], ranked, level_F)
                lost_CCN[i, j] = accuracy[0] - accuracy[1:]
    intended_LCN = np.einsum("liin->lin", lost_LCCN)
    unintended_LCN = (lost_LCCN.sum(2) - intended_LCN) / (len(tasks) - 1)
    zero, contrast = (intended_LCN - unintended_LCN).mean(1)
    numbers = zero, intended_LCN[0].mean(0), unintended_LCN[0].mean(0), contrast
    return dict(zip(tpp_names(), np.concatenate(numbers).tolist()))


def correlation_removal(texts: PooledSet, tasks: Tasks,
                        probes: Mapping[str, Probe]) -> dict[str, float]:
    """SCR of one pair of classes: how much of the accuracy that a biased probe lacks comes back.

    Direction 1 tests the biased probe on the class after the top n features of the attribute's
    probe, by |effect|, are set to zero; direction 2 exchanges the two. A score is (accuracy after −
    before) / (accuracy of the unbiased probe − before). `metric` is the direction in which the
    biased probe was worse, the first if neither was.
    """
    scores, before = [], []
    for target, other in (("class", "attribute"), ("attribute", "class")):
        gap_F = np.subtract(*class_means(texts, tasks[other]))
        ranked = ranked_features(np.abs(gap_F * pull(texts.sae, probes[other])))
        biased, clean = (accuracies(texts, probes[name], tasks[target]["test"], ranked, 0 * gap_F)
                         for name in (BIASED, target))
        gained_N, lacking = biased[1:] - biased[0], clean[0] - biased[0]
        scores.append(gained_N / lacking if lacking >= LEAST_GAP else 0 * gained_N)
        before.append(biased[0])
    worse = scores[0] if before[0] <= before[1] else scores[1]
    return dict(zip(scr_names(), np.concatenate([worse, *scores]).tolist()))


def class_means(texts: PooledSet, task: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Mean pooled activations [F] of a task's positive and of its negative training texts."""
    return [texts.features_OF[half].mean(0) for half in np.split(task["train"], 2)]


def pull(sae: ExportedSAE, probe: Probe) -> np.ndarray:
    """How far a unit of each feature [F] moves the probe."""
    return sae.W_dec.numpy() @ probe.weight_D


def ranked_features(effect_F: np.ndarray) -> np.ndarray:
    """The features with the largest effects above zero, largest first, as many as are needed."""
    order = np.argsort(-effect_F, kind="stable")[: max(N_VALUES)]
    return order[effect_F[order] > 0]


def accuracies(texts: PooledSet, probe: Probe, index: np.ndarray, ranked: np.ndarray,
               level_F: np.ndarray) -> np.ndarray:
    """A probe's accuracy on a task's texts: as they are, then with the first n ranked features set
    to a level, for every n of N_VALUES.

    The SAE's error stays. Pooling is linear, so the pooled residual becomes
    x̄ − Σ_j (f̄_j − level_j) w_j exactly, whatever the tokens.
    """
    effect_R = (texts.sae.W_dec[ranked].numpy() @ probe.weight_D).astype(np.float64)
    above_OR = texts.features_OF[np.ix_(index, ranked)] - level_F[ranked]
    removed_OR = np.cumsum(above_OR * effect_R, axis=1)
    removed_OR = np.pad(removed_OR, ((0, 0), (1, 0)))
    counts = [0, *(min(n, len(ranked)) for n in N_VALUES)]
    logit_O = texts.residuals_OD[index] @ probe.weight_D + probe.bias
    positive_O = np.arange(len(index)) < len(index) // 2
    return (((logit_O[:, None] - removed_OR[:, counts]) > 0) == positive_O[:, None]).mean(0)


def correlated_tasks(texts: PooledSet, sizes: Sizes) -> dict[str, Tasks]:
    """SCR's tasks of each pair of neighbouring classes: the class with attributes in equal parts,
    the attribute with classes in equal parts, and both at once (`biased`).

    Pairs for which there are too few texts are left out, as is a set whose texts have no second
    attribute or more than two values of it.
    """
    if texts.attributes is None or len(np.unique(texts.attributes)) != 2:
        return {}
    labels, pairs = np.unique(texts.labels), {}
    for first, second in zip(labels[::2], labels[1::2]):
        tasks: Tasks = {"class": {}, "attribute": {}, BIASED: {}}
        for part, most in (("train", sizes.probe_train), ("test", sizes.probe_test)):
            for name, index in quadrants(texts, part, (first, second), most).items():
                tasks[name][part] = index
        if min(len(index) for task in tasks.values() for index in task.values()) >= LEAST_TEXTS:
            pairs[f"{first}_{second}"] = tasks
    return pairs


def quadrants(texts: PooledSet, part: str, pair: tuple[str, str],
              most: int) -> dict[str, np.ndarray]:
    """Texts of each of SCR's tasks, equally many, positive ones first. The first class and the
    first attribute are positive."""
    inside = texts.parts == part
    cells = [[np.flatnonzero(inside & (texts.labels == label) & (texts.attributes == value))
              for value in np.unique(texts.attributes)] for label in pair]
    (a, b), (c, d) = cells
    q = min(most // 4, len(b), len(c), len(a) // 2, len(d) // 2)
    return {"class": np.concatenate([a[:q], b[:q], c[:q], d[:q]]),
            "attribute": np.concatenate([a[:q], c[:q], b[:q], d[:q]]),
            BIASED: np.concatenate([a[: 2 * q], d[: 2 * q]])}


def trained_probes(substrate: Substrate, texts: PooledSet, tasks: Tasks) -> dict[str, Probe]:
    """A linear probe for each task; the same for all SAEs, so trained once a substrate."""
    train = {name: task["train"] for name, task in tasks.items()}

    def build() -> tuple[dict[str, Tensor], Any]:
        x_OD = torch.from_numpy(texts.residuals_OD)
        return {"probes": torch.stack([train_probe(x_OD[index], texts.name, name) for name, index in
                                       progress(train.items(), f"probes of {texts.name}")])}, None

    chosen = digest([(name, index.tolist()) for name, index in train.items()])
    kept = substrate.cached(f"separation-probes-{texts.name.replace('/', '_')}", build,
                            texts.causes, chosen, code_digest(trained_probes, ProbeSet))[0]
    return {name: Probe(row[:-1].numpy(), float(row[-1])) for name, row in
            zip(train, kept["probes"])}


def train_probe(x_OD: Tensor, *causes: Any) -> Tensor:
    """Weight and bias [D + 1] of a linear probe on pooled residuals, the first half of which are
    positive: cross-entropy and an L1 penalty on the weight, by AdamW, with SAEBench's settings.

    Start and order of texts depend on `causes` alone.
    """
    generator, bound = randomness("separation", *causes), x_OD.shape[1] ** -0.5
    weight_D = torch.empty(x_OD.shape[1]).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(1).uniform_(-bound, bound, generator=generator)
    y_O = (torch.arange(len(x_OD)) < len(x_OD) // 2).float()
    optimizer = torch.optim.AdamW([weight_D.requires_grad_(), bias.requires_grad_()],
                                  lr=LEARNING_RATE, fused=True)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x_OD), generator=generator).split(BATCH_SIZE):
            loss = nn.functional.binary_cross_entropy_with_logits(x_OD[batch] @ weight_D + bias,
                                                                  y_O[batch])
            optimizer.zero_grad()
            (loss + L1_PENALTY * weight_D.abs().sum()).backward()
            optimizer.step()
    return torch.cat([weight_D, bias]).detach()
