"""The SAE: the sparse path against plain autograd, the screen, unit rows, the start."""

import pytest
import torch

from experiment import CustomSAE
from lab.sparse import Code, candidates, faster_screen, places


def make(d_in=24, d_sae=96, seed=0):
    sae = CustomSAE(d_in, d_sae, torch.Generator().manual_seed(seed))
    z = torch.randn(64, d_in, generator=torch.Generator().manual_seed(seed + 1)) / d_in**0.5
    sae.initialize_biases_(z, 6.0)
    return sae, z


def gradients(sae, code):
    weights = torch.linspace(0.5, 1.5, len(code.value_N))
    slope_BD = torch.linspace(-1, 1, code.z_hat_BD.numel()).view_as(code.z_hat_BD)
    loss = (code.z_hat_BD * slope_BD).sum()
    loss = loss + (weights * code.value_N).square().sum()
    sae.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize("screen", ["float32", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_the_sparse_path_has_the_dense_paths_code_and_gradients(seed, screen):
    sae, z = make(seed=seed)
    sae.screen = screen
    with torch.no_grad():
        sae.b_dec.add_(0.05)
    dense, sparse = sae.dense_code(z), sae.sparse_code(z)
    for a, b in zip(dense, sparse):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    a, b = gradients(sae, dense), gradients(sae, sae.sparse_code(z))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
        assert b[name].stride() == dict(sae.named_parameters())[name].stride()


def largest(n):
    """The limit above which n activations are, or all where there are no more."""
    return lambda value_N: torch.cat([value_N.flatten().clamp(min=0), torch.zeros(n + 1)]).sort(
        descending=True).values[n]


@pytest.mark.parametrize("screen", ["float32", "int8"])
@pytest.mark.parametrize("floor", [0.0, 0.02, 9.0])  # the last is above the limit
def test_only_the_largest_activations_of_a_batch_stay_and_have_gradients(screen, floor):
    sae, z = make(seed=1)
    sae.screen, n = screen, 3 * len(z)
    f = sae.encode(z)
    kept = torch.zeros_like(f).flatten().scatter(0, f.flatten().topk(n).indices, 1.0).view_as(f)
    plain = Code(sae.decode(f * kept), f[kept > 0], *kept.nonzero(as_tuple=True))
    codes = [lambda: sae.sparse_code(z, floor, largest(n)), lambda: sae.dense_code(z, largest(n))]
    expected = gradients(sae, plain)
    for made in codes:
        code = made()
        assert len(code.value_N) == n < int((f > 0).sum())
        for a, b in zip(code, plain):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for name, grad in gradients(sae, made()).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)
    gpu = sae.gpu_code(z, largest(n))
    torch.testing.assert_close(gpu.f_BF, f * kept, rtol=1e-5, atol=1e-6)
    assert int(gpu.counts(sae.d_sae).sum()) == n
    sae.zero_grad()
    ((gpu.z_hat_BD * torch.linspace(-1, 1, z.shape[1])).sum() + gpu.f_BF.square().sum()).backward()
    ours = {name: part.grad.clone() for name, part in sae.named_parameters()}
    sae.zero_grad()
    f = sae.encode(z) * kept
    ((sae.decode(f) * torch.linspace(-1, 1, z.shape[1])).sum() + f.square().sum()).backward()
    for name, part in sae.named_parameters():
        torch.testing.assert_close(ours[name], part.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [64, 20, 7])
def test_places_of_true_entries_are_those_of_nonzero_in_order(width):
    """Whole words of eight, and rows that end within one; crowded, empty, one at either end."""
    for share in (0.01, 0.5, 1.0, 0.0):
        hit = torch.rand(50, width) < share
        assert torch.equal(torch.stack(places(hit)).T, hit.nonzero())
    hit[0, 0] = hit[-1, -1] = True
    assert torch.stack(places(hit)).T.tolist() == [[0, 0], [49, width - 1]]


def test_the_8_bit_screen_misses_nothing_and_lets_little_through(generator):
    """Activations with an outlier dimension, as residual streams have them; weights along them."""
    x = torch.randn(512, 96, generator=generator) / 96**0.5
    x[:, 7] *= 30
    W = torch.nn.functional.normalize(torch.randn(768, 96, generator=generator), dim=1)
    W[:256] = torch.nn.functional.normalize(x[:256] * (torch.arange(96) != 7), dim=1)
    b = -(x @ W.T).quantile(0.98, dim=0)
    truth = (x @ W.T + b) > 0
    row, column = candidates(x, W, b, "int8", rows=200)
    screened = torch.zeros_like(truth)
    screened[row, column] = True
    assert not (truth & ~screened).any()
    assert truth.sum() < screened.sum() < 2.5 * truth.sum()
    assert torch.equal(row, row.sort().values)


def test_a_batch_on_which_nothing_fires_gives_defined_gradients():
    sae, z = make()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    code = sae.sparse_code(z)
    assert len(code.value_N) == 0
    torch.testing.assert_close(code.z_hat_BD, sae.b_dec.expand_as(z))
    grads = gradients(sae, code)
    assert all(torch.isfinite(part).all() for part in grads.values())
    assert float(grads["W_enc_FD"].abs().max()) == 0


def test_training_starts_with_every_feature_firing_at_the_wanted_rate():
    sae, z = make()
    rate = (sae.encode(z) > 0).float().mean(0)
    assert float(rate.max()) <= 6 / 96 + 1 / 64
    assert float(rate.sum()) == pytest.approx(6, rel=0.35)


def test_decoder_rows_keep_unit_norm_and_are_only_turned():
    sae, z = make()
    gradients(sae, sae.sparse_code(z))
    sae.remove_parallel_gradient_()
    along = (sae.W_dec.grad * sae.W_dec).sum(1).detach()
    assert float(along.abs().max()) < 1e-5
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
    sae.normalize_decoder_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))


@torch.no_grad()
def test_features_and_reconstruction_follow_their_equations(generator):
    """f = ReLU((z − b_dec) W_enc + b_enc), ẑ = f W_dec + b_dec, one product at a time."""
    sae, z = make()
    sae.b_dec.add_(torch.randn(24, generator=generator))
    f, z_hat = sae.encode(z), sae(z)
    for b, i in ((0, 0), (17, 95), (63, 40)):
        product = sum((z[b, d] - sae.b_dec[d]) * sae.W_enc[d, i] for d in range(24))
        assert float(f[b, i]) == pytest.approx(max(0.0, float(product + sae.b_enc[i])), abs=1e-5)
    for b, d in ((0, 0), (17, 23)):
        total = sum(f[b, i] * sae.W_dec[i, d] for i in range(96)) + sae.b_dec[d]
        assert float(z_hat[b, d]) == pytest.approx(float(total), abs=1e-5)


def test_training_starts_at_the_mean_of_the_data_with_encoder_and_decoder_alike():
    sae, z = make()
    torch.testing.assert_close(sae.b_dec.detach(), z.mean(0))
    assert torch.equal(sae.W_enc_FD, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))


@pytest.mark.parametrize(("has", "screen"), [
    ({}, "float32"), ({"avx512_vnni": True}, "int8"), ({"amx_int8": True}, "int8")])
def test_the_screen_is_in_8_bits_only_where_the_processor_has_such_products(monkeypatch, has,
                                                                            screen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert faster_screen() == CustomSAE(4, 8, torch.Generator()).screen == screen
