"""The trainer: modes, α, the sparsity controller, unit rows, checkpoints, non-finite numbers."""

import dataclasses
import math

import pytest
import torch
from conftest import planted_activations

import experiment as ex


def run(config, seed=0, steps=None, alpha=None, z=None, domain=None):
    if z is None:
        z, domain = planted_activations(8192)
    sae = ex.CustomSAE(32, config.expansion * 32, ex.randomness("weights", seed))
    sae.initialize_biases_(z[: config.batch_size], 2 * config.target_l0)
    trainer = ex.CustomTrainer(config, sae, seed)
    if alpha is not None:
        trainer.alpha = alpha
    for t in range(steps or config.steps):
        part = torch.arange(t * config.batch_size, (t + 1) * config.batch_size) % len(z)
        terms = trainer.step(z[part], domain[part])
    return trainer, terms


@pytest.mark.parametrize("mode", ["off", "fixed", "adaptive", "max_cosine"])
@pytest.mark.parametrize("matrix", ["decoder", "encoder"])
def test_every_mode_trains_on_either_matrix(small_config, mode, matrix):
    config = dataclasses.replace(small_config, orthogonality=mode, ortho_matrix=matrix)
    trainer, terms = run(config)
    assert terms["fit"] < 0.9 * trainer.history[0].get("fit", 1.0) or terms["fit"] < 0.6
    assert terms["loss"] == pytest.approx(
        terms["fit"]
        + terms["lambda"] * terms["l1"]
        + terms["alpha"] * terms["ramp"] * terms["l_orth"],
        rel=1e-5,
    )
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(128), atol=1e-5, rtol=0)
    if mode == "off":
        assert terms["l_orth"] == 0


def plain_loss(parts, trainer, z, domain):
    """The objective by its definition, dense and in float64: the F × F Gram, the plain impurity."""
    W_enc, b_enc, W_dec, b_dec = (parts[name] for name in ("W_enc_FD", "b_enc", "W_dec", "b_dec"))
    f = torch.relu((z - b_dec) @ W_enc.T + b_enc)
    loss = (z - f @ W_dec - b_dec).norm(dim=1).mean()
    loss = loss + math.exp(trainer.log_sparsity) * f.sum(1).mean()
    row = trainer.row
    W = W_dec if row.ortho_matrix == "decoder" else W_enc
    W = torch.where((f > 0).any(0)[:, None], W, W.detach())  # what is silent is not turned
    F, D = W.shape
    if row.ortho_matrix == "encoder" and row.orthogonality != "fixed":
        W = W / W.norm(dim=1, keepdim=True)
    cosine = W @ W.T
    weight = 1 - torch.eye(F, dtype=torch.float64)
    share = torch.zeros(F, dtype=torch.float64)
    if row.orthogonality == "adaptive":
        state = trainer.state
        for group, s, use in zip(state["groups_GM"], state["direction_G"].double(), state["use_G"]):
            share[group] = use.double()
            weight[group[:, None], group] *= 1 - s
    l_dir = (weight * cosine.square()).sum() * D / F**2
    if row.orthogonality == "max_cosine":
        l_dir = (cosine - 9 * torch.eye(F)).max(dim=1).values.square().mean()
    if row.orthogonality == "fixed" and row.ortho_matrix == "encoder":
        l_dir = (cosine - torch.eye(F)).square().sum() * D / F**2
    l_use = 0.0
    if row.orthogonality == "adaptive":
        forget, retain = (f[domain == k].mean(0) for k in (0, 1))
        both = forget + retain  # how much a feature is used has no slope, for which domain has
        kept = (1 - share) * both.detach() / both.sum().detach()
        l_use = (kept * 4 * forget * retain / both.clamp(min=1e-12) ** 2).sum()
    return loss + (row.orthogonality != "off") * trainer.alpha * (l_dir + row.eta * l_use)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("screen", ["float32", "int8"])
