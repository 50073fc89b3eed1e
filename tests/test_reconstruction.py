"""Reconstruction, sparsity and directions of features, against numbers worked by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import planted_activations
from tiny_substrate import identity_sae, random_sae, tiny_substrate

from lab.evaluations.heldout import HeldOut
from lab.evaluations.reconstruction import (
    decoder_metrics,
    evaluate_reconstruction,
    impurity,
    reconstruction_metrics,
)
from lab.language_model import losses
from lab.sparse import ExportedSAE


@pytest.fixture
def heldout(tmp_path, processor):
    """In float32, so that what must be equal is."""
    processor(bfloat16=False)
    return HeldOut(tiny_substrate(tmp_path))


def silent_sae(b_dec, d_sae=12):
    """Nothing fires: the reconstruction is b_dec."""
    weights = torch.nn.functional.normalize(torch.randn(d_sae, len(b_dec)), dim=1)
    return ExportedSAE(weights.T.contiguous(), torch.full((d_sae,), -1e6), weights, b_dec)


def test_a_perfect_sae_has_perfect_scores_and_the_sparsity_of_its_input():
    z, _ = planted_activations(500, d_in=8, n_true=16)
    metrics = reconstruction_metrics(identity_sae(), z)
    assert metrics["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert metrics["mse"] == pytest.approx(0, abs=1e-6)
    assert metrics["cosine"] == pytest.approx(1, abs=1e-5)
    assert metrics["l2_ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["l0"] == pytest.approx(float((z != 0).sum() / 500))
    assert metrics["l1"] == pytest.approx(float(z.abs().sum() / 500), rel=1e-5)


def test_every_metric_of_three_tokens_by_hand():
    """Features read coordinates 0 and 1 beyond 1; coordinate 2 is never reconstructed."""
    W = torch.eye(3)[:2]
    sae = ExportedSAE(W.T.contiguous(), torch.tensor([-1.0, -1.0]), W, torch.zeros(3))
    x = torch.tensor([[4.0, 0, 0], [2.0, 3, 0], [0, 0, 2.0]])
    # x̂: (3, 0, 0), (1, 2, 0), (0, 0, 0); errors 1, 2, 4; the mean of x is (2, 1, 2/3)
    variance = (16 + 13 + 4) / 3 - (4 + 1 + 4 / 9)
    expected = {
        "tokens": 3, "l0": 3 / 3, "l1": (3 + 1 + 2) / 3, "mse": 7 / 3,
        "explained_variance": 1 - 7 / 3 / variance,
        "cosine": (1 + 8 / (13**0.5 * 5**0.5) + 0) / 3,
        "l2_ratio": (3 / 4 + 5**0.5 / 13**0.5 + 0) / 3,
        "frac_alive": 1.0, "freq_over_1_percent": 1.0, "freq_over_10_percent": 1.0}
    assert reconstruction_metrics(sae, x) == pytest.approx(expected)


def test_a_feature_counts_as_frequent_beyond_the_named_share_of_tokens():
    """Of 1,000 tokens the features fire on 1000, 101, 100, 11, 10 and none."""
    x = torch.zeros(1000, 6)
    for column, times in enumerate((1000, 101, 100, 11, 10, 0)):
        x[:times, column] = 1.0
    metrics = reconstruction_metrics(identity_sae(6), x)
    assert metrics["frac_alive"] == pytest.approx(5 / 12)
    assert metrics["freq_over_1_percent"] == pytest.approx(4 / 12)
    assert metrics["freq_over_10_percent"] == pytest.approx(2 / 12)


def test_explained_variance_is_of_the_whole_sample_not_a_mean_over_batches(generator):
    z = torch.cat([torch.randn(90, 6, generator=generator) * 10 + 3,
                   torch.randn(10, 6, generator=generator) * 0.01])
    metrics = reconstruction_metrics(silent_sae(torch.ones(6)), z, chunk=7)
    error = float((z - 1).square().sum(1).mean())
    variance = float((z - z.mean(0)).square().sum(1).mean())
    assert metrics["mse"] == pytest.approx(error, rel=1e-5)
    assert metrics["explained_variance"] == pytest.approx(1 - error / variance, rel=1e-5)
    assert metrics["l0"] == metrics["frac_alive"] == 0
    of_the_mean = reconstruction_metrics(silent_sae(z.mean(0)), z)
    assert of_the_mean["explained_variance"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 3.3])
def test_what_does_not_vary_has_no_explained_variance(value):
    """Nor has it one by rounding: E‖x‖² − ‖E x‖² of a constant is not exactly 0."""
    metrics = reconstruction_metrics(identity_sae(), torch.full((10, 8), value))
    assert metrics["explained_variance"] is None


def test_of_no_token_every_metric_is_undefined():
    metrics = reconstruction_metrics(identity_sae(), torch.zeros(0, 8))
    assert metrics.pop("tokens") == 0
    assert set(metrics.values()) == {None}


def test_metrics_do_not_depend_on_how_a_sample_is_cut(generator):
    x, sae = torch.randn(100, 32, generator=generator), random_sae()
    whole = reconstruction_metrics(sae, x)
    assert reconstruction_metrics(sae, x, chunk=9) == pytest.approx(whole, rel=1e-6)


def test_splicing_in_a_perfect_sae_scores_one_and_zeros_score_zero(heldout):
    perfect = identity_sae(32)
    nothing = dataclasses.replace(perfect, W_dec=torch.zeros(64, 32))
    for sae, score in ((perfect, 1.0), (nothing, 0.0)):
        results = evaluate_reconstruction(sae, heldout, torch.ones(2, 64))
        assert results["ce_score"] == pytest.approx(score, abs=1e-4)


def test_losses_are_of_named_text_and_of_the_tokens_that_a_frontier_context_has(tmp_path,
                                                                                 processor):
    """The first ten of sixteen."""
    processor(bfloat16=False)
    substrate = tiny_substrate(tmp_path, frontier_length=10)
    heldout, sae = HeldOut(substrate), random_sae()
    rows = torch.cat([(heldout["domain"] == k).nonzero()[:4, 0] for k in (0, 1)])
    tokens, x = heldout["tokens"][rows, :10], heldout["x"][rows, :10]
    results = evaluate_reconstruction(sae, heldout, torch.ones(2, 128))
    for name, changed in (("ce_base", x), ("ce_zero", 0 * x), ("ce_sae", sae.reconstruct(x))):
        expected = float(losses(substrate.lm, tokens, changed).mean())
        assert results[name] == pytest.approx(expected, rel=1e-5)
    assert results["tokens"] == 2 * 8 * 16  # all else is of whole contexts


def test_attention_sinks_are_not_replaced_by_their_reconstruction(heldout):
    heldout.tensors["keep"] = torch.zeros_like(heldout["keep"])
    heldout.tensors["keep"][:, -1] = True  # so that there is something to measure
    nothing = dataclasses.replace(identity_sae(32), W_dec=torch.zeros(64, 32))
    results = evaluate_reconstruction(nothing, heldout, torch.ones(2, 64))
    assert results["ce_sae"] == pytest.approx(results["ce_base"], abs=1e-6)


def test_each_domain_is_measured_by_itself_and_the_first_two_together(heldout):
    sae = random_sae()
    results = evaluate_reconstruction(sae, heldout, torch.ones(2, 128))
    parts = results["by_domain"]
    assert list(parts) == ["forget", "retain", "other"]
    for k, part in enumerate(parts.values()):
        x = heldout["x"][heldout["domain"] == k].reshape(-1, 32)  # no sinks in a random model
        fired = (sae.encode(x) > 0).float()
        assert part["tokens"] == len(x) == 8 * 16
        assert part["l0"] == pytest.approx(float(fired.sum(1).mean()))
        assert part["frac_alive"] == pytest.approx(float(fired.any(0).float().mean()))
        error = (x - sae.reconstruct(x)).square().sum(1).mean()
        variance = (x - x.mean(0)).square().sum(1).mean()
        assert part["explained_variance"] == pytest.approx(float(1 - error / variance), rel=1e-4)
    assert len({part["l0"] for part in parts.values()}) == 3
    both = reconstruction_metrics(sae, heldout.residuals())
    assert {name: results[name] for name in both} == pytest.approx(both)


def test_a_domain_without_text_leaves_the_other_numbers_as_they_are(heldout):
    sae, use = random_sae(), torch.ones(2, 128)
    before = evaluate_reconstruction(sae, heldout, use)
    heldout.tensors["domain"] = heldout["domain"].clamp(max=1)  # the third text counts as retain
    heldout.tensors["keep"] = heldout["keep"] & (torch.arange(24) < 16)[:, None]
    after = evaluate_reconstruction(sae, heldout, use)
    assert after["by_domain"]["other"]["tokens"] == 0
    assert after["by_domain"]["other"]["l0"] is None
    assert after["by_domain"]["retain"] == before["by_domain"]["retain"]
    assert after["l0"] == before["l0"]


def test_duplicates_are_pairs_that_serve_different_domains():
    sae = identity_sae(4)
    sae.W_dec[1], sae.W_dec[3] = sae.W_dec[0].clone(), sae.W_dec[2].clone()
    use = torch.ones(2, 8)
    use[:, 0], use[:, 1] = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])  # split: counts
    metrics = decoder_metrics(sae, use)  # features 2 and 3 are alike but serve both: no
    assert metrics["duplicates"] == 1
    assert metrics["forget_features"] == 1
    assert metrics["l_dir_floor"] == 0.5
    assert metrics["l_use"] == pytest.approx(12 / 14)  # of all activation, 12 parts serve both
    # coordinates 0 and 2 have twins; the negative half finds nothing closer than 0
    assert metrics["max_decoder_cosine"] == pytest.approx(4 / 8)


def test_a_features_retain_side_is_the_kind_that_it_is_the_larger_part_of():
    """Whatever the kinds' activations sum to: the second kind of retain text is ten times as
    loud, and the feature is a third of the first one's activation but a twentieth of its."""
    use = torch.ones(3, 8)
    use[2] = 10.0
    use[:, 0] = torch.tensor([9.0, 3.0, 3.2])
    assert decoder_metrics(identity_sae(4), use)["forget_features"] == 0
    use[1, 0] = 0.1
    assert decoder_metrics(identity_sae(4), use)["forget_features"] == 1


