"""Targeted probe perturbation and spurious correlation removal against plain computations, cases
worked by hand and data in which the truth is planted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab.evaluations import separation
from lab.evaluations.probing import ProbeSet, pooled_for, probe_tasks
from lab.evaluations.separation import (
    N_VALUES,
    Probe,
    accuracies,
    correlated_tasks,
    evaluate_separation,
    train_probe,
    trained_probes,
)
from lab.sparse import ExportedSAE
from lab.storage import Cache, randomness
from lab.substrates.texts import Sizes

CLASSES = ("a", "b", "c", "d")
APART = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]  # concepts that make up a class
SHARED = [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0]]  # every one is two classes'
WIDTH, TOKENS = 32, 5
SIZE = 6.0  # of a class's direction: probes start near zero and take steps of 0.001
TOTAL, INTENDED, UNINTENDED = (f"tpp_threshold_{{}}_{kind}" for kind in separation.TPP_KINDS)
CONTRAST = "tpp_contrast_threshold_{}_total_metric"
NOTHING = np.zeros(WIDTH)  # the level of features that are set to zero


def substrate_in(folder):
    """What the evaluation needs of one: sizes and a cache."""
    cache = Cache(folder)
    return SimpleNamespace(sizes=Sizes(probe_train=500, probe_test=160),
                           cached=lambda name, build, *causes: cache.get(name, causes, build))


@pytest.fixture(scope="module")
def substrate(tmp_path_factory):
    """One for all tests, so that the probes of a planted set are trained once."""
    return substrate_in(tmp_path_factory.mktemp("cache"))


def probing_set(x_OTD, labels, parts, attributes=None, name="planted"):
    """Texts of equally many tokens."""
    owner = torch.arange(len(x_OTD)).repeat_interleave(x_OTD.shape[1])
    return ProbeSet(name, x_OTD.flatten(0, 1), owner, np.array(labels), np.array(parts),
                    (name, x_OTD.sum().item()), attributes)


def one_token_texts(rows, repeats, attributes=None):
    """The rows (class, residual) as training texts and again as test texts."""
    labels = [label for label, _ in rows] * repeats * 2
    x = torch.tensor([residual for _, residual in rows] * repeats * 2, dtype=torch.float32)
    parts = ["train"] * (len(labels) // 2) + ["test"] * (len(labels) // 2)
    return probing_set(x[:, None], labels, parts,
                       attributes and np.array(attributes * repeats * 2))


def orthonormal(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0][:n]


def planted_set(classes=CLASSES, concepts=APART, train=250, test=80, seed=1):
    """Each token is the sum of its class's concepts, which are orthonormal directions, of noise
    and, as in language models, of a large part that is the same in all."""
    generator = torch.Generator().manual_seed(seed)
    labels = np.repeat(classes, train + test)
    parts = np.tile(np.repeat(["train", "test"], (train, test)), len(classes))
    place = torch.arange(len(classes)).repeat_interleave(train + test)
    size = SIZE * (1 + torch.rand(len(labels), TOKENS, 1, generator=generator))
    own = orthonormal(WIDTH)
    x = size * (torch.tensor(concepts).float() @ own[:4])[place][:, None] + 2 * SIZE * own[-1]
    return probing_set(x + torch.randn(len(labels), TOKENS, WIDTH, generator=generator), labels,
                       parts)


def sae_of(direction_FD, b_enc=-1.0):
    """Features that read and write along the same directions."""
    direction_FD = torch.nn.functional.normalize(direction_FD, dim=1)
    return ExportedSAE(direction_FD.T.contiguous(), torch.full((len(direction_FD),), b_enc),
                       direction_FD, torch.zeros(WIDTH))


def random_sae(d_in=WIDTH, d_sae=96, seed=2):
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    W_enc = W.T + 0.1 * torch.randn(d_in, d_sae, generator=generator)
    return ExportedSAE(W_enc, 0.1 * torch.randn(d_sae, generator=generator), W,
                       torch.randn(d_in, generator=generator))


def identity_sae(signed=False, width=4):
    """A feature for the positive part of each coordinate, or also one for the negative part."""
    W = torch.cat([torch.eye(width), -torch.eye(width)]) if signed else torch.eye(width)
    return ExportedSAE(W.T.contiguous(), torch.zeros(len(W)), W, torch.zeros(width))


def given_probes(monkeypatch, **probes):
    made = {name: Probe(np.array(weight, dtype=np.float32), bias)
            for name, (weight, bias) in probes.items()}
    monkeypatch.setattr(separation, "trained_probes", lambda *_: made)


def ablated_residuals(sae, texts, chosen, level=0.0):
    """Pooled residuals [O, D] after the chosen features are set to a level token by token."""
    x = texts.acts_ND.double()
    f = torch.relu((x - sae.b_dec) @ sae.W_enc.double() + sae.b_enc)
    error = x - (f @ sae.W_dec.double() + sae.b_dec)
    f[:, chosen] = level
    changed = f @ sae.W_dec.double() + sae.b_dec + error
    return torch.stack([changed[texts.owner_N == i].mean(0) for i in range(len(texts.labels))])


def plain_accuracy(x_OD, labels, probe, index, label):
    logit = x_OD[index] @ torch.tensor(probe.weight_D).double() + probe.bias
    return float(((logit > 0).numpy() == (labels[index] == label)).mean())


def plain_perturbation(sae, texts, tasks, probes, n, contrast=False):
    """Total, intended and unintended at n, as SAEBench describes them, token by token."""
    x = texts.acts_ND.double()
    f = torch.relu((x - sae.b_dec) @ sae.W_enc.double() + sae.b_enc)
    pooled = torch.stack([f[texts.owner_N == i].mean(0) for i in range(len(texts.labels))])
    intended, unintended = [], []
    for label, task in tasks.items():
        inside = torch.tensor(texts.labels[task["train"]] == label)
        train = pooled[task["train"]]
        gap = (train[inside].mean(0) - train[~inside].mean(0)).clamp(min=0)
        effect = gap * (sae.W_dec.double() @ torch.tensor(probes[label].weight_D).double())
        best = effect.argsort(descending=True)[:n]
        level = train[~inside].mean(0) * contrast
        before, after = (ablated_residuals(sae, texts, chosen, level[chosen])
                         for chosen in (best[:0], best[effect[best] > 0]))
        lost = {other: plain_accuracy(before, texts.labels, probes[other], its["test"], other)
                - plain_accuracy(after, texts.labels, probes[other], its["test"], other)
                for other, its in tasks.items()}
        intended.append(lost.pop(label))
        unintended.append(np.mean(list(lost.values())))
    return np.mean(intended) - np.mean(unintended), np.mean(intended), np.mean(unintended)


def test_numbers_are_those_of_residuals_ablated_token_by_token(substrate):
    sae, texts = random_sae(), planted_set()
    result = evaluate_separation(sae, substrate, [texts])
    tasks = probe_tasks(texts, substrate.sizes)[0]
    probes = trained_probes(substrate, pooled_for(sae, texts), tasks)
    assert len({result[TOTAL.format(n)] for n in (2, 5, 10, 20)}) == 4  # there is something to see
    for n in (2, 5, 20, 500):
        expected = plain_perturbation(sae, texts, tasks, probes, n)
        for key, value in zip((TOTAL, INTENDED, UNINTENDED), expected):
            assert result[key.format(n)] == pytest.approx(value, abs=1e-9)
        contrast = plain_perturbation(sae, texts, tasks, probes, n, contrast=True)[0]
        assert result[CONTRAST.format(n)] == pytest.approx(contrast, abs=1e-9)


def test_ablation_keeps_the_error_of_the_sae(substrate):
    """What the SAE does not reconstruct still tells the classes apart."""
    sae = sae_of(orthonormal(8)[4:])  # no feature of any class
    result = evaluate_separation(sae, substrate, [planted_set()])
    assert abs(result[INTENDED.format(500)]) < 0.01


def shared_world():
    """Texts of one token [shared, a, b, c]: the shared feature fires on a and b."""
    return one_token_texts([("a", [1, 1, 0, 0]), ("a", [1, 1, 0, 0]), ("b", [1, 0, 1, 0]),
                            ("b", [1, 0, 1, 0]), ("c", [0, 0, 0, 1]), ("c", [0, 0, 0, 1])], 4)


def test_a_shared_feature_is_unintended_by_hand(substrate, monkeypatch):
    """The probes of a and b need the shared feature, that of c does not. Ablating a's features
    takes 0.5 of accuracy from a and from b, so 0.25 of the two others; b's likewise; c's takes 0.5
    from c alone."""
    given_probes(monkeypatch, a=([1, 0.4, 0, 0], -1.2), b=([1, 0, 0.4, 0], -1.2),
                 c=([0, 0, 0, 1], -0.5))
    result = evaluate_separation(identity_sae(), substrate, [shared_world()])
    for n in N_VALUES:
        assert result[INTENDED.format(n)] == pytest.approx(0.5)
        assert result[UNINTENDED.format(n)] == pytest.approx((0.25 + 0.25 + 0) / 3)
        assert result[TOTAL.format(n)] == pytest.approx(0.5 - 0.5 / 3)


def test_accuracy_that_another_probe_gains_counts_as_negative_by_hand(substrate, monkeypatch):
    """c's probe takes the shared feature for its own and errs on a and b. Ablating that feature
    mends it by 0.5: for a and b, the mean of the others' losses is (0.5 − 0.5) / 2."""
    given_probes(monkeypatch, a=([1, 0.4, 0, 0], -1.2), b=([1, 0, 0.4, 0], -1.2),
                 c=([1, 0, 0, 1], -0.9))
    result = evaluate_separation(identity_sae(), substrate, [shared_world()])
    # c has one feature with a positive effect, its own; without it, it is right on nothing
    assert result[UNINTENDED.format(2)] == pytest.approx(0)
    assert result[INTENDED.format(2)] == pytest.approx(0.5)