@pytest.mark.parametrize("mode", ["off", "fixed", "adaptive", "max_cosine"])
@pytest.mark.parametrize("matrix", ["decoder", "encoder"])
def test_a_steps_gradients_equal_the_plain_dense_float64_ones(small_config, mode, matrix, screen,
                                                              precision):
    """To rounding; where L_dir's products are in bfloat16, to a hundredth of its own gradient."""
    config = dataclasses.replace(small_config, orthogonality=mode, ortho_matrix=matrix, alpha=0.3,
                                 steps=1000, ramp_fraction=0.01, regroup_every=10**6,
                                 ortho_dtype=precision)
    z, domain = planted_activations(256)
    sae = ex.CustomSAE(32, 128, ex.randomness("weights", 1), screen)
    sae.initialize_biases_(z, 12.0)
    with torch.no_grad():
        sae.b_enc.add_(1e-3)  # or a token of each feature is active by rounding alone
        sae.b_enc[:9] = -10.0
    trainer = ex.CustomTrainer(config, sae, 0)
    trainer.step_count, trainer.l0 = 560, 12.0
    order = torch.randperm(128, generator=ex.randomness("groups"))
    trainer.state["groups_GM"] = order.view(16, 8)
    trainer.state["direction_G"] = torch.linspace(-8, 0.9, 16)
    trainer.state["use_G"] = torch.linspace(1, 0, 16)
    assert trainer.is_sparse()
    assert trainer.ramp() == 1
    before = {name: part.detach().double().requires_grad_()
              for name, part in sae.named_parameters()}
    loss = plain_loss(before, trainer, z.double(), domain)
    loss.backward()
    along = (before["W_dec"].grad * before["W_dec"]).sum(1, keepdim=True)
    before["W_dec"].grad -= along.detach() * before["W_dec"].detach()
    terms = trainer.step(z, domain)
    rounded = precision == "bfloat16" and mode in ("fixed", "adaptive")
    assert terms["loss"] == pytest.approx(loss.item(), rel=1e-3 if rounded else 1e-5)
    pull = trainer.alpha * trainer.state["pull_FD"].abs().max().item() if rounded else 0.0
    for name, part in sae.named_parameters():
        torch.testing.assert_close(part.grad.double(), before[name].grad, rtol=1e-3,
                                   atol=2e-6 + 0.01 * pull)


def test_direction_term_lowers_the_frame_potential(small_config):
    potentials = {}
    for mode, alpha in (("off", 0.0), ("fixed", 0.5)):
        trainer, _ = run(dataclasses.replace(small_config, orthogonality=mode, alpha=alpha))
        potentials[mode] = ex.direction_loss(trainer.sae.W_dec).item()
    assert potentials["fixed"] < potentials["off"] - 0.02


def test_use_term_separates_use(small_config):
    """Where nothing is shared. (All features of this small world are even enough to share.)"""
    l_use = {}
    for eta in (0.0, 10.0):
        config = dataclasses.replace(small_config, alpha=0.1, eta=eta, share_max=0.0, steps=150)
        use = run(config)[0].running_use()
        l_use[eta] = float(ex.use_loss(use, use))
    assert l_use[10.0] < 0.5 * l_use[0.0]


@pytest.mark.parametrize(("every", "expected"), [(20, [12, 20, 40, 60]), (50, [12, 50])])
def test_features_are_first_grouped_when_alpha_is_at_its_full_strength(small_config, every,
                                                                       expected):
    """Whatever the interval."""
    trainer, _ = run(dataclasses.replace(small_config, regroup_every=every, ramp_fraction=0.2))
    assert [line["step"] for line in trainer.history if "kappa_median" in line] == expected


def test_the_use_term_begins_with_the_first_grouping(small_config):
    config = dataclasses.replace(small_config, ramp_fraction=0.2, share_even=10.0)
    _, before = run(config, steps=12)
    _, after = run(config, steps=13)
    assert before["l_use"] == 0 < after["l_use"]


def test_a_changed_alpha_trains_differently_and_is_what_is_recorded(small_config):
    a, terms_a = run(small_config)
    b, terms_b = run(small_config, alpha=0.7)
    again, _ = run(dataclasses.replace(small_config, alpha=0.7))
    assert a.config["alpha"] == small_config.alpha == terms_a["alpha"]
    assert b.config["alpha"] == 0.7 == terms_b["alpha"]
    assert not torch.equal(a.sae.W_dec, b.sae.W_dec)
    assert torch.equal(b.sae.W_dec, again.sae.W_dec)  # it is α that counts, not where it was set
    assert b.state_dict()[1]["alpha"] == 0.7


@pytest.mark.parametrize("target", [4.0, 12.0])
def test_the_controller_meets_the_target_sparsity(small_config, target):
    config = dataclasses.replace(
        small_config,
        orthogonality="off",
        alpha=0.0,
        steps=700,
        target_l0=target,
        resample_every=150,
    )
    trainer, _ = run(config)
    assert trainer.l0 == pytest.approx(target, rel=0.05)


def test_learning_rate_warms_up_and_decays(small_config):
    config = dataclasses.replace(small_config, steps=100, warmup_steps=10, decay_fraction=0.2)
    trainer = ex.CustomTrainer(config, ex.CustomSAE(32, 128, ex.randomness(0)), 0)
    rates = []
    for t in (0, 9, 50, 80, 90, 99):
        trainer.step_count = t
        rates.append(trainer.learning_rate() / config.learning_rate)
    assert rates == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])


def test_dead_features_are_given_a_new_life(small_config):
    config = dataclasses.replace(small_config, orthogonality="off", alpha=0.0, steps=100)
    z, domain = planted_activations(8192)
    sae = ex.CustomSAE(32, 128, ex.randomness(0))
    sae.initialize_biases_(z[:256], 16.0)
    with torch.no_grad():
        sae.b_enc[:40] = -50.0
    trainer = ex.CustomTrainer(config, sae, 0)
    for t in range(60):
        part = torch.arange(t * 256, (t + 1) * 256) % len(z)
        trainer.step(z[part], domain[part])
    assert int((trainer.state["silent_F"][:40] > 20).sum()) < 8
    cosine = sae.W_dec[:40] @ sae.W_dec[:40].T - torch.eye(40)
    assert float(cosine.max()) < 0.999  # no twins


