"""Sparse probing: tasks, pooling and accuracies, and no odd class or set decides for the others."""


import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny_substrate import random_sae, tiny_substrate

from lab.evaluations import probing
from lab.evaluations.probing import (
    K_VALUES,
    LEAST_TEXTS,
    STRENGTHS,
    ProbeSet,
    add_rows_,
    binary_task,
    evaluate_sparse_probing,
    pooled_for,
    probe_accuracy,
    probe_sets,
    probe_table,
    probe_tasks,
    sizes_of,
    text_residuals,
)
from lab.storage import randomness
from lab.substrates.texts import Sizes

NAMES = [f"{side}_{k}test_accuracy" for side in ("llm", "sae")
         for k in (*(f"top_{k}_" for k in K_VALUES), "")]


def rows(counts, words=6):
    """Texts (part, class, text) of random words; `counts` are (train, test) by class."""
    made = []
    for label, sizes in counts.items():
        for part, n in zip(("train", "test"), sizes):
            g = randomness("texts", label, part)
            for i in range(n):
                text = [f"{label}{int(w)}" for w in torch.randint(0, 30, (words,), generator=g)]
                made.append((part, label, " ".join([*text, f"{part}{i}"])))
    return made


def evaluated(folder, probes, **sizes):
    substrate = tiny_substrate(folder, probes=probes, **sizes)
    return evaluate_sparse_probing(random_sae(), substrate, probe_sets(substrate))


@pytest.fixture(autouse=True)
def float32(processor):
    """So that what must be equal is."""
    processor(bfloat16=False)


# -- Tasks -----------------------------------------------------------------------------------------


def chosen(counts, label, most):
    """How many texts of each class a task takes, positives first."""
    labels = np.repeat(list(counts), list(counts.values()))
    index = binary_task(labels, np.full(len(labels), "train"), "train", label, most)
    half = len(index) // 2
    assert len(set(index)) == len(index)
    assert set(labels[index[:half]]) <= {label}
    assert label not in labels[index[half:]]
    return {name: int((labels[index] == name).sum()) for name in counts}


def test_a_task_is_half_of_one_class_and_half_of_all_others_alike():
    assert chosen({"a": 6, "b": 9, "c": 9}, "a", 100) == {"a": 6, "b": 3, "c": 3}
    assert chosen({"a": 6, "b": 9, "c": 9}, "a", 8) == {"a": 4, "b": 2, "c": 2}
    assert chosen({"a": 5, "b": 9, "c": 9}, "a", 100) == {"a": 5, "b": 3, "c": 2}


def test_a_class_of_few_texts_makes_no_other_classes_task_smaller():
    """What it lacks as a negative the others give."""
    assert chosen({"a": 6, "b": 9, "c": 1}, "a", 100) == {"a": 6, "b": 5, "c": 1}
    assert chosen({"a": 6, "b": 4, "c": 0}, "a", 100) == {"a": 4, "b": 4, "c": 0}


def test_a_class_alone_or_without_texts_has_an_empty_task():
    assert chosen({"a": 6}, "a", 100) == {"a": 0}
    assert chosen({"a": 0, "b": 6}, "a", 100) == {"a": 0, "b": 0}


def test_only_texts_of_the_part_are_in_a_task():
    labels, parts = np.array(["a", "b"] * 20), np.array(["train"] * 24 + ["test"] * 16)
    for part, n in (("train", 24), ("test", 16)):
        index = binary_task(labels, parts, part, "a", 100)
        assert len(index) == n
        assert set(parts[index]) == {part}


def probe_set(counts):
    made = rows(counts)
    return ProbeSet("n", torch.zeros(0, 1), torch.zeros(0, dtype=torch.long),
                    np.array([label for _, label, _ in made]),
                    np.array([part for part, _, _ in made]), ())


def test_a_class_with_too_few_texts_is_left_out_with_its_reason():
    tasks, left_out = probe_tasks(probe_set({"a": (9, 5), "b": (9, 5), "c": (9, 1)}), Sizes())
    assert list(tasks) == ["a", "b"]
    assert left_out == {"n, class c": "its task would have 18 training and 2 test texts; "
                                      f"{LEAST_TEXTS} of each are needed"}
    assert sizes_of(tasks)["a"] == {"train": 18, "test": 10}