def test_only_features_that_push_the_probe_towards_the_class_are_ablated(substrate, monkeypatch):
    """Feature 0 fires on class a alone, but its direction pushes a's probe away from the class;
    feature 3 has the same direction as the probe, but fires on the others."""
    texts = one_token_texts([("a", [1, 1, 0, 0]), ("b", [0, 0, 1, 1]), ("c", [0, 0, 1, 1])], 8)
    given_probes(monkeypatch, a=([-0.1, 0, -1, 0.5], 0.2), b=([0, 0, 0, 0], 0.1),
                 c=([0, 0, 0, 0], 0.1))
    pooled = pooled_for(identity_sae(), texts)
    seen = []
    monkeypatch.setattr(separation, "accuracies", lambda *given: seen.append(given[3].tolist())
                        or np.zeros(1 + len(N_VALUES)))
    evaluate_separation(pooled.sae, substrate, [pooled])
    assert seen == [[]] * 3 * 3 * 2


def test_features_are_zeroed_in_the_order_of_their_effects():
    """The positive text has the logit 1 + 0.4 + 0.6 − 1.1. It stays right without the 0.4, but not
    without 1 and 0.4, nor without 0.4 and 0.6."""
    texts = one_token_texts([("a", [1, 0.4, 0.6, 0]), ("b", [0, 0, 0, 0.5])], 1)
    pooled, index = pooled_for(identity_sae(), texts), np.array([0, 1])
    probe = Probe(np.array([1, 1, 1, 1], dtype=np.float32), -1.1)
    for ranked, expected in (([0, 1, 2], [1.0, 0.5, 0.5]), ([1, 3, 2], [1.0, 1.0, 0.5])):
        before_two_five = accuracies(pooled, probe, index, np.array(ranked), NOTHING)[:3]
        assert before_two_five.tolist() == expected


