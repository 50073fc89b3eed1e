"""Metrics against closed forms and hand-worked cases."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import planted_activations

import experiment as ex


def identity_sae(d=8, scale=1.0):
    """Reconstructs perfectly: features are the positive and negative parts of each coordinate."""
    sae = ex.CustomSAE(d, 2 * d, ex.randomness(0))
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    with torch.no_grad():
        sae.W_dec.copy_(both)
        sae.W_enc.copy_(both.T)
    return ex.TrainedSAE(sae, scale)


def test_perfect_reconstruction_and_its_sparsity():
    z, _ = planted_activations(500, d_in=8, n_true=16)
    metrics = ex.reconstruction_metrics(identity_sae().sae, z)
    assert metrics["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert metrics["cosine"] == pytest.approx(1, abs=1e-5)
    assert metrics["l2_ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["l0"] == pytest.approx(float((z != 0).sum() / 500))
    assert metrics["l1"] == pytest.approx(float(z.abs().sum() / 500), rel=1e-5)


def test_explained_variance_on_badly_unequal_batches(generator):
    """Sums over the sample: a mean of per-batch ratios would give something else entirely."""
    z = torch.cat(
        [
            torch.randn(90, 6, generator=generator) * 10 + 3,
            torch.randn(10, 6, generator=generator) * 0.01,
        ]
    )
    sae = ex.CustomSAE(6, 12, ex.randomness(0))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)  # nothing fires: reconstruction is b_dec
        sae.b_dec.fill_(1.0)
    metrics = ex.reconstruction_metrics(sae, z, chunk=7)
    error = float((z - 1).square().sum(1).mean())
    variance = float((z - z.mean(0)).square().sum(1).mean())
    assert metrics["mse"] == pytest.approx(error, rel=1e-5)
    assert metrics["explained_variance"] == pytest.approx(1 - error / variance, rel=1e-5)
    assert metrics["l0"] == 0
    assert metrics["frac_alive"] == 0
    with torch.no_grad():
        sae.b_dec.copy_(z.mean(0))
    assert ex.reconstruction_metrics(sae, z)["explained_variance"] == pytest.approx(0, abs=1e-5)


def test_reconstruction_of_a_constant_has_no_explained_variance():
    metrics = ex.reconstruction_metrics(identity_sae().sae, torch.zeros(10, 8))
    assert metrics["explained_variance"] is None


def test_decoder_metrics_count_duplicates_across_domains():
    sae = identity_sae(4).sae
    with torch.no_grad():
        sae.W_dec[1] = sae.W_dec[0]
        sae.W_dec[3] = sae.W_dec[2]
    use = torch.ones(2, 8)
    use[:, 0], use[:, 1] = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])  # split: counts
    metrics = ex.decoder_metrics(sae, use)  # features 2 and 3 are alike but serve both: no
    assert metrics["duplicates"] == 1
    assert metrics["l_dir_floor"] == 0.5
    assert metrics["l_use"] == pytest.approx(12 / 14)  # of all activation, 12 parts serve both
    # coordinates 0 and 2 have twins; the negative half finds nothing closer than 0
    assert metrics["max_decoder_cosine"] == pytest.approx(4 / 8)


def test_select_features_by_hand():
    #                     forget                      retain
    rate = torch.tensor([[0.5, 0.4, 0.3, 0.0, 0.2], [0.02, 0.005, 0.0, 0.0, 0.0005]])
    assert ex.select_features(rate, 0.01, 10).tolist() == [1, 2, 4]
    assert ex.select_features(rate, 0.001, 1).tolist() == [2]
    assert ex.select_features(rate, 1e-9, 5).tolist() == [2]
    assert len(ex.select_features(torch.zeros(2, 5), 0.01, 5)) == 0


def test_features_come_in_the_units_of_the_exported_sae(generator):
    x = torch.randn(20, 6, generator=generator)
    trained = ex.TrainedSAE(ex.CustomSAE(6, 24, ex.randomness(1)), 2.5)
    raw = trained.sae.raw_weights(2.5)
    expected = torch.relu((x - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"])
    total = torch.zeros(2, 24)
    trained.add_features_(total, torch.tensor([0, 1]).repeat(10), x)
    torch.testing.assert_close(total, torch.stack([expected[::2].sum(0), expected[1::2].sum(0)]))


def test_matched_features_match_and_differ(generator):
    rate = torch.rand(2, 200, generator=generator)
    chosen = rate[0].topk(10).indices
    control = ex.matched_features(rate, chosen, seed=0)
    assert len(set(control.tolist())) == 10
    assert not set(control.tolist()) & set(chosen.tolist())
    assert float((rate[0][control] - rate[0][chosen]).abs().max()) < 0.3


def test_clamp_by_hand_and_leaves_the_rest_alone():
    trained = identity_sae(4, scale=2.0)
    x = torch.tensor([[2.0, -4, 0, 6], [-2, 4, 1, 1], [2, 0, 0, 0]])
    keep = torch.tensor([True, True, False])
    # feature 0 is the positive part of coordinate 0, active on rows 0 and 2; row 2 is a sink
    changed = ex.clamp(trained, torch.tensor([0]), torch.tensor([-5.0]), x, keep)
    expected = x.clone()
    expected[0, 0] = -10.0  # target × scale
    torch.testing.assert_close(changed, expected)
    assert torch.equal(changed[1:], x[1:])


def test_clamp_leaves_the_error_of_an_imperfect_sae(generator):
    sae = ex.CustomSAE(6, 24, ex.randomness(1))
    x = torch.randn(50, 6, generator=generator)
    chosen = torch.tensor([3, 7])
    trained = ex.TrainedSAE(sae, 1.5)
    f = sae.encode(x / 1.5)
    g = f.clone()
    g[:, chosen] = torch.where(f[:, chosen] > 0, torch.tensor([-0.3, -0.7]), f[:, chosen])
    with torch.no_grad():
        expected = x + (sae.decode(g) - sae.decode(f)) * 1.5
    changed = ex.clamp(trained, chosen, torch.tensor([-0.3, -0.7]), x, torch.ones(50, dtype=bool))
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=1e-5)


def test_concave_envelope_by_hand():
    grid = np.array([0.0, 0.05, 0.1, 0.2, 0.5])
    cost, gain = np.array([0.1, 0.2, 0.05, 0.3]), np.array([1.0, 1.5, 0.1, 1.2])
    # hull (0,0) (.1,1) (.2,1.5); the point (.05,.1) is below it, (.3,1.2) beyond its top
    assert ex.concave_envelope(cost, gain, grid).tolist() == pytest.approx([0, 0.5, 1, 1.5, 1.5])
    free = ex.concave_envelope(np.array([-0.01, 0.2]), np.array([0.4, 1.0]), grid)
    assert free.tolist() == pytest.approx([0.4, 0.55, 0.7, 1, 1])
    assert ex.concave_envelope(np.array([0.1]), np.array([-1.0]), grid).tolist() == [0] * 5


def test_frontier_area_by_hand():
    assert ex.frontier_area(np.array([0.3]), np.array([3.0]), 0.3) == pytest.approx(1.5)
    assert ex.frontier_area(np.array([0.15]), np.array([3.0]), 0.3) == pytest.approx(2.25, rel=1e-3)


def answers(*accuracies):
    """100 questions a setting, as many right ones as the accuracy says."""
    return np.arange(100) < 100 * np.array(accuracies)[:, None]


def test_official_score_by_hand():
    forget, retain = answers(0.2, 0.5, 0.9), answers(0.98, 0.99, 1.0)
    assert ex.official_score(forget, retain) == pytest.approx(0.5)
    assert ex.official_score(forget, answers(0.5, 0.5, 0.5)) == 0.0


def test_accuracy_area_by_hand():
    """One setting that costs 2 % and forgets half: up to 2 % a triangle, then level."""
    expected = (0.02 * 0.25 + 0.03 * 0.5) / 0.05
    assert ex.accuracy_area(answers(0.5), answers(0.98)) == pytest.approx(expected, rel=1e-3)


def test_a_rise_on_the_text_that_no_label_named_counts_as_cost():
    forget, retain = np.full((1, 4), 3.0), np.full((1, 4), 0.0)
    assert ex.unlearning_area(forget, retain) == pytest.approx(3.0)
    assert ex.unlearning_area(forget, retain, np.full((1, 2), 0.3)) == pytest.approx(1.5)
    assert ex.unlearning_area(forget, np.full((1, 4), 0.3), np.zeros((1, 2))) == pytest.approx(1.5)
    assert ex.unlearning_area(forget, retain, np.zeros((1, 0))) == pytest.approx(3.0)


def test_bootstrap_covers_the_mean_and_narrows_with_more_texts(generator):
    few, many = (np.random.default_rng(1).normal(2, 1, (1, n)) for n in (10, 1000))
    low, high = ex.bootstrap(lambda part: float(part.mean()), few)
    assert low < float(few.mean()) < high
    narrow = ex.bootstrap(lambda part: float(part.mean()), many)
    assert narrow[1] - narrow[0] < 0.3 * (high - low)


def test_mean_and_stderr_by_hand():
    means, errors = ex.mean_and_stderr([{"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}])
    assert means == {"a": 2.0, "b": None}
    assert errors == {"a": pytest.approx(1.0), "b": None}  # √2 / √2
    assert ex.mean_and_stderr([{"a": 1.0}])[1] == {"a": None}


def test_binary_task_is_balanced_over_the_other_classes():
    labels = np.array(["a"] * 6 + ["b"] * 4 + ["c"] * 2 + ["a"])
    parts = np.array(["train"] * 12 + ["test"])
    index = ex.binary_task(labels, parts, "train", "a", most=100)
    positives, negatives = labels[index] == "a", labels[index] != "a"
    assert positives.sum() == negatives.sum() == 5  # 3 of b, 2 of c are all there is
    assert sorted(labels[index][negatives]) == ["b", "b", "b", "c", "c"]
    assert len(ex.binary_task(labels, parts, "train", "a", most=4)) == 4


def test_probes_find_a_planted_feature_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2 == 0
    x = rng.normal(size=(400, 30)).astype(np.float32)
    noise = ex.probe_accuracy((x[:300], y[:300]), (x[300:], y[300:]), 5)
    x[:, 17] += 6 * y
    assert ex.probe_accuracy((x[:300], y[:300]), (x[300:], y[300:]), 1) > 0.97
    assert 0.3 < noise < 0.7


def test_probe_selection_ignores_the_test_part():
    """A feature that separates only the test texts is never chosen."""
    y = np.arange(40) % 2 == 0
    train, test = np.zeros((40, 2), np.float32), np.zeros((40, 2), np.float32)
    train[:, 0] = y
    test[:, 1] = y
    assert ex.probe_accuracy((train, y), (test, y), 1) == 0.5


def test_pooling_is_a_mean_over_each_texts_tokens():
    texts = ex.ProbeSet(
        torch.tensor([[1.0], [3.0], [10.0]]).half(),
        torch.tensor([0, 0, 2]),
        np.array(["a", "b", "c"]),
        np.array(["train"] * 3),
        (),
    )
    assert texts.pooled(ex.add_rows_, 1).ravel().tolist() == [2, 0, 10]


def compared(gains, ours, theirs):
    """`ex.compare` of SAEs whose seeds differ by `gains`, each with the same samples."""
    names = ("x", *ex.SAMPLED)
    rows, base = ([{"seed": s, **dict.fromkeys(names, value)} for s, value in enumerate(values)]
                  for values in (gains, [0.0] * len(gains)))
    other = {"seeds": base, "unlearning": {"per_seed": [{"samples": theirs}] * len(gains)}}
    return ex.compare(rows, [ours] * len(gains), other)


def sample(rises, rights):
    return {"forget_rise": [rises], "retain_rise": [[0.3] * len(rises)], "other_rise": [],
            "forget_right": [rights], "retain_right": ["1" * len(rights)]}


def test_compare_pairs_seeds_and_gives_students_interval():
    same = sample([1.0, 1.0], "01")
    found = compared([1.0, 2.0, 3.0], same, same)["x"]
    half = 4.30265 / math.sqrt(3)  # t of two degrees of freedom, of a table
    expected = {"difference": 2.0, "stderr": 1 / math.sqrt(3), "low": 2 - half, "high": 2 + half}
    assert found == pytest.approx(expected, abs=1e-4)
    alone = compared([1.0], same, same)["x"]
    assert alone == {"difference": 1.0, "stderr": None, "low": None, "high": None}
    rows = [{"seed": 0, "x": 1.0}]
    other = {"seeds": [{"seed": 1, "x": 1.0}], "unlearning": {"per_seed": []}}
    assert ex.compare(rows, [], other) is None


def test_intervals_count_the_texts_and_questions_that_all_seeds_share():
    """Resampling what is the same everywhere changes nothing; else its known error is added."""
    rng = np.random.default_rng(0)
    rises = rng.normal(2.0, 1.0, 400).clip(0.01)
    rights = "".join(map(str, rng.integers(0, 2, 400)))
    nothing = sample([0.0] * 400, "1" * 400)
    found = compared([1.0] * 3, sample(list(rises), rights), nothing)
    assert found["x"]["low"] == found["x"]["high"] == 1.0  # no text nor question in it
    # one setting at cost 0.3: the area is half the mean rise; the score is all that is lost
    for name, error in (("unlearning_area", 0.5 * rises.std() / 20),
                        ("unlearning_area_labelled", 0.5 * rises.std() / 20),
                        ("unlearning_score", 0.5 / 20), ("accuracy_area", 0.5 / 20)):
        assert found[name]["high"] - 1 == pytest.approx(1.96 * error, rel=0.2)
        assert found[name]["stderr"] == 0  # over seeds
    more = {name: part * 2 for name, part in nothing.items()}  # settings may differ in number
    again = compared([1.0] * 3, sample(list(rises), rights), more)
    assert again["unlearning_area"] == found["unlearning_area"]
    both = compared([1.0] * 3, sample(list(rises + 1), rights), sample(list(rises), rights))
    assert both["unlearning_area"]["high"] == pytest.approx(1, abs=1e-6)  # all gain the same
    other = compared([1.0] * 3, sample(list(rises), rights), sample([0.0], "1"))
    assert other["unlearning_area"]["low"] == 1.0  # not the same texts: over seeds alone


def test_collapsed_saes_give_defined_numbers():
    sae = ex.CustomSAE(8, 64, ex.randomness(0))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    metrics = ex.decoder_metrics(sae, torch.zeros(2, 64))
    assert all(np.isfinite(value) for value in metrics.values())
    shard = {"acts": torch.randn(64, 8).half(), "domain": torch.arange(64).remainder(2).byte()}
    buffer = ex.ActivationBuffer([shard], 64)
    statistics = ex.feature_statistics(ex.TrainedSAE(sae, 1.0), buffer, 32)
    assert len(ex.select_features(statistics.rate_KF, 0.01, 10)) == 0
    assert dataclasses.astuple(identity_sae())[1] == 1.0