def test_a_set_without_any_task_is_left_out_as_a_whole():
    tasks, left_out = probe_tasks(probe_set({"a": (9, 0), "b": (9, 0)}), Sizes())
    assert tasks == {}
    assert left_out == {"n": "no class has the texts for a task"}


# -- Texts -----------------------------------------------------------------------------------------


def test_pooling_is_a_mean_over_each_texts_tokens():
    texts = ProbeSet("n", torch.tensor([[1.0], [3.0], [10.0]]).half(), torch.tensor([0, 0, 2]),
                     np.array(["a", "b", "c"]), np.array(["train"] * 3), ())
    assert texts.pooled(add_rows_, 1).ravel().tolist() == [2, 0, 10]
    assert texts.pooled(add_rows_, 1, chunk=1).ravel().tolist() == [2, 0, 10]


def test_pooled_features_are_those_of_the_exported_sae_in_raw_units(generator):
    x = torch.randn(20, 32, generator=generator).half()
    owner = torch.tensor([0, 1]).repeat(10)
    sae = random_sae()
    texts = ProbeSet("n", x, owner, np.array(["a", "b"]), np.array(["train"] * 2), ())
    pooled = pooled_for(sae, texts)
    f = sae.encode(x.float())
    expected = torch.stack([f[::2].mean(0), f[1::2].mean(0)])
    torch.testing.assert_close(torch.from_numpy(pooled.features_OF), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(pooled.residuals_OD),
                               torch.stack([x[::2].float().mean(0), x[1::2].float().mean(0)]))


def test_a_texts_residuals_are_those_it_has_alone_without_separator_padding_and_sinks(tmp_path):
    """Cut to the context length, whatever other texts are in the batch."""
    substrate = tiny_substrate(tmp_path)
    texts = ["one", "a b c d e", " ".join(f"w{i}" for i in range(40)), "", "x y"]
    kept = text_residuals(substrate, texts, "n")
    lengths = [1, 5, substrate.sizes.context_length - 1, 0, 2]
    assert torch.bincount(kept["owner"], minlength=5).tolist() == lengths
    for i, text in enumerate(texts):
        if lengths[i]:
            ids = substrate.lm.tokenize([text])[0][: lengths[i]]
            x = substrate.lm.residual(torch.tensor([[0, *ids]]))[0, 1:]
            torch.testing.assert_close(kept["acts"][kept["owner"] == i].float(), x, atol=1e-2,
                                       rtol=2e-3)
    norms = kept["acts"].float().norm(dim=1).sort().values
    substrate.sink_norm = float(norms[9:11].mean())  # the tokens that are longer are sinks now
    assert len(text_residuals(substrate, texts, "n")["acts"]) == 10


def test_as_many_texts_of_a_class_are_used_as_saebench_uses(tmp_path):
    """Half of 4,000 and of 1,000 a task, where the data allow: here of 700 no fewer are taken."""
    substrate = tiny_substrate(tmp_path, probes={"n": rows({"a": (700, 30), "b": (2100, 510)})})
    assert (substrate.sizes.probe_train, substrate.sizes.probe_test) == (4000, 1000)
    (texts,) = probe_sets(substrate)
    counts = {(label, part): int(((texts.labels == label) & (texts.parts == part)).sum())
              for label in "ab" for part in ("train", "test")}
    assert counts == {("a", "train"): 700, ("a", "test"): 30, ("b", "train"): 2000,
                      ("b", "test"): 500}
    tasks, _ = probe_tasks(texts, substrate.sizes)
    assert sizes_of(tasks)["a"] == {"train": 1400, "test": 60}


# -- Accuracies ------------------------------------------------------------------------------------


def test_probes_find_a_planted_feature_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2 == 0
    x = rng.normal(size=(400, 30)).astype(np.float32)
    noise = probe_accuracy((x[:300], y[:300]), (x[300:], y[300:]), 5)
    x[:, 17] += 6 * y
    assert probe_accuracy((x[:300], y[:300]), (x[300:], y[300:]), 1) > 0.97
    assert 0.3 < noise < 0.7