def test_accuracy_stays_where_no_feature_is_ablated():
    pooled = pooled_for(identity_sae(), shared_world())
    probe = Probe(np.array([1, 0, 0, 0], dtype=np.float32), -0.5)
    found = accuracies(pooled, probe, np.array([0, 1, 4, 5]), np.array([], dtype=int), NOTHING)
    assert found.tolist() == [1.0] * (1 + len(N_VALUES))


def test_features_of_their_own_separate_classes(substrate):
    result = evaluate_separation(sae_of(orthonormal(4)), substrate, [planted_set()])
    assert result[TOTAL.format(2)] > 0.4
    assert abs(result[UNINTENDED.format(2)]) < 0.02
    assert result[CONTRAST.format(2)] > 0.4


def test_features_that_classes_share_are_unintended(substrate):
    texts = planted_set(concepts=SHARED)._replace(name="shared")
    result = evaluate_separation(sae_of(orthonormal(3)), substrate, [texts])
    assert result[UNINTENDED.format(2)] > 0.12
    assert 0 < result[TOTAL.format(2)] < 0.2


@pytest.mark.parametrize("n", N_VALUES)
def test_features_that_fire_on_everything_alike_score_nothing(substrate, n):
    """Nearly always on, along directions in which the classes do not differ."""
    sae = sae_of(orthonormal(WIDTH)[4:], b_enc=1.0)
    result = evaluate_separation(sae, substrate, [planted_set()])
    assert abs(result[TOTAL.format(n)]) < 0.02
    assert abs(result[INTENDED.format(n)]) < 0.02


