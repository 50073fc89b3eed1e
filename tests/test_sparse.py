"""Sparse products against dense ones, and the exported SAE on raw residuals."""

import pytest
import torch

from lab.sparse import (
    Code,
    DenseAutoencode,
    DenseCode,
    ExportedSAE,
    SparseAutoencode,
    candidates,
    row_starts,
    sparse_product,
    transposed,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")


@pytest.fixture
def sparse(generator):
    """A sparse matrix [20, 30] with empty rows and columns, dense and by its CSR parts."""
    dense = torch.randn(20, 30, generator=generator)
    dense[torch.rand(20, 30, generator=generator) < 0.9] = 0
    dense[[3, 19]] = 0
    dense[:, [0, 7]] = 0
    row, column = dense.nonzero(as_tuple=True)
    return dense, row_starts(row, 20), column, dense[row, column]


def random_sae(generator, d=24, f=96):
    W_enc, W_dec = (torch.nn.functional.normalize(torch.randn(f, d, generator=generator), dim=1)
                    for _ in range(2))
    return ExportedSAE(W_enc.T.contiguous(), torch.full((f,), -0.3), W_dec,
                       0.1 * torch.randn(d, generator=generator))


def test_row_starts_are_the_first_half_of_a_csr_pattern(sparse):
    dense, start, column, value = sparse
    csr = dense.to_sparse_csr()
    assert torch.equal(start, csr.crow_indices())
    assert torch.equal(column, csr.col_indices())
    assert row_starts(torch.zeros(0, dtype=torch.long), 3).tolist() == [0, 0, 0, 0]


def test_a_transposed_pattern_tells_where_each_entry_was(sparse):
    dense, start, column, value = sparse
    start_F, row, order = transposed(start, column, 30)
    csr = dense.T.to_sparse_csr()
    assert torch.equal(start_F, csr.crow_indices())
    assert torch.equal(row, csr.col_indices())
    assert torch.equal(value[order], csr.values())


def test_the_product_with_a_dense_matrix_is_the_dense_one(sparse, generator):
    dense, start, column, value = sparse
    other = torch.randn(30, 12, generator=generator)
    torch.testing.assert_close(sparse_product(start, column, value, other), dense @ other)


@pytest.mark.parametrize("screen", ["float32", "int8"])
@pytest.mark.parametrize("rows", [1, 7, 512])
def test_the_screen_passes_every_active_feature_however_the_batch_is_cut(screen, rows, generator):
    sae = random_sae(generator)
    x = torch.randn(50, 24, generator=generator)
    active = x @ sae.W_enc + sae.b_enc > 0
    row, column = candidates(x, sae.W_enc.T.contiguous(), sae.b_enc, screen, rows)
    passed = torch.zeros_like(active)
    passed[row, column] = True
    assert int(passed.sum()) == len(row)  # none twice
    assert not bool((active & ~passed).any())
    assert torch.equal(row, row.sort().values)


def test_the_screen_leaves_what_it_is_given_as_it_was(generator):
    sae = random_sae(generator)
    x, W = torch.randn(50, 24, generator=generator), sae.W_enc.T.contiguous()
    before = x.clone(), W.clone(), sae.b_enc.clone()
    candidates(x, W, sae.b_enc, "int8")
    assert all(torch.equal(one, other) for one, other in zip(before, (x, W, sae.b_enc)))


@pytest.mark.parametrize("screen", ["float32", "int8"])
def test_gradients_of_all_inputs_are_those_of_the_dense_equations(screen, generator):
    """f = ReLU((z − b_dec) W_enc + b_enc), ẑ = f W_dec + b_dec, by autograd."""
    sae = random_sae(generator)
    z = torch.randn(40, 24, generator=generator)
    weights = [part.clone().requires_grad_() for part in (
        sae.W_enc.T.contiguous(), sae.b_enc, sae.W_dec, sae.b_dec)]
    pull = torch.randn(40, 24, generator=generator)

    def objective(z_hat, f_sum):
        return (pull * z_hat).sum() + 0.7 * f_sum

    z_hat, value, row, column = SparseAutoencode.apply(z, *weights, screen)
    sparse = torch.autograd.grad(objective(z_hat, value.sum()), weights)
    W_enc, b_enc, W_dec, b_dec = weights
    f = torch.relu((z - b_dec) @ W_enc.T + b_enc)
    dense = torch.autograd.grad(objective(f @ W_dec + b_dec, f.sum()), weights)
    for one, other in zip(sparse, dense):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.stack([row, column]).T, (f > 0).nonzero())


def plain(z, W_enc, b_enc, W_dec, b_dec):
    """f = ReLU((z − b_dec) W_enc + b_enc), ẑ = f W_dec + b_dec."""
    f = torch.relu((z - b_dec) @ W_enc.T + b_enc)
    return f @ W_dec + b_dec, f


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_dense_products_have_the_gradients_of_the_equations(dtype, error, generator):
    """Of all inputs, through reconstruction and activations, against those in float64. In bfloat16
    a few entries are active for one precision alone."""
    sae = random_sae(generator)
    z = torch.randn(400, 24, generator=generator)
    weights = [part.clone().requires_grad_() for part in (
        sae.W_enc.T.contiguous(), sae.b_enc, sae.W_dec, sae.b_dec)]
    exact = [part.detach().double().requires_grad_() for part in weights]
    pull_BD, pull_BF = (torch.randn(400, n, generator=generator) for n in (24, 96))

    def gradients(z_hat, f, weights):
        loss = (pull_BD.to(z_hat.dtype) * z_hat).sum() + (pull_BF.to(f.dtype) * f).sum()
        return torch.autograd.grad(loss, weights)

    z_hat, f, fires = DenseAutoencode.apply(z, *weights, dtype)
    assert torch.equal(fires, (f > 0).to(dtype))
    expected = plain(z.double(), *exact)
    assert (z_hat.dtype, f.dtype) == (torch.float32, dtype)
    for one, other in zip((z_hat, f), expected):
        torch.testing.assert_close(one.double(), other, rtol=error, atol=2 * error)
    for one, other in zip(gradients(z_hat, f, weights), gradients(*expected, exact)):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < error