def test_probes_never_choose_features_by_the_test_texts():
    y = np.arange(40) % 2 == 0
    train, test = np.zeros((40, 2), np.float32), np.zeros((40, 2), np.float32)
    train[:, 0] = y
    test[:, 1] = y
    assert probe_accuracy((train, y), (test, y), 1) == 0.5


@pytest.mark.parametrize("k", [1, 3, None])
def test_a_probe_is_plain_logistic_regression_on_the_columns_of_largest_difference(k):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 8)).astype(np.float32), rng.random(200) < 0.5
    x += np.outer(y, np.linspace(-1, 1, 8)).astype(np.float32)
    train, test = (x[:120], y[:120]), (x[120:], y[120:])
    gaps = [abs(train[0][train[1], d].mean() - train[0][~train[1], d].mean()) for d in range(8)]
    columns = sorted(range(8), key=lambda d: -gaps[d])[:k]
    plain = LogisticRegression(C=1.0, max_iter=1000).fit(train[0][:, columns], train[1])
    right = [plain.predict(row[columns][None])[0] == label for row, label in zip(*test)]
    assert probe_accuracy(train, test, k) == pytest.approx(np.mean(right))


def tuned_by_hand(train, test, k):
    """The reference probe step by step."""
    (x, y), (x_test, y_test) = train, test
    mean, scale = x.mean(0), x.std(0)
    x, x_test = (x - mean) / scale, (x_test - mean) / scale
    columns = np.argsort(-np.abs(x[y].mean(0) - x[~y].mean(0)))[:k]
    x, x_test = x[:, columns], x_test[:, columns]
    fold = np.zeros(len(y), dtype=int)
    for label in (True, False):  # each fold has a third of each class
        for number, part in enumerate(np.array_split(np.flatnonzero(y == label), 3)):
            fold[part] = number
    scores = {}
    for strength in STRENGTHS:
        probe = LogisticRegression(C=strength, max_iter=1000)
        scores[strength] = np.mean([probe.fit(x[fold != f], y[fold != f]).score(
            x[fold == f], y[fold == f]) for f in range(3)])
    best = max(STRENGTHS, key=lambda strength: scores[strength])  # the first of equals
    return LogisticRegression(C=best, max_iter=1000).fit(x, y).score(x_test, y_test), best


@pytest.mark.parametrize("k", [1, 3, None])
def test_a_reference_probe_is_standardised_and_tuned_on_the_training_part(k):
    """Columns of very different size: the largest tells nothing."""
    rng, chosen = np.random.default_rng(2), set()
    for size in (60, 240):
        x, y = rng.normal(size=(2 * size, 30)).astype(np.float32), rng.random(2 * size) < 0.5
        x += np.outer(y, np.linspace(0, 1, 30)).astype(np.float32)
        x *= np.geomspace(1e4, 1e-3, 30).astype(np.float32)
        train, test = (x[:size], y[:size]), (x[size:], y[size:])
        expected, best = tuned_by_hand(train, test, k)
        chosen.add(best)
        assert probe_accuracy(train, test, k, tuned=True) == pytest.approx(expected)
    assert chosen - {1.0}, "the case must need another strength than the usual one"


def test_a_reference_probe_is_not_misled_by_the_scale_of_a_column():
    rng = np.random.default_rng(0)
    y = np.arange(600) % 2 == 0
    x = rng.normal(size=(600, 20)).astype(np.float32)
    x[:, 7] = 1e-3 * (x[:, 7] + 4 * y)
    x[:, 3] *= 1e4
    train, test = (x[:400], y[:400]), (x[400:], y[400:])
    assert probe_accuracy(train, test, 1, tuned=True) > 0.95
    assert probe_accuracy(train, test, 1) < 0.65


def test_a_reference_probe_does_not_overfit_where_many_columns_tell_little():
    """0.15 deviations in each of 200 columns, from 400 texts: a strong penalty is best."""
    rng = np.random.default_rng(0)
    y = np.arange(2400) % 2 == 0
    x = (rng.normal(size=(2400, 200)) + 0.15 * y[:, None]).astype(np.float32)
    train, test = (x[:400], y[:400]), (x[400:], y[400:])
    assert probe_accuracy(train, test, None, tuned=True) > probe_accuracy(train, test, None) + 0.03