def test_directions_are_measured_as_by_the_whole_gram_matrix(generator):
    """Also where there are more features than go into one block of it."""
    sae = random_sae(d=16, f=1500)
    use = torch.rand(2, 1500, generator=generator)
    use[0, ::2], use[1, 1::2] = 0, 0  # even features serve retain text alone, odd ones forget
    sae.W_dec[1401] = sae.W_dec[2] + 0.01
    W = torch.nn.functional.normalize(sae.W_dec.double(), dim=1)
    cosine = W @ W.T
    cosine.fill_diagonal_(-1)
    metrics = decoder_metrics(sae, use)
    assert metrics["max_decoder_cosine"] == pytest.approx(float(cosine.max(1).values.mean()),
                                                          abs=1e-6)
    assert metrics["duplicates"] == int((cosine[1::2, ::2] > 0.9).sum()) >= 1
    assert metrics["forget_features"] == 750
    cosine.fill_diagonal_(0)
    assert metrics["l_dir"] == pytest.approx(float(cosine.square().sum()) * 16 / 1500**2, rel=1e-4)


def test_impurity_by_hand():
    """Apart 0, all alike 1; a feature of half the use by both domains: its part of all use."""
    assert impurity(torch.tensor([[1.0, 0], [0, 2.0]])) == 0
    assert impurity(torch.ones(3, 5)) == pytest.approx(1)
    assert impurity(torch.tensor([[1.0, 2], [1.0, 0]])) == pytest.approx(2 / 4)
    assert impurity(torch.tensor([[3.0], [1.0]])) == pytest.approx(4 * 0.75 * 0.25)


def test_features_that_never_fire_give_defined_numbers():
    metrics = decoder_metrics(silent_sae(torch.zeros(8), d_sae=64), torch.zeros(2, 64))
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["forget_features"] == metrics["duplicates"] == metrics["l_use"] == 0