def test_dense_products_pass_a_gradient_of_either_output_alone(generator):
    sae = random_sae(generator)
    weights = [part.clone().requires_grad_() for part in (
        sae.W_enc.T.contiguous(), sae.b_enc, sae.W_dec, sae.b_dec)]
    z = torch.randn(40, 24, generator=generator)
    for of in (0, 1):
        one, other = (torch.autograd.grad(outputs[of].sum(), weights, materialize_grads=True)
                      for outputs in (DenseAutoencode.apply(z, *weights, torch.float32),
                                      plain(z, *weights)))
        for a, b in zip(one, other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- A batch's code, listed and dense ------------------------------------------------------------


def listed(f):
    row, column = f.nonzero(as_tuple=True)
    return Code(f, f[row, column], row, column)


def dense(f):
    return DenseCode(f, f, f.sign())


@pytest.fixture
def activations(generator):
    """[60, 40], a third of them above zero, one feature silent; and their domains, of three, of
    which one has no token."""
    f = torch.relu(torch.randn(60, 40, generator=generator) - 0.4)
    f[:, 7] = 0
    return f, torch.randint(0, 2, (60,), generator=generator) * 2


@pytest.mark.parametrize("code", [listed, dense])
def test_activations_are_summed_by_domain_and_in_all_and_with_their_gradient(code, activations):
    f, domain = activations
    f.requires_grad_()
    total_KF, total = code(f).totals(domain, 3, 40)
    for k in range(3):
        torch.testing.assert_close(total_KF[k], f[domain == k].sum(0))
    torch.testing.assert_close(total, f.sum())
    slope_KF = torch.linspace(-1, 1, 120).view(3, 40)
    gradient = torch.autograd.grad((slope_KF * total_KF).sum() + 2 * total, f)[0]
    expected = (slope_KF[domain] + 2) * (f > 0 if code is listed else 1)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("code", [listed, dense])
def test_features_are_counted_where_they_fire(code, activations):
    f, _ = activations
    counts = code(f).counts(40)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, (f > 0).sum(0))
    assert int(counts[7]) == 0


@pytest.mark.parametrize("code", [listed, dense, lambda f: dense(f.bfloat16())])
def test_each_token_lists_what_fires_on_it_or_nothing_where_that_is_too_much(code, activations):
    f, _ = activations
    for room in (50, 14):
        lists = code(f).lists(room)
        assert lists.shape == (60, room)
        for row, one in zip(f, lists.tolist()):
            fires = [i + 1 for i in row.nonzero().squeeze(1).tolist()]
            expected = fires if len(fires) <= room else []
            assert sorted(one) == [0] * (room - len(expected)) + expected
            assert all(one[: len(expected)])  # no gaps
        assert room == 50 or 0 < int((lists[:, 0] == 0).sum()) < 60


def test_each_token_adds_its_sign_to_its_column_of_what_fires_on_it(activations, generator):
    f, _ = activations
    column = torch.randint(0, 5, (60,), generator=generator)
    sign = torch.randint(0, 2, (60,), generator=generator) * 2.0 - 1
    sums = torch.full((40, 5), 0.5)
    listed(f).add_signs_(sums, column, sign)
    for r in range(5):
        expected = ((f > 0) * sign[:, None])[column == r].sum(0) + 0.5
        assert torch.equal(sums[:, r], expected)


# -- The exported SAE ----------------------------------------------------------------------------


def test_code_encode_and_reconstruct_are_the_same_sae(generator):
    sae = random_sae(generator)
    x = torch.randn(50, 24, generator=generator)
    f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae.reconstruct(x), f @ sae.W_dec + sae.b_dec)
    code = sae.code(x)
    torch.testing.assert_close(code.z_hat_BD, f @ sae.W_dec + sae.b_dec, rtol=1e-5, atol=1e-5)
    dense = torch.zeros_like(f)
    dense[code.row_N, code.column_N] = code.value_N
    torch.testing.assert_close(dense, f, rtol=1e-5, atol=1e-5)


def test_some_features_are_encoded_as_among_all(generator):
    sae = random_sae(generator)
    x = torch.randn(3, 5, 24, generator=generator)
    chosen = torch.tensor([4, 0, 90])
    torch.testing.assert_close(sae.encode(x, chosen), sae.encode(x)[..., chosen])
    assert sae.encode(x, chosen[:0]).shape == (3, 5, 0)


def test_an_exported_sae_knows_its_sizes_and_names_its_tensors(generator):
    sae = random_sae(generator)
    assert (sae.d_in, sae.d_sae) == (24, 96)
    assert {name: tuple(part.shape) for name, part in sae.tensors().items()} == {
        "W_enc": (24, 96), "b_enc": (96,), "W_dec": (96, 24), "b_dec": (24,)}
    again = ExportedSAE(**sae.tensors())
    assert all(part is again.tensors()[name] for name, part in sae.tensors().items())


def test_a_batch_on_which_nothing_fires_reconstructs_the_bias(generator):
    sae = random_sae(generator)
    silent = ExportedSAE(sae.W_enc, sae.b_enc - 100, sae.W_dec, sae.b_dec)
    x = torch.randn(50, 24, generator=generator)
    code = silent.code(x)
    assert len(code.value_N) == len(code.row_N) == len(code.column_N) == 0
    assert torch.equal(code.z_hat_BD, sae.b_dec.expand_as(x))