@pytest.mark.parametrize("n", N_VALUES)
def test_by_contrast_features_that_fire_on_everything_score_nothing_however_strong(substrate, n):
    """Set to zero, they shift the probes that their directions happen to touch."""
    sae = sae_of(orthonormal(WIDTH)[4:], b_enc=20.0)
    result = evaluate_separation(sae, substrate, [planted_set()])
    assert abs(result[CONTRAST.format(n)]) < 0.02
    assert result[TOTAL.format(n)] > 0.1


def test_features_that_are_constant_score_nothing(substrate):
    always = sae_of(orthonormal(WIDTH), b_enc=20.0)
    constant = ExportedSAE(0 * always.W_enc, always.b_enc, always.W_dec, always.b_dec)
    result = evaluate_separation(constant, substrate, [planted_set()])
    assert result[INTENDED.format(500)] == result[UNINTENDED.format(500)] == 0


def test_labels_that_mean_nothing_score_nothing(substrate, generator):
    texts = planted_set()
    shuffled = texts.labels.copy()
    for part in ("train", "test"):
        inside = np.flatnonzero(texts.parts == part)
        order = torch.randperm(len(inside), generator=generator).numpy()
        shuffled[inside] = texts.labels[inside[order]]
    result = evaluate_separation(sae_of(orthonormal(4)), substrate,
                                 [texts._replace(labels=shuffled, name="null")])
    assert abs(result[TOTAL.format(2)]) < 0.06


def test_probes_are_trained_once_for_all_saes(tmp_path, monkeypatch):
    substrate, calls, train = substrate_in(tmp_path / "cache"), [], separation.train_probe
    monkeypatch.setattr(separation, "train_probe",
                        lambda *given: calls.append(given[2]) or train(*given))
    first = evaluate_separation(sae_of(orthonormal(4)), substrate, [planted_set()])
    second = evaluate_separation(random_sae(), substrate, [planted_set()])
    assert calls == list(CLASSES)
    assert first != second
    evaluate_separation(random_sae(), substrate, [planted_set(seed=2)])  # other residuals
    assert calls == list(CLASSES) * 2


def test_no_test_text_has_a_part_in_probes_or_in_the_choice_of_features(substrate):
    sae, texts = sae_of(orthonormal(4)), planted_set()
    other = texts.acts_ND.clone()
    inside = torch.tensor(texts.parts == "test")[texts.owner_N]
    other[inside] = -other[inside]
    tasks = probe_tasks(texts, substrate.sizes)[0]
    both = [pooled_for(sae, texts._replace(acts_ND=acts, causes=(i,)))
            for i, acts in enumerate((texts.acts_ND, other))]
    ours, theirs = (trained_probes(substrate, pooled, tasks) for pooled in both)
    for label in tasks:
        assert np.array_equal(ours[label].weight_D, theirs[label].weight_D)
        assert np.array_equal(*(separation.class_means(pooled, tasks[label]) for pooled in both))


def test_a_probe_is_right_on_classes_that_differ_and_the_same_each_time(generator):
    x, y = torch.randn(400, WIDTH, generator=generator), torch.arange(400) < 200
    x[:, 0] += SIZE * (2 * y - 1)
    weights = train_probe(x, "cause")
    assert torch.equal((x @ weights[:-1] + weights[-1]) > 0, y)
    assert torch.equal(weights, train_probe(x, "cause"))
    assert not torch.equal(weights, train_probe(x, "another"))


def test_probes_are_trained_as_saebench_does_written_out(generator):
    """20 epochs of batches of 16: cross-entropy and 0.001 · ‖weight‖₁ by Adam at 0.001 with
    decoupled weight decay of 0.01."""
    x = torch.randn(40, 6, generator=generator)
    y = np.repeat([1.0, 0.0], 20)
    draws = randomness("separation", "written out")
    w = torch.cat([torch.empty(n).uniform_(-(6**-0.5), 6**-0.5, generator=draws)
                   for n in (6, 1)]).double().numpy()
    first, second, step, rows = np.zeros(7), np.zeros(7), 0, np.c_[x.double().numpy(), np.ones(40)]
    for _ in range(20):
        order = torch.randperm(40, generator=draws).numpy()
        for batch in np.split(order, [16, 32]):
            wrong = 1 / (1 + np.exp(-rows[batch] @ w)) - y[batch]
            gradient = rows[batch].T @ wrong / len(batch) + 1e-3 * np.r_[np.sign(w[:-1]), 0]
            step += 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            size = np.sqrt(second / (1 - 0.999**step)) + 1e-8
            w = w - 1e-3 * 0.01 * w - 1e-3 * first / (1 - 0.9**step) / size
    np.testing.assert_allclose(train_probe(x, "written out").numpy(), w, atol=2e-5)