def test_a_reference_probe_of_the_fewest_texts_is_tuned_on_as_many_folds_as_they_allow():
    x = np.array([[0.0], [0.1], [1.0], [1.1]], np.float32)
    y = np.array([False, False, True, True])
    assert probe_accuracy((x, y), (x, y), None, tuned=True) == 1.0


def test_a_data_sets_accuracy_is_the_mean_over_its_classes_one_against_the_rest():
    """Feature 0 tells class a, feature 1 class b; c is what fires neither. By one feature a and b
    are always told, c as far as the chosen one of the two goes: three quarters."""
    labels = np.array(["a", "b", "c", "c"] * 12)
    parts = np.array(["train"] * 24 + ["test"] * 24)
    features = np.stack([labels == "a", labels == "b"], axis=1).astype(np.float32) * 9
    texts = ProbeSet("n", torch.zeros(0, 2), torch.zeros(0), labels, parts, ())
    tasks, _ = probe_tasks(texts, Sizes())
    assert {label: task["train"] for label, task in sizes_of(tasks).items()} == {
        "a": 12, "b": 12, "c": 24}
    table = probe_table(features, texts, tasks)
    assert table["top_1_test_accuracy"] == pytest.approx((1 + 1 + 0.75) / 3)
    assert table["top_2_test_accuracy"] == table["test_accuracy"] == 1.0


# -- The evaluation --------------------------------------------------------------------------------


def test_accuracies_are_means_over_data_sets_and_name_the_texts_that_were_used(tmp_path):
    results = evaluated(tmp_path, {"one": rows({"a": (12, 6), "b": (20, 8)}),
                                   "two": rows({"c": (8, 4), "d": (8, 4), "e": (8, 4)})})
    assert [row["dataset_name"] for row in results["details"]] == ["one_results", "two_results"]
    for name in NAMES:
        assert results[name] == pytest.approx(np.mean([row[name] for row in results["details"]]))
    assert results["details"][0]["texts"] == {"a": {"train": 24, "test": 12},
                                              "b": {"train": 24, "test": 12}}
    assert results["details"][1]["texts"]["d"] == {"train": 16, "test": 8}
    assert results["skipped"] == {}


@pytest.mark.parametrize("order", [("odd", "sound"), ("sound", "odd")])
def test_a_set_without_texts_is_named_and_makes_no_other_number_null(tmp_path, order):
    """Whether it comes first or last."""
    sets = {"odd": rows({"a": (9, 0), "b": (9, 0)}), "sound": rows({"c": (12, 6), "d": (12, 6)})}
    alone = evaluated(tmp_path / "alone", {"sound": sets["sound"]})
    results = evaluated(tmp_path / "both", {name: sets[name] for name in order})
    assert results["skipped"] == {"odd": "no class has the texts for a task"}
    assert [row["dataset_name"] for row in results["details"]] == ["sound_results"]
    assert {name: results[name] for name in NAMES} == {name: alone[name] for name in NAMES}
    assert None not in {results[name] for name in NAMES}


def test_a_class_without_texts_is_named_and_makes_no_other_number_null(tmp_path):
    results = evaluated(tmp_path, {"n": rows({"a": (12, 6), "b": (12, 6), "c": (12, 1)})})
    assert list(results["details"][0]["texts"]) == ["a", "b"]
    assert list(results["skipped"]) == ["n, class c"]
    assert None not in {results[name] for name in NAMES}


def test_without_any_set_every_accuracy_is_undefined(tmp_path):
    results = evaluated(tmp_path, {})
    assert results == {**dict.fromkeys(NAMES), "details": [], "skipped": {}}


def test_the_residual_streams_own_probes_are_made_once_for_all_saes(tmp_path, monkeypatch):
    made = []

    plain = probing.probe_accuracy

    def counted(train, test, k, tuned):
        made.append(tuned)
        return plain(train, test, k, tuned)

    monkeypatch.setattr(probing, "probe_accuracy", counted)
    probes = {"n": rows({"a": (12, 6), "b": (12, 6)})}
    a_table = 2 * (len(K_VALUES) + 1)  # two classes
    first = evaluated(tmp_path, probes)
    assert (made.count(True), made.count(False)) == (a_table, a_table)
    assert evaluated(tmp_path, probes) == first
    assert (made.count(True), made.count(False)) == (a_table, 2 * a_table)
