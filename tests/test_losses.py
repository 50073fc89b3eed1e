"""Every loss against the explicit F × F computation and float64 autograd or finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from experiment import (
    direction_loss,
    gram_encoder_loss,
    max_cosine_loss,
    use_loss,
)
from lab.storage import randomness


def plain_direction_loss(W, groups=None, share=None):
    F, D = W.shape
    weight = torch.ones(F, F, dtype=W.dtype)
    if groups is not None:
        for members, s in zip(groups, share):
            weight[members[:, None], members] = 1 - s
    weight.fill_diagonal_(0)
    return D / F**2 * (weight * (W @ W.T) ** 2).sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", [True, False])
def test_direction_loss_and_gradient_are_those_of_the_whole_gram_matrix(seed, unit):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(24, 7, dtype=torch.float64, generator=g)
    W = torch.nn.functional.normalize(W, dim=1) if unit else W
    groups = torch.randperm(24, generator=g).view(6, 4)
    share = torch.rand(6, dtype=torch.float64, generator=g) * 9.9 - 9
    share[0] = 0.0  # a group that shares nothing must not divide by its share
    for args in ((), (groups, share)):
        ours, plain = W.clone().requires_grad_(), W.clone().requires_grad_()
        a, b = direction_loss(ours, *args), plain_direction_loss(plain, *args)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        (3 * a).backward()
        (3 * b).backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-12)
    assert gradcheck(lambda w: direction_loss(w, groups, share), W.clone().requires_grad_())


@pytest.mark.parametrize(("spread", "tolerance"), [(1.0, 0.02), (0.1, 0.08)])
def test_direction_loss_from_bfloat16_factors_turns_rows_the_same_way(generator, spread, tolerance):
    """Value to a thousandth; what turns a row, that is the gradient across it, to two percent,
    and to eight where the rows are nearly a tight frame and hardly anything is left to turn."""
    bases = [torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] for _ in range(8)]
    W = torch.nn.functional.normalize(
        torch.cat(bases) + spread * torch.randn(512, 64, generator=generator) / 8, dim=1)
    groups = torch.randperm(512, generator=generator).view(16, 32)
    share = torch.linspace(-8, 1, 16)
    exact, rounded = W.double().requires_grad_(), W.clone().requires_grad_()
    a = direction_loss(exact, groups, share.double())
    b = direction_loss(rounded, groups, share, torch.bfloat16)
    assert b.dtype == torch.float32
    assert b.item() == pytest.approx(a.item(), rel=1e-3)
    a.backward()
    b.backward()
    across = [g - (g * W).sum(1, keepdim=True) * W for g in (exact.grad.float(), rounded.grad)]
    error = (across[1] - across[0]).norm(dim=1) / across[0].norm(dim=1).mean()
    assert 0 < float(error.max()) < tolerance


def test_a_tight_frame_reaches_the_floor_of_the_direction_loss():
    W = torch.cat([torch.eye(5, dtype=torch.float64)] * 3)  # three orthonormal bases
    assert float(direction_loss(W)) == pytest.approx(1 - 5 / 15, abs=1e-12)


def test_gram_encoder_loss_equals_that_of_the_whole_gram_matrix(generator):
    W = torch.randn(12, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    plain = W.detach().clone().requires_grad_()
    a = gram_encoder_loss(W)
    b = ((plain @ plain.T - torch.eye(12)) ** 2).sum() * 5 / 144
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    torch.testing.assert_close(W.grad, plain.grad)


def test_max_cosine_loss_and_gradient_are_those_of_the_whole_gram_matrix(generator):
    W = torch.nn.functional.normalize(
        torch.randn(40, 6, dtype=torch.float64, generator=generator), dim=1).requires_grad_()
    plain = W.detach().clone().requires_grad_()
    gram = plain @ plain.T - 3 * torch.eye(40)
    b = (gram.max(dim=1).values ** 2).mean()
    a = max_cosine_loss(W, generator)
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    torch.testing.assert_close(W.grad, plain.grad)


def test_max_cosine_loss_looks_for_neighbours_within_a_chunk_only(generator):
    W = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    whole = float(max_cosine_loss(W, generator))
    parts = float(max_cosine_loss(W, generator, chunk=10))
    assert parts < whole  # the nearest of nine is farther than the nearest of thirty-nine


def test_use_loss_and_gradient_are_those_of_the_plain_impurity(generator):
    """At batch = running, value and gradient are those of Σ(1 − s) u · 4 p (1 − p) by autograd,
    with u, a feature's part of all activation, held fixed."""
    running = torch.rand(2, 9, dtype=torch.float64, generator=generator)
    share = torch.linspace(0, 1, 9, dtype=torch.float64)
    plain = running.clone().requires_grad_()
    p = plain[0] / plain.sum(0)
    u = running.sum(0) / running.sum()
    expected = ((1 - share) * u * 4 * p * (1 - p)).sum()
    batch = running.clone().requires_grad_()
    loss = use_loss(batch, running, share)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(batch.grad, plain.grad)


def test_use_loss_does_not_reward_shrinking_or_swelling(generator):
    """The gradient has no part along any one feature's size, whatever the feature shares."""
    running = torch.rand(3, 9, dtype=torch.float64, generator=generator)
    batch = running.clone().requires_grad_()
    use_loss(batch, running, torch.linspace(0, 1, 9, dtype=torch.float64)).backward()
    assert float(batch.grad.abs().max()) > 1e-3
    assert float((batch.grad * running).sum(0).abs().max()) < 1e-12


def test_use_loss_by_hand():
    """Apart: 0. All alike: 1, in any number of domains. One feature of two, used half as much as
    the other and by both domains alike: a third. Silent features count for nothing."""
    apart = torch.block_diag(torch.rand(1, 4), torch.rand(1, 5))
    assert float(use_loss(apart, apart)) == 0
    for alike in (torch.ones(2, 6), torch.ones(3, 6), torch.tensor([[1.0, 0], [1, 0]])):
        assert float(use_loss(alike, alike)) == pytest.approx(1)
    mixed = torch.tensor([[1.0, 4, 0], [1, 0, 0]])
    assert float(use_loss(mixed, mixed)) == pytest.approx(1 / 3)
    assert float(use_loss(mixed, mixed, torch.tensor([0.5, 0, 0]))) == pytest.approx(1 / 6)


def test_max_cosine_gradient_has_the_same_bytes_however_threads_run(generator):
    """Many rows have one nearest neighbour, whose gradient is a sum; its order must be fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        W = torch.randn(4608, 256, generator=generator) + 3 * torch.randn(256, generator=generator)
        W.requires_grad_()
        gradients = [torch.autograd.grad(max_cosine_loss(W, randomness(0)), W)[0]
                     for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