def test_a_set_of_two_classes_is_left_out_by_name_and_does_not_touch_the_others(substrate):
    sae, good = sae_of(orthonormal(4)), planted_set()
    two = planted_set(CLASSES[:2])._replace(name="ratings")
    result = evaluate_separation(sae, substrate, [good, two])
    assert result["skipped"] == {"ratings": "2 classes with a task; TPP needs 3"}
    assert [row["dataset_name"] for row in result["details"]] == ["planted_tpp_results"]
    alone = evaluate_separation(sae, substrate, [good])
    assert result[TOTAL.format(10)] == alone[TOTAL.format(10)]


def test_without_any_set_the_numbers_are_undefined(substrate):
    result = evaluate_separation(random_sae(), substrate, [])
    assert set(separation.tpp_names()) <= set(result)
    assert all(result[name] is None for name in separation.tpp_names())


def test_numbers_are_means_over_sets(substrate):
    sets = [planted_set(seed=seed)._replace(name=f"set {seed}") for seed in (1, 2)]
    result = evaluate_separation(random_sae(), substrate, sets)
    for name in separation.tpp_names():
        values = [row[name] for row in result["details"]]
        assert result[name] == pytest.approx(np.mean(values))


def test_pooled_features_of_another_sae_are_refused(substrate):
    pooled = pooled_for(random_sae(), planted_set())
    with pytest.raises(ValueError, match="planted has the features of another SAE"):
        evaluate_separation(random_sae(seed=3), substrate, [pooled])


def test_a_run_pools_texts_once_an_sae_and_reports_separation(job, monkeypatch, tmp_path):
    widths, pooled = [], ProbeSet.pooled
    monkeypatch.setattr(ProbeSet, "pooled", lambda texts, add_, width:
                        widths.append(width) or pooled(texts, add_, width))
    assert job() == 0
    info = json.loads((tmp_path / "run_1" / "final_info.json").read_text())
    assert widths.count(info["dict_size"]) == len(info["seeds"]) == 2
    names = [name for name in separation.tpp_names() if "contrast" not in name]
    assert info["eval_result_metrics"]["tpp_metrics"] == {name: info["means"][name]
                                                          for name in names}
    assert all(part["details"][0]["dataset_name"] == "fancyzhx/ag_news_tpp_results"
               for part in info["separation"]["per_seed"])


# Spurious correlation removal


def quadrant_rows():
    """Class and attribute as the signs of two coordinates."""
    return ([("a", [1, 1, 0, 0]), ("a", [1, -1, 0, 0]), ("b", [-1, 1, 0, 0]),
             ("b", [-1, -1, 0, 0])], ["f", "m", "f", "m"])


def scr(result, kind, n=2):
    return result[f"scr_{kind}_threshold_{n}"]


def test_removal_of_the_attribute_mends_a_biased_probe_by_hand(substrate, monkeypatch):
    """The biased probe 1·class + 2·attribute follows the attribute: it is right on half of the
    class's texts. Without the attribute's two features it is right on all: (1 − 0.5) / (1 − 0.5).
    On the attribute it lacks nothing."""
    rows, attributes = quadrant_rows()
    given_probes(monkeypatch, biased=([1, 2, 0, 0], 0), attribute=([0, 1, 0, 0], 0),
                 **{"class": ([1, 0, 0, 0], 0)})
    result = evaluate_separation(identity_sae(signed=True), substrate,
                                 [one_token_texts(rows, 8, attributes)])
    for n in N_VALUES:
        assert scr(result, "metric", n) == scr(result, "dir1", n) == pytest.approx(1)
        assert scr(result, "dir2", n) == 0
    assert [row["dataset_name"] for row in result["details"]] == ["planted_scr_a_b_results"]


def test_the_metric_is_of_the_direction_in_which_the_biased_probe_was_worse(substrate, monkeypatch):
    rows, attributes = quadrant_rows()
    given_probes(monkeypatch, biased=([2, 1, 0, 0], 0), attribute=([0, 1, 0, 0], 0),
                 **{"class": ([1, 0, 0, 0], 0)})
    result = evaluate_separation(identity_sae(signed=True), substrate,
                                 [one_token_texts(rows, 8, attributes)])
    assert scr(result, "metric") == scr(result, "dir2") == pytest.approx(1)
    assert scr(result, "dir1") == 0


