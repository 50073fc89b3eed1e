"""Conditioning: condition numbers of planted groups, and a reference for random ones."""

import math
from types import SimpleNamespace

import pytest
import torch

from lab.evaluations.conditioning import GROUP_SIZE, evaluate_conditioning
from lab.sparse import ExportedSAE


def planted(blocks, d_in):
    """Block i of features fires on tokens along coordinate i; its decoder rows are `blocks[i]`."""
    W_dec = torch.cat(blocks)
    W_enc = torch.zeros(d_in, len(W_dec))
    for i in range(len(blocks)):
        W_enc[i, i * GROUP_SIZE : (i + 1) * GROUP_SIZE] = 1.0
    return ExportedSAE(W_enc, torch.zeros(len(W_dec)), W_dec, torch.zeros(d_in))


def heldout(n_blocks, d_in, generator):
    """Tokens on one coordinate each."""
    kind = torch.randint(0, n_blocks, (4000,), generator=generator)
    return SimpleNamespace(residuals=lambda: torch.nn.functional.one_hot(kind, d_in).float())


def a_pair_at(cosine, first, d_in):
    """Orthonormal rows, of which the second is turned towards the first: κ² = (1 + c)/(1 − c)."""
    rows = torch.eye(d_in)[first : first + GROUP_SIZE].clone()
    rows[1] = cosine * rows[0] + math.sqrt(1 - cosine**2) * rows[1]
    return rows


def test_condition_numbers_of_features_that_fire_together_by_hand(generator):
    d_in = 80
    kappas = [1.0, 2.0, 3.0, 7.0]  # cosine (κ² − 1)/(κ² + 1)
    blocks = [a_pair_at((k * k - 1) / (k * k + 1), i, d_in) for i, k in enumerate(kappas)]
    results = evaluate_conditioning(planted(blocks, d_in), heldout(4, d_in, generator))
    assert results["group_kappa"] == pytest.approx(kappas, abs=1e-3)
    assert results["group_kappa_median"] == pytest.approx(2.0, rel=1e-3)  # the lower of two
    assert results["group_kappa_p90"] == pytest.approx(3 + 0.7 * (7 - 3), rel=1e-3)
    assert results["group_kappa_max"] == pytest.approx(7.0, rel=1e-3)
    root = math.sqrt(64 / 80)
    assert results["group_kappa_random"] == pytest.approx((1 + root) / (1 - root))
    assert [part["quartile"] for part in results["by_coactivation"]] == [1, 2, 3, 4]
    by_quartile = [part["group_kappa_median"] for part in results["by_coactivation"]]
    assert sorted(by_quartile) == pytest.approx(kappas, rel=1e-3)
    for part in results["by_coactivation"]:  # they fire together always
        assert part["coactivation"] == pytest.approx(1.0, abs=0.15)


def test_condition_numbers_of_active_features_token_by_token(generator):
    """Against singular values of each token's rows, of a dictionary in which any may be active."""
    W_enc = torch.randn(20, 64, generator=generator)
    W_dec = torch.nn.functional.normalize(torch.randn(64, 20, generator=generator), dim=1)
    sae = ExportedSAE(W_enc, torch.full((64,), -5.0), W_dec, torch.zeros(20))
    x = torch.randn(500, 20, generator=generator)
    x[0], x[1] = 0, 10 * W_enc[:, 0]  # nothing is active; more are than there are dimensions
    expected = []
    for f in sae.encode(x):
        values = torch.linalg.svdvals(W_dec[f > 0].double()) if (f > 0).any() else torch.ones(1)
        expected.append(float(values[0] / values[-1]) if (f > 0).sum() <= 20 else 1e7)
    results = evaluate_conditioning(sae, SimpleNamespace(residuals=lambda: x))
    assert results["kappa"] == pytest.approx(sorted(expected), rel=1e-3)
    assert expected[:2] == [1, 1e7]
    assert sorted(expected)[250] > 1.2
    typical = int((sae.encode(x) > 0).sum(1).median())
    root = math.sqrt(typical / 20)
    assert results["kappa_random"] == pytest.approx((1 + root) / (1 - root))


def test_condition_numbers_do_not_change_with_the_scale_of_activations(generator):
    blocks = [a_pair_at(0.5, i, 80) for i in range(2)]
    sae, text = planted(blocks, 80), heldout(2, 80, generator)
    louder = SimpleNamespace(residuals=lambda: 100 * text.residuals())
    assert evaluate_conditioning(sae, louder) == evaluate_conditioning(sae, text)


def test_features_that_never_fire_give_finite_condition_numbers(generator):
    sae = planted([a_pair_at(0.0, i, 80) for i in range(2)], 80)
    sae.b_enc.fill_(-1e6)
    results = evaluate_conditioning(sae, heldout(2, 80, generator))
    assert set(results["kappa"]) == {1.0}  # nothing is active that could be told apart badly
    assert all(math.isfinite(value) for value in results["group_kappa"])
    assert all(part["coactivation"] == 0 for part in results["by_coactivation"])
