"""The SAE: the sparse path against plain autograd, unit rows, export."""

import json

import pytest
import torch
from safetensors.torch import load_file

import experiment as ex


def make(d_in=24, d_sae=96, seed=0, sparse=True):
    sae = ex.CustomSAE(d_in, d_sae, torch.Generator().manual_seed(seed))
    z = torch.randn(64, d_in, generator=torch.Generator().manual_seed(seed + 1)) / d_in**0.5
    sae.initialize_biases_(z, 6.0)
    return sae, z


def gradients(sae, code):
    weights = torch.linspace(0.5, 1.5, len(code.value_N))
    loss = (
        code.z_hat_BD * torch.linspace(-1, 1, code.z_hat_BD.numel()).view_as(code.z_hat_BD)
    ).sum()
    loss = loss + (weights * code.value_N).square().sum()
    sae.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize("screen", ["float32", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_step_equals_dense_step(seed, screen):
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


@pytest.mark.parametrize("width", [64, 20, 7])
def test_places_are_those_of_nonzero_in_order(width):
    """Whole words of eight, and rows that end within one; crowded, empty, one at either end."""
    for share in (0.01, 0.5, 1.0, 0.0):
        hit = torch.rand(50, width) < share
        assert torch.equal(torch.stack(ex.places(hit)).T, hit.nonzero())
    hit[0, 0] = hit[-1, -1] = True
    assert torch.stack(ex.places(hit)).T.tolist() == [[0, 0], [49, width - 1]]



def test_the_8_bit_screen_misses_nothing_and_lets_little_through(generator):
    """Activations with an outlier dimension, as residual streams have them; weights along them."""
    x = torch.randn(512, 96, generator=generator) / 96**0.5
    x[:, 7] *= 30
    W = torch.nn.functional.normalize(torch.randn(768, 96, generator=generator), dim=1)
    W[:256] = torch.nn.functional.normalize(x[:256] * (torch.arange(96) != 7), dim=1)
    b = -(x @ W.T).quantile(0.98, dim=0)
    truth = (x @ W.T + b) > 0
    row, column = ex.candidates(x, W, b, "int8", rows=200)
    found = torch.zeros_like(truth)
    found[row, column] = True
    assert not (truth & ~found).any()
    assert truth.sum() < found.sum() < 2.5 * truth.sum()
    assert torch.equal(row, row.sort().values)


def test_bfloat16_products_keep_float32_weights_and_sums():
    """As on a GPU; tokens that are on for one precision alone have activations near zero."""
    sae, z = make()
    exact, sae.half = sae.dense_code(z), True
    rough = sae.dense_code(z)
    assert {part.dtype for part in (rough.z_hat_BD, rough.value_N)} == {torch.float32}
    assert not torch.equal(rough.z_hat_BD, exact.z_hat_BD)
    torch.testing.assert_close(rough.z_hat_BD, exact.z_hat_BD, rtol=0, atol=0.02)
    a, b = (torch.zeros(len(z), 96).index_put_((code.row_N, code.column_N), code.value_N.detach())
            for code in (exact, rough))
    torch.testing.assert_close(a, b, rtol=0, atol=0.02)
    rough.z_hat_BD.square().sum().backward()
    assert all(part.grad.dtype == torch.float32 for part in sae.parameters())


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


def test_initial_biases_set_the_rate_of_every_feature():
    sae, z = make()
    rate = (sae.encode(z) > 0).float().mean(0)
    assert float(rate.max()) <= 6 / 96 + 1 / 64
    assert float(rate.sum()) == pytest.approx(6, rel=0.35)


def test_decoder_rows_and_gradient():
    sae, z = make()
    gradients(sae, sae.sparse_code(z))
    sae.remove_parallel_gradient_()
    along = (sae.W_dec.grad * sae.W_dec).sum(1).detach()
    assert float(along.abs().max()) < 1e-5
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
    sae.normalize_decoder_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))


def test_export_takes_raw_activations(tmp_path):
    """The exported files on x equal the trained SAE on x / scale, in both layouts."""
    sae, z = make()
    scale = 7.3
    with torch.no_grad():
        sae.b_dec.add_(0.1)
    trainer = {**ex.dataclasses.asdict(ex.CustomSAEConfig()), "seed": 0}
    ex.export_sae(ex.TrainedSAE(sae, scale), tmp_path, ex.Pythia, trainer)
    x = z * scale
    lens = load_file(tmp_path / "sae_lens" / "sae_weights.safetensors")
    f = torch.relu((x - lens["b_dec"]) @ lens["W_enc"] + lens["b_enc"])
    torch.testing.assert_close(
        f @ lens["W_dec"] + lens["b_dec"], sae(z) * scale, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(f, sae.encode(z) * scale, atol=1e-5, rtol=1e-5)
    path = tmp_path / "dictionary_learning" / "trainer_0"
    weights = torch.load(path / "ae.pt", weights_only=True)
    g = torch.relu((x - weights["bias"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
    x_hat = g @ weights["decoder.weight"].T + weights["bias"]
    torch.testing.assert_close(x_hat, sae(z) * scale, atol=1e-5, rtol=1e-5)
    assert json.loads((path / "config.json").read_text())["trainer"]["dict_class"] == "AutoEncoder"
    cfg = json.loads((tmp_path / "sae_lens" / "cfg.json").read_text())
    assert cfg["architecture"] == "standard"
    assert cfg["normalize_activations"] == "none"