def test_a_biased_probe_that_removal_makes_worse_scores_below_zero(substrate, monkeypatch):
    """1·class + 0.4·attribute − 0.8 is right on three of four quadrants of the class: only 1 − 0.4
    falls short. The features of an attribute that is read off the class in part take the class with
    them, and everything is called negative: (0.5 − 0.75) / (1 − 0.75)."""
    rows, attributes = quadrant_rows()
    given_probes(monkeypatch, biased=([1, 0.4, 0, 0], -0.8), attribute=([0, 1, 0, 0], 0),
                 **{"class": ([1, 0, 0, 0], 0)})
    mixing = ExportedSAE(identity_sae(signed=True).W_enc, torch.zeros(8),
                         torch.tensor([[0.0, 0, 0, 1]] + [[1.0, 1, 0, 0]] + [[0.0, 0, 0, 1]] * 6),
                         torch.zeros(4))
    result = evaluate_separation(mixing, substrate, [one_token_texts(rows, 8, attributes)])
    assert scr(result, "dir1") == pytest.approx(-1)


def attributed_set(seed=3):
    """Class along one direction, a stronger attribute along another, independent of each other."""
    generator = torch.Generator().manual_seed(seed)
    label, attribute = np.tile(["a", "a", "b", "b"], 330), np.tile(["f", "m", "f", "m"], 330)
    parts = np.repeat(["train", "test"], (1000, 320))
    kind, sex = (torch.tensor(np.where(part == one, SIZE, -SIZE)).float()
                 for part, one in ((label, "a"), (attribute, "f")))
    own = orthonormal(2)
    x = 0.5 * kind[:, None] * own[0] + sex[:, None] * own[1]
    noise = torch.randn(len(label), TOKENS, WIDTH, generator=generator)
    return probing_set(x[:, None] + noise, label, parts, attribute)


def test_features_of_an_attribute_alone_remove_a_spurious_correlation(substrate):
    own = orthonormal(2)
    sae = sae_of(torch.cat([own, -own]), b_enc=0.0)
    result = evaluate_separation(sae, substrate, [attributed_set()])
    assert scr(result, "dir1") > 0.7


def test_features_that_mix_class_and_attribute_cannot_remove_it(substrate):
    own = orthonormal(2)
    mixed = torch.stack([own[0] + own[1], own[0] - own[1]])
    sae = sae_of(torch.cat([mixed, -mixed]), b_enc=0.0)
    result = evaluate_separation(sae, substrate, [attributed_set()])
    assert scr(result, "dir1", 5) < 0.3


@pytest.mark.parametrize(("asked", "train", "test"), [(4000, 500, 160), (100, 100, 100)])
def test_tasks_of_a_pair_are_of_equal_size_and_balanced_but_for_the_bias(asked, train, test):
    """There are 250 and 80 texts a quadrant; the biased task needs its two twice."""
    texts, sizes = attributed_set(), Sizes(probe_train=asked, probe_test=asked)
    tasks = correlated_tasks(pooled_for(random_sae(), texts), sizes)["a_b"]
    for name, task in tasks.items():
        for part, count in (("train", train), ("test", test)):
            index = task[part]
            assert len(index) == len(set(index.tolist())) == count
            assert set(texts.parts[index]) == {part}
            positive, negative = np.split(index, 2)
            of_class, of_attribute = ({part: np.mean(values[side] == one) for part, side in
                                       (("positive", positive), ("negative", negative))}
                                      for values, one in ((texts.labels, "a"),
                                                          (texts.attributes, "f")))
            apart, even = {"positive": 1, "negative": 0}, {"positive": 0.5, "negative": 0.5}
            assert of_class == (even if name == "attribute" else apart)
            assert of_attribute == (even if name == "class" else apart)


def test_sets_without_a_second_attribute_have_no_removal(substrate):
    plain, many = attributed_set(), attributed_set()
    odd = many.attributes.copy()
    odd[0] = "unknown"
    lone = many._replace(attributes=np.where(many.labels == "a", "f", "m"))  # a quadrant is empty
    for texts in (plain._replace(attributes=None), many._replace(attributes=odd), lone):
        result = evaluate_separation(random_sae(), substrate, [texts])
        assert not [name for name in result if name.startswith("scr")]