def test_checkpoint_continues_to_the_last_bit(small_config, tmp_path):
    z, domain = planted_activations(8192)

    def batch(t):
        part = torch.arange(t * 256, (t + 1) * 256) % len(z)
        return z[part], domain[part]

    def fresh():
        sae = ex.CustomSAE(32, 128, ex.randomness(0))
        sae.initialize_biases_(z[:256], 16.0)
        return ex.CustomTrainer(small_config, sae, 0)

    whole, first = fresh(), fresh()
    for t in range(60):
        whole.step(*batch(t))
    for t in range(37):
        first.step(*batch(t))
    ex.write_tensors(tmp_path / "state.safetensors", *first.state_dict())
    second = fresh()
    second.load_state_dict(*ex.read_tensors(tmp_path / "state.safetensors"))
    for t in range(37, 60):
        second.step(*batch(t))
    a, b = whole.state_dict(), second.state_dict()
    assert a[1] == b[1]
    for name, part in a[0].items():
        assert torch.equal(part, b[0][name]), name


def test_a_non_finite_loss_stops_the_run_with_its_terms(small_config):
    z, domain = planted_activations(256)
    trainer = ex.CustomTrainer(small_config, ex.CustomSAE(32, 128, ex.randomness(0)), 0)
    z[3, 4] = math.inf
    with pytest.raises(ex.UserError, match=r"non-finite loss at step 0, seed 0: .*fit"):
        trainer.step(z, domain)


@pytest.mark.parametrize("bad", [dict(orthogonality="strong"), dict(ortho_matrix="bias")])
def test_unknown_modes_are_named(small_config, bad):
    with pytest.raises(ValueError, match=next(iter(bad.values()))):
        ex.CustomTrainer(
            dataclasses.replace(small_config, **bad), ex.CustomSAE(32, 128, ex.randomness(0)), 0
        )


def test_batches_are_a_function_of_seed_and_step_and_cover_an_epoch():
    acts = torch.arange(40, dtype=torch.float16)[:, None].expand(40, 3)
    shard = {"acts": acts, "domain": (torch.arange(40) % 2).to(torch.uint8)}
    buffer = ex.ActivationBuffer([shard, shard], 100)  # room for more than there is
    z, domain = buffer.batch(7, 3, 16)
    buffer.batch(7, 9, 16)
    again, _ = buffer.batch(7, 3, 16)
    assert torch.equal(z, again)
    seen = torch.cat([buffer.batch(1, step, 16)[0][:, 0] for step in range(5)]) * buffer.scale
    assert sorted(seen.round().tolist()) == sorted([*range(40), *range(40)])
    assert torch.equal((z[:, 0] * buffer.scale).round().long() % 2, domain)
    assert float(buffer.acts_ND.float().square().sum(1).mean()) == pytest.approx(buffer.scale**2)
    assert not torch.equal(buffer.batch(1, 0, 16)[0], buffer.batch(1, 5, 16)[0])


def test_shares_make_up_the_batch_and_mislabelled_ones_keep_their_tokens():
    z = torch.randn(80, 4, generator=ex.randomness("shares")).half()
    buffer = ex.ActivationBuffer([{"acts": z, "domain": torch.arange(80) % 2}], len(z))
    whole = buffer.batch(7, 3, 16)
    halves = [buffer.batch(7, 3, 16, share) for share in (slice(0, 8), slice(8, 16))]
    for part, both in zip(whole, zip(*halves)):
        torch.testing.assert_close(torch.cat(both), part, rtol=0, atol=0)
    mixed = buffer.batch(7, 3, 16, mislabelled=True)
    assert torch.equal(mixed[0], whole[0])
    torch.testing.assert_close(buffer.batch(7, 3, 16, slice(8, 16), True)[1], mixed[1][8:])


def test_mislabelled_stretches_are_as_many_and_as_steady_as_the_true_ones():
    n, stretch = 40, ex.ActivationBuffer.STRETCH
    z = torch.arange(n * stretch)[:, None] // stretch + 1  # every token tells its stretch
    true = (z[:, 0] % 3 == 0).long()
    buffer = ex.ActivationBuffer([{"acts": z.half(), "domain": true}], len(z))
    given = torch.zeros(n + 1, 2)
    for step in range(2 * n):  # two epochs
        z_BD, domain = buffer.batch(5, step, stretch, mislabelled=True)
        stretch_B = (z_BD[:, 0] * buffer.scale).round().long()
        given += torch.zeros_like(given).index_put_((stretch_B, domain), torch.ones(stretch), True)
    assert given[1:].sum(1).tolist() == [2 * stretch] * n
    assert bool((given[1:] == 0).any(1).all())  # a stretch keeps its label
    assert int((given[1:, 1] > 0).sum()) == n // 3  # as many of each domain
    assert not torch.equal((given[1:, 1] > 0).long(), true[::stretch])
