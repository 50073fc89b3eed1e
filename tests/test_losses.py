"""Every loss against the explicit F × F computation and float64 autograd or finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from experiment import (
    active_set_loss,
    frame_loss,
    gram_encoder_loss,
    max_cosine_loss,
    use_loss,
)
from lab.storage import randomness

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")


def plain_frame_loss(W):
    F, D = W.shape
    return D / F**2 * ((1 - torch.eye(F)) * (W @ W.T) ** 2).sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", [True, False])
def test_frame_loss_and_gradient_are_those_of_the_whole_gram_matrix(seed, unit):
    W = torch.randn(24, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    W = torch.nn.functional.normalize(W, dim=1) if unit else W
    ours, plain = W.clone().requires_grad_(), W.clone().requires_grad_()
    a, b = frame_loss(ours), plain_frame_loss(plain)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    (3 * a).backward()
    (3 * b).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-12)
    assert gradcheck(frame_loss, W.clone().requires_grad_())


@pytest.mark.parametrize(("spread", "tolerance"), [(1.0, 0.02), (0.1, 0.08)])
def test_frame_loss_from_bfloat16_factors_turns_rows_the_same_way(generator, spread, tolerance):
    """Value to a thousandth; what turns a row, that is the gradient across it, to two percent,
    and to eight where the rows are nearly a tight frame and hardly anything is left to turn."""
    bases = [torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] for _ in range(8)]
    W = torch.nn.functional.normalize(
        torch.cat(bases) + spread * torch.randn(512, 64, generator=generator) / 8, dim=1)
    exact, rounded = W.double().requires_grad_(), W.clone().requires_grad_()
    a, b = frame_loss(exact), frame_loss(rounded, torch.bfloat16)
    assert b.dtype == torch.float32
    assert b.item() == pytest.approx(a.item(), rel=1e-3)
    a.backward()
    b.backward()
    across = [g - (g * W).sum(1, keepdim=True) * W for g in (exact.grad.float(), rounded.grad)]
    error = (across[1] - across[0]).norm(dim=1) / across[0].norm(dim=1).mean()
    assert 0 < float(error.max()) < tolerance


def test_a_tight_frame_reaches_the_floor_of_the_frame_loss():
    W = torch.cat([torch.eye(5, dtype=torch.float64)] * 3)  # three orthonormal bases
    assert float(frame_loss(W)) == pytest.approx(1 - 5 / 15, abs=1e-12)


# -- L_dir of features that fire together ----------------------------------------------------------


def fired(fires):
    """Lists of active features, from 1 on."""
    return torch.where(fires, torch.arange(1, fires.shape[1] + 1), 0).int()


def plain_cofiring(fires):
    """ω [F, F], float64: mean over tokens of 1/n where both are active."""
    a = fires.double()
    omega = (a / a.sum(1, keepdim=True).clamp(min=1)).T @ a / len(a)
    return omega.fill_diagonal_(0)


@pytest.fixture
def tokens(generator):
    """Which of 20 features are active on 300 tokens: one always, one never, at least one."""
    fires = torch.rand(300, 20, generator=generator) < torch.linspace(0.02, 0.5, 20)
    fires[:, 4], fires[:, 11] = True, False
    return fires


def test_l_dir_of_active_sets_is_that_of_the_whole_gram_matrix(tokens, generator):
    """Value and gradient, in float64; rows need not be of unit norm."""
    W = torch.randn(20, 7, dtype=torch.float64, generator=generator)
    ours, plain = W.clone().requires_grad_(), W.clone().requires_grad_()
    value = active_set_loss(ours, fired(tokens))
    expected = (plain_cofiring(tokens) * (plain @ plain.T) ** 2).sum()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-12)
    assert gradcheck(lambda w: active_set_loss(w, fired(tokens)), W.clone().requires_grad_())


def test_without_two_active_features_l_dir_is_zero(generator):
    W = torch.randn(6, 5, generator=generator, requires_grad=True)
    lonely = torch.tensor([[3, 0], [0, 0]], dtype=torch.int32)
    for loss in (active_set_loss(W, lonely), active_set_loss(W, lonely[1:])):
        assert loss.item() == 0
        assert float(torch.autograd.grad(loss, W)[0].abs().max()) == 0


def test_features_that_fire_together_are_pushed_apart_and_those_that_never_do_are_not():
    """Two pairs, each of nearly one direction: one of them fires together, the other in turns."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(
        torch.eye(2, 8).repeat_interleave(2, 0) + 0.05 * torch.randn(4, 8, generator=g), dim=1)
    fires = torch.zeros(4000, 4, dtype=torch.bool)
    on = torch.rand(4000, 1, generator=g) < 0.2
    fires[:, :2] = on & (torch.rand(4000, 2, generator=g) < 0.8)
    turn = torch.rand(4000, generator=g)
    fires[:, 2], fires[:, 3] = turn < 0.2, turn > 0.8
    moved = W.clone().requires_grad_()
    for _ in range(200):
        gradient = torch.autograd.grad(active_set_loss(moved, fired(fires)), moved)[0]
        assert float(gradient[:2].norm(dim=1).min()) > 0
        assert float((moved[2] @ moved[3]).detach()) > 0.9
        moved = torch.nn.functional.normalize(moved - gradient, dim=1).detach()
        moved.requires_grad_()
    assert float(W[0] @ W[1]) > 0.9
    assert abs(float((moved[0] @ moved[1]).detach())) < 0.1
    torch.testing.assert_close(moved[2] @ moved[3], W[2] @ W[3], atol=0.02, rtol=0)


# -- The other losses ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("n_domains", [2, 3, 5])
def test_use_loss_and_gradient_are_those_of_the_plain_impurity(generator, n_domains):
    """At batch = running, value and gradient are those of Σ(1 − s) u · 4 p (1 − p) by autograd:
    p is forget text's part against the largest of the others, u, which is held fixed, a feature's
    part of what all have on those two."""
    running = torch.rand(n_domains, 9, dtype=torch.float64, generator=generator)
    share = torch.linspace(0, 1, 9, dtype=torch.float64)
    plain = running.clone().requires_grad_()
    p = plain[0] / (plain[0] + plain[1:].max(0).values)
    sides = running[0] + running[1:].max(0).values
    u = sides / sides.sum()
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
    the other and by both domains alike: a third. Silent features count for nothing. Two kinds of
    retain text may share what they like."""
    apart = torch.block_diag(torch.rand(1, 4), torch.rand(1, 5))
    assert float(use_loss(apart, apart)) == 0
    for alike in (torch.ones(2, 6), torch.ones(3, 6), torch.tensor([[1.0, 0], [1, 0]])):
        assert float(use_loss(alike, alike)) == pytest.approx(1)
    mixed = torch.tensor([[1.0, 4, 0], [1, 0, 0]])
    assert float(use_loss(mixed, mixed)) == pytest.approx(1 / 3)
    assert float(use_loss(mixed, mixed, torch.tensor([0.5, 0, 0]))) == pytest.approx(1 / 6)
    kinds = torch.tensor([[0.0, 2, 0], [3, 0, 1], [3, 0, 4]])
    assert float(use_loss(kinds, kinds)) == 0


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
