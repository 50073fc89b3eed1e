"""The trainer: what is differentiated, α's one way, sparsity, grouping, new lives, checkpoints."""

import concurrent.futures
import dataclasses
import math
import threading

import pytest
import torch
from conftest import planted_activations

from experiment import (
    MODES,
    CustomSAE,
    CustomSAEConfig,
    CustomTrainer,
    active_set_loss,
    checkpoint_due,
    firing,
    frame_loss,
    partners,
    sharing,
    use_loss,
)
from lab.console import UserError
from lab.distributed import Processes
from lab.storage import randomness, read_tensors, write_tensors

TERMS = ("fit", "l1", "l_dir", "l_use")


def new_trainer(config, z, seed=0, kind=CustomTrainer, screen=None, **options):
    sae = CustomSAE(32, config.expansion * 32, randomness("weights", seed), screen)
    sae.initialize_biases_(z[: config.batch_size], 2 * config.target_l0)
    return kind(config, sae, seed, **options)


def run(config, seed=0, steps=None, alpha=None):
    z, domain = planted_activations(8192)
    trainer = new_trainer(config, z, seed)
    if alpha is not None:
        trainer.alpha = alpha
    for t in range(steps or config.steps):
        terms = trainer.step(*batch(z, domain, t, config.batch_size))
    return trainer, terms


def batch(z, domain, t, size=256):
    part = torch.arange(t * size, (t + 1) * size) % len(z)
    return z[part], domain[part]


# -- What is differentiated ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_and_keeps_unit_rows(small_config, mode):
    config = dataclasses.replace(small_config, orthogonality=mode)
    trainer, terms = run(config)
    _, first = run(config, steps=1)
    assert terms["fit"] < 0.9 * first["fit"]
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(128), atol=1e-5, rtol=0)
    assert (terms["l_dir"] > 0) == (mode != "off")
    assert (terms["l_use"] > 0) == (mode == "adaptive")


@pytest.mark.parametrize("mode", MODES)
def test_the_logged_loss_is_the_sum_of_its_logged_terms(small_config, mode):
    trainer, terms = run(dataclasses.replace(small_config, orthogonality=mode, eta=3.0))
    assert terms["loss"] == pytest.approx(
        terms["fit"] + terms["lambda"] * terms["l1"]
        + terms["alpha"] * terms["ramp"] * (terms["l_dir"] + 3.0 * terms["l_use"]), rel=1e-5)


class Watched(CustomTrainer):
    """Keeps the loss that is differentiated, and counts how often α is read."""

    differentiated = None
    alpha_reads = 0

    @property
    def alpha(self):
        self.alpha_reads += 1
        return self.__dict__["alpha"]

    @alpha.setter
    def alpha(self, value):
        self.__dict__["alpha"] = value

    def backward_(self, loss):
        self.differentiated = float(loss.detach())
        super().backward_(loss)


@pytest.mark.parametrize("mode", MODES)
def test_the_differentiated_loss_is_the_logged_loss(small_config, mode):
    """At steps at which L_dir is computed and at those at which its gradient is held."""
    z, domain = planted_activations(8192)
    trainer = new_trainer(dataclasses.replace(small_config, orthogonality=mode), z, kind=Watched)
    for t in range(20):
        terms = trainer.step(*batch(z, domain, t))
        assert trainer.differentiated == pytest.approx(terms["loss"], rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_alpha_is_read_once_a_step(small_config, mode):
    z, domain = planted_activations(8192)
    config = dataclasses.replace(small_config, orthogonality=mode, resample_every=5)
    trainer = new_trainer(config, z, kind=Watched)
    for t in range(25):  # groupings, new lives and held gradients included
        trainer.alpha_reads = 0
        trainer.step(*batch(z, domain, t))
        assert trainer.alpha_reads == 1


class Pretended(Processes):
    """One of two processes, each a thread of its own; what is summed is met at a barrier."""

    size, device = 2, torch.device("cpu")

    def __init__(self, rank, barrier, parts):
        self.rank, self.barrier, self.parts = rank, barrier, parts

    @classmethod
    def pair(cls):
        barrier, parts = threading.Barrier(2, timeout=30), [None, None]
        return [cls(rank, barrier, parts) for rank in (0, 1)]

    def share(self, n):
        return slice(self.rank * n // 2, (self.rank + 1) * n // 2)

    def exchanged(self, part):
        self.parts[self.rank] = part.detach().clone()
        self.barrier.wait()
        parts = [other.clone() for other in self.parts]
        self.barrier.wait()
        return parts

    def sum_(self, part):
        return part.data.copy_(sum(self.exchanged(part))) if part.numel() else part

    def same_(self, part):
        return part.data.copy_(self.exchanged(part)[0])


def in_two_threads(work):
    """`work(processes)` of both; what they return."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done = [pool.submit(work, processes) for processes in Pretended.pair()]
    errors = [one.exception() for one in done if one.exception()]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error  # the one for which the other waited
    return [one.result() for one in done]


@pytest.mark.parametrize(("mode", "activation"), [*((mode, "relu") for mode in MODES),
                                                  ("adaptive", "batch_topk")])
def test_the_losses_that_two_processes_differentiate_add_up_to_the_logged_loss(small_config, mode,
                                                                               activation):
    z, domain = planted_activations(8192)
    config = dataclasses.replace(small_config, orthogonality=mode, activation=activation)

    def work(processes):
        trainer = new_trainer(config, z, kind=Watched, processes=processes)
        lines = []
        for t in range(14):
            z_BD, domain_B = batch(z, domain, t)
            share = processes.share(256)
            terms = trainer.step(z_BD[share], domain_B[share])
            lines.append((trainer.differentiated, terms))
        return trainer, lines

    (first, ours), (second, theirs) = in_two_threads(work)
    alone = new_trainer(config, z, kind=Watched)
    for t, ((one, terms), (other, same)) in enumerate(zip(ours, theirs)):
        assert terms == same
        assert one != other  # each its part
        assert one + other == pytest.approx(terms["loss"], rel=1e-5)
        whole = alone.step(*batch(z, domain, t))
        assert {name: terms[name] for name in TERMS} == pytest.approx(
            {name: whole[name] for name in TERMS}, rel=1e-3, abs=1e-5)
    for name, part in first.sae.state_dict().items():
        assert torch.equal(part, second.sae.state_dict()[name])
        torch.testing.assert_close(part, alone.sae.state_dict()[name], rtol=0, atol=2e-3)


def plain_direction(W, f, trainer):
    """L_dir by its definition, from the whole Gram matrix in float64."""
    F, D = W.shape
    mode = trainer.row.orthogonality
    cosine, identity = W @ W.T, torch.eye(F, dtype=torch.float64)
    if mode == "max_cosine":
        return (cosine - 9 * identity).max(dim=1).values.square().mean()
    if mode == "gram_encoder":
        return (cosine - identity).square().sum() * D / F**2
    frame = ((1 - identity) * cosine.square()).sum() * D / F**2
    if mode == "adaptive":
        fires = (f[:: trainer.row.batch_size // trainer.row.direction_tokens] > 0).double()
        together = (fires / fires.sum(1, keepdim=True)).T @ fires / len(fires)
        active = (together * (1 - identity) * cosine.square()).sum()
        return active + trainer.row.all_pairs * frame
    return frame


def plain_use(f, domain, trainer):
    """L_use by its definition: how much a feature is used has no slope, for which domain has."""
    share = trainer.state["share_F"].double()
    forget, retain = (f[domain == k].mean(0) for k in (0, 1))
    both = forget + retain
    kept = (1 - share) * both.detach() / both.sum().detach()
    return (kept * 4 * forget * retain / both.clamp(min=1e-12) ** 2).sum()


def plain_loss(parts, trainer, z, domain):
    """The objective, dense and in float64."""
    W_enc, b_enc, W_dec, b_dec = (parts[name] for name in ("W_enc_FD", "b_enc", "W_dec", "b_dec"))
    f = torch.relu((z - b_dec) @ W_enc.T + b_enc)
    loss = (z - f @ W_dec - b_dec).norm(dim=1).mean()
    loss = loss + trainer.state["log_sparsity"].exp() * f.sum(1).mean()
    row = trainer.row
    if row.orthogonality == "off":
        return loss
    W = W_enc if row.orthogonality == "gram_encoder" else W_dec
    W = torch.where((f > 0).any(0)[:, None], W, W.detach())  # what is silent is not turned
    apart = plain_direction(W, f, trainer)
    if row.orthogonality == "adaptive":
        apart = apart + row.eta * plain_use(f, domain, trainer)
    return loss + trainer.alpha * apart


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("screen", ["float32", "int8"])
@pytest.mark.parametrize("mode", MODES)
def test_a_steps_gradients_equal_the_plain_dense_float64_ones(small_config, mode, screen,
                                                              precision):
    """To rounding; where L_dir's products are in bfloat16, to a hundredth of its own gradient."""
    config = dataclasses.replace(small_config, orthogonality=mode, alpha=0.3, steps=1000,
                                 ramp_fraction=0.01, regroup_every=10**6, direction_tokens=100)
    z, domain = planted_activations(256)
    trainer = new_trainer(config, z, seed=1, screen=screen)
    sae = trainer.sae
    with torch.no_grad():
        sae.b_enc.add_(1e-3)  # or a token of each feature is active by rounding alone
        sae.b_enc[:9] = -10.0
    trainer.step_count, trainer.direction_dtype = 560, precision
    trainer.state["l0"].fill_(12.0)
    trainer.state["share_F"] = torch.linspace(1, 0, 128)
    assert trainer.is_sparse()
    assert trainer.ramp() == 1
    # L_use is taken at the running means: let them be this batch's
    code = sae.sparse_code(z)
    trainer.update_use_(trainer.seen(code, domain))
    before = {name: part.detach().double().requires_grad_()
              for name, part in sae.named_parameters()}
    loss = plain_loss(before, trainer, z.double(), domain)
    loss.backward()
    along = (before["W_dec"].grad * before["W_dec"]).sum(1, keepdim=True)
    before["W_dec"].grad -= along.detach() * before["W_dec"].detach()
    terms = trainer.step(z, domain)
    rounded = precision == torch.bfloat16 and mode in ("fixed", "adaptive")
    assert terms["loss"] == pytest.approx(loss.item(), rel=1e-3 if rounded else 1e-5)
    pull = trainer.alpha * trainer.state["pull_FD"].abs().max().item() if rounded else 0.0
    for name, part in sae.named_parameters():
        torch.testing.assert_close(part.grad.double(), before[name].grad, rtol=1e-3,
                                   atol=2e-6 + 0.01 * pull)


def test_a_held_gradient_turns_features_as_the_one_that_was_computed(small_config):
    """The same SAE and batch: between two computations the gradient is the held one, masked."""
    config = dataclasses.replace(small_config, orthogonality="fixed", alpha=0.5, ramp_fraction=0.0)
    z, domain = planted_activations(8192)
    trainer = new_trainer(config, z)
    trainer.step(*batch(z, domain, 0))
    pull_FD = trainer.state["pull_FD"].clone()
    with torch.no_grad():
        trainer.sae.b_enc[:5] = -10.0  # silent
    fired_F = torch.arange(128) >= 5
    term = trainer.direction_term(None, fired_F)
    assert term.item() == pytest.approx(trainer.state["l_dir"].item())
    gradient = torch.autograd.grad(term, trainer.sae.W_dec)[0]
    assert torch.equal(gradient, pull_FD * fired_F[:, None])
    assert torch.equal(trainer.state["pull_FD"], pull_FD)


def test_the_direction_term_lowers_the_frame_potential(small_config):
    potentials = {}
    for mode, alpha in (("off", 0.0), ("fixed", 0.5)):
        trainer, _ = run(dataclasses.replace(small_config, orthogonality=mode, alpha=alpha))
        potentials[mode] = frame_loss(trainer.sae.W_dec).item()
    assert potentials["fixed"] < potentials["off"] - 0.02


def test_the_use_term_separates_use(small_config):
    """Where nothing is shared."""
    l_use = {}
    for eta in (0.0, 10.0):
        config = dataclasses.replace(small_config, alpha=0.1, eta=eta, share_use=0.0, steps=150)
        use = run(config)[0].running_use()
        l_use[eta] = float(use_loss(use, use))
    assert l_use[10.0] < 0.5 * l_use[0.0]


# -- BatchTopK -------------------------------------------------------------------------------------


def test_batch_topk_has_its_l0_in_every_batch_no_l1_and_about_its_l0_without_a_batch(small_config):
    z, domain = planted_activations(8192)
    config = dataclasses.replace(small_config, activation="batch_topk", steps=200)
    trainer = new_trainer(config, z, kind=Watched)
    for t in range(200):
        terms = trainer.step(*batch(z, domain, t))
        assert terms["l0"] == pytest.approx(8.0, abs=0.01)  # there are no ties
        assert terms["lambda"] == 0
        assert trainer.differentiated == pytest.approx(
            terms["fit"] + terms["alpha"] * terms["ramp"] * (
                terms["l_dir"] + config.eta * terms["l_use"]), rel=1e-5)
    sae = trainer.exported(7.0)
    f = sae.encode(7 * planted_activations(2000)[0])  # another sample of the same world
    assert float((f > 0).sum(1).float().mean()) == pytest.approx(8.0, rel=0.05)
    assert float(f[f > 0].min()) > sae.threshold == pytest.approx(
        7 * float(trainer.state["threshold"]))
    assert sae.threshold == pytest.approx(7 * float(trainer.state["limit"]), rel=0.1)
    assert int((trainer.state["silent_F"] < 50).sum()) > 100


def test_a_feature_that_is_woken_fires_above_the_threshold_of_batch_topk(small_config):
    z, domain = planted_activations(8192)
    config = dataclasses.replace(small_config, activation="batch_topk", resample_every=1000)
    trainer = new_trainer(config, z)
    for t in range(30):
        trainer.step(*batch(z, domain, t))
    trainer.state["silent_F"][[3, 9]] = 1000
    trainer.state["threshold"].fill_(2.0)  # above all that it would reach
    z_BD, _ = batch(z, domain, 31)
    with torch.no_grad():
        trainer.resample_(z_BD, trainer.sae.dense_code(z_BD))
        above = trainer.sae.encode(z_BD)[:, [3, 9]] > trainer.state["threshold"]
    assert bool(above.any(0).all())
    assert float(above.float().mean()) < 0.2


# -- α has one way ---------------------------------------------------------------------------------


def test_a_changed_alpha_trains_differently_and_is_what_is_recorded(small_config):
    a, terms_a = run(small_config)
    b, terms_b = run(small_config, alpha=0.7)
    again, _ = run(dataclasses.replace(small_config, alpha=0.7))
    assert a.config["alpha"] == small_config.alpha == terms_a["alpha"]
    assert b.config["alpha"] == 0.7 == terms_b["alpha"]
    assert not torch.equal(a.sae.W_dec, b.sae.W_dec)
    assert torch.equal(b.sae.W_dec, again.sae.W_dec)  # it is α that counts, not where it was set
    assert b.state_dict()[1]["alpha"] == 0.7


def test_alpha_changed_during_training_acts_from_the_next_step_on(small_config):
    z, domain = planted_activations(8192)
    config = dataclasses.replace(small_config, orthogonality="fixed", ramp_fraction=0.0)
    trainer = new_trainer(config, z)
    trainer.step(*batch(z, domain, 0))
    trainer.alpha = 0.9
    terms = trainer.step(*batch(z, domain, 1))
    assert terms["loss"] == pytest.approx(
        terms["fit"] + terms["lambda"] * terms["l1"] + 0.9 * terms["l_dir"], rel=1e-5)
    assert trainer.config["alpha"] == terms["alpha"] == 0.9


def test_the_config_is_the_row_with_the_trainers_alpha_and_widths(small_config):
    trainer = new_trainer(small_config, planted_activations(256)[0], seed=5)
    trainer.alpha = 0.123
    assert trainer.config == {**dataclasses.asdict(small_config), "alpha": 0.123, "d_in": 32,
                              "d_sae": 128, "seed": 5}


def test_alpha_ramps_up_over_the_first_part_of_training(small_config):
    config = dataclasses.replace(small_config, steps=100, ramp_fraction=0.2)
    trainer, ramps = new_trainer(config, planted_activations(256)[0]), []
    for t in (0, 5, 10, 20, 99):
        trainer.step_count = t
        ramps.append(trainer.ramp())
    assert ramps == pytest.approx([0, 0.25, 0.5, 1, 1])


# -- Sparsity and learning rate --------------------------------------------------------------------


@pytest.mark.parametrize("target", [4.0, 12.0])
def test_the_controller_meets_the_target_sparsity(small_config, target):
    config = dataclasses.replace(small_config, orthogonality="off", alpha=0.0, steps=700,
                                 target_l0=target, resample_every=150)
    trainer, _ = run(config)
    assert trainer.state["l0"].item() == pytest.approx(target, rel=0.05)


def test_the_sparsity_penalty_moves_by_a_bounded_step(small_config):
    """Up where too many features are active, down where too few, not at all on target."""
    rate, target = small_config.sparsity_rate, small_config.target_l0
    for l0, move in ((1e6, rate), (0.0, -rate), (target, 0.0)):
        trainer = new_trainer(small_config, planted_activations(256)[0])
        trainer.state["l0"].fill_(target)
        before = trainer.state["log_sparsity"].item()
        trainer.update_sparsity_(torch.tensor(l0))
        assert trainer.state["log_sparsity"].item() - before == pytest.approx(move)


def test_the_learning_rate_warms_up_and_decays(small_config):
    config = dataclasses.replace(small_config, steps=100, warmup_steps=10, decay_fraction=0.2)
    trainer, rates = new_trainer(config, planted_activations(256)[0]), []
    for t in (0, 9, 50, 80, 90, 99):
        trainer.step_count = t
        rates.append(trainer.learning_rate() / config.learning_rate)
    assert rates == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])


# -- Groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "expected"), [(20, [12, 20, 40, 60]), (50, [12, 50])])
def test_features_are_first_grouped_when_alpha_is_at_its_full_strength(small_config, every,
                                                                       expected):
    """Whatever the interval."""
    trainer, _ = run(dataclasses.replace(small_config, regroup_every=every, ramp_fraction=0.2))
    assert [line["step"] for line in trainer.history if "kappa_median" in line] == expected


def test_the_use_term_begins_with_the_first_grouping(small_config):
    config = dataclasses.replace(small_config, ramp_fraction=0.2)
    _, before = run(config, steps=12)
    _, after = run(config, steps=13)
    assert before["l_use"] == 0 < after["l_use"]


@pytest.mark.parametrize("part", [0.0, 0.4])
def test_l_dir_is_of_the_active_sets_of_some_tokens_and_in_part_of_all_pairs(small_config, part):
    config = dataclasses.replace(small_config, direction_tokens=100, direction_every=1,
                                 all_pairs=part)
    z, domain = planted_activations(8192)
    trainer = new_trainer(config, z)
    for t in range(20):
        z_BD, domain_B = batch(z, domain, t)
        sae = trainer.sae
        with torch.no_grad():
            lists = sae.dense_code(z_BD).lists(48)[::2]
            expected = active_set_loss(sae.W_dec, lists) + part * frame_loss(sae.W_dec)
        assert trainer.step(z_BD, domain_B)["l_dir"] == pytest.approx(float(expected), rel=1e-3)


def test_before_a_grouping_the_last_tokens_are_listed_and_after_it_forgotten(small_config):
    """Eight batches; before the first grouping, at step 12, and those at 40 and 60."""
    config = dataclasses.replace(small_config, regroup_every=20, counted_tokens=2048)
    z, domain = planted_activations(8192)
    trainer, kept = new_trainer(config, z), []
    for t in range(60):
        trainer.step(*batch(z, domain, t))
        kept.append(len(trainer.state["lists_RL"]) // 256)
    window = [*range(1, 8), 0]
    assert kept == [0] * 4 + window + window + [0] * 12 + window + [0] * 12 + window


def test_a_grouping_shares_and_judges_by_the_listed_tokens_and_the_running_use(small_config):
    """Against whole matrices: ω, what partners have of it, and κ with the first seven."""
    config = dataclasses.replace(small_config, share_use=0.8, counted_tokens=1024, group_size=9)
    z, domain = planted_activations(8192)
    trainer, kept = new_trainer(config, z), {}
    regroup_ = trainer.regroup_

    def watched():
        kept["lists"] = trainer.state["lists_RL"].long()
        regroup_()

    trainer.regroup_ = watched
    for t in range(12):
        trainer.step(*batch(z, domain, t))
    counted = firing(kept["lists"].int(), 128)
    found = partners(counted, 9)
    share = 0.8 * sharing(found, counted.fired_F, trainer.running_use(), config.share_even)
    torch.testing.assert_close(trainer.state["share_F"], share.float())
    assert float(share.min()) < 0.7 < float(share.max())
    fires = torch.zeros(1024, 129, dtype=torch.float64).scatter_(1, kept["lists"], 1.0)[:, 1:]
    omega = (fires / fires.sum(1, keepdim=True).clamp(min=1)).T @ fires
    omega.fill_diagonal_(0)
    (line,) = (line for line in trainer.history if "held" in line)
    assert line["held"] == pytest.approx(float(omega[found.row_N, found.column_N].sum()
                                               / omega.sum()))
    W, kappas = trainer.sae.W_dec.detach().double(), []
    for i in range(128):
        values = torch.linalg.svdvals(W[[i, *found.column_N[found.row_N == i].tolist()[:7]]])
        kappas.append(float(values[0] / values[-1]))
    assert line["kappa_max"] == pytest.approx(max(kappas), rel=1e-4)
    assert line["kappa_median"] == pytest.approx(sorted(kappas)[63], rel=1e-4)


def test_a_grouping_tells_how_stable_and_how_complete_its_partners_are(small_config):
    """In the planted world features fire together by what they share, in part at least."""
    trainer, _ = run(dataclasses.replace(small_config, counted_tokens=5120))
    for line in (line for line in trainer.history if "stability" in line):
        assert 0 < line["stability"] <= 1
        assert 0 < line["held"] <= 1
        assert 0 < line["share_use"] <= 1
        assert 0 < line["partners"] <= small_config.group_size
        assert 1 <= line["kappa_median"] <= line["kappa_p90"] <= line["kappa_max"]


# -- New lives -------------------------------------------------------------------------------------


def test_dead_features_are_given_a_new_life(small_config):
    config = dataclasses.replace(small_config, orthogonality="off", alpha=0.0, steps=100)
    z, domain = planted_activations(8192)
    trainer = new_trainer(config, z)
    with torch.no_grad():
        trainer.sae.b_enc[:40] = -50.0
    for t in range(60):
        trainer.step(*batch(z, domain, t))
    assert int((trainer.state["silent_F"][:40] > 20).sum()) < 8
    W_dec = trainer.sae.W_dec[:40].detach()
    assert float((W_dec @ W_dec.T - torch.eye(40)).max()) < 0.999  # no twins


def test_newborn_features_have_no_past(small_config):
    """No moments, silence, use, share, pull nor places in lists: these are of what they were."""
    z, domain = planted_activations(8192)
    trainer = new_trainer(small_config, z)
    trainer.first_grouping = 16
    for t in range(15):
        trainer.step(*batch(z, domain, t))
    born = torch.tensor([3, 77])
    trainer.state["silent_F"][born] = small_config.resample_every
    listed = trainer.state["lists_RL"].clone()
    of_born = (listed == 4) | (listed == 78)
    assert {4, 78} <= set(listed.unique().tolist())
    use = trainer.state["use_KF"].clone()
    trainer.state["share_F"].fill_(0.5)
    pull_FD = trainer.state["pull_FD"].clone()
    z_BD, domain_B = batch(z, domain, 15)
    code = trainer.sae.dense_code(z_BD)
    with torch.no_grad():
        trainer.resample_(z_BD, code)
    old = torch.ones(128, dtype=torch.bool)
    old[born] = False
    assert torch.equal(trainer.state["lists_RL"], listed.masked_fill(of_born, 0))
    assert torch.equal(trainer.state["use_KF"], use * old)
    assert float(pull_FD[born].norm(dim=1).min()) > 0
    assert torch.equal(trainer.state["pull_FD"], pull_FD * old[:, None])
    assert torch.equal(trainer.state["share_F"], torch.where(old, 0.5, small_config.share_use))
    assert trainer.state["silent_F"][born].tolist() == [0, 0]
    for parameter in (trainer.sae.W_enc_FD, trainer.sae.b_enc, trainer.sae.W_dec):
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = trainer.optimizer.state[parameter][moment]
            assert float(kept[born].abs().max()) == 0
            assert float(kept[old].abs().max()) > 0


# -- Checkpoints and odd numbers -------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "activation"), [("adaptive", "relu"), ("gram_encoder", "relu"),
                                                  ("adaptive", "batch_topk")])
def test_a_checkpoint_continues_to_the_last_bit(small_config, tmp_path, mode, activation):
    z, domain = planted_activations(8192)
    config = dataclasses.replace(small_config, orthogonality=mode, activation=activation)
    whole, first, second = (new_trainer(config, z) for _ in range(3))
    whole.alpha = first.alpha = 0.3
    for t in range(60):
        whole.step(*batch(z, domain, t))
    for t in range(37):
        first.step(*batch(z, domain, t))
    write_tensors(tmp_path / "state.safetensors", *first.state_dict())
    second.load_state_dict(*read_tensors(tmp_path / "state.safetensors"))
    for t in range(37, 60):
        second.step(*batch(z, domain, t))
    a, b = whole.state_dict(), second.state_dict()
    assert a[1] == b[1]
    assert len(first.state["lists_RL"]) > 0  # it was amid counting
    for name, part in a[0].items():
        assert torch.equal(part, b[0][name]), name


def test_a_checkpoint_of_two_processes_continues_to_the_last_bit_with_two_and_goes_on_with_one(
        small_config, tmp_path):
    z, domain = planted_activations(8192)

    def steps(trainer, first, last):
        share = trainer.processes.share(256)
        for t in range(first, last):
            z_BD, domain_B = batch(z, domain, t)
            trainer.step(z_BD[share], domain_B[share])
        return trainer.state_dict()

    def whole(processes):
        return steps(new_trainer(small_config, z, processes=processes), 0, 45)

    def begin(processes):
        made = steps(new_trainer(small_config, z, processes=processes), 0, 37)
        if not processes.rank:
            write_tensors(tmp_path / "state.safetensors", *made)
        return made

    def go_on(processes):
        trainer = new_trainer(small_config, z, processes=processes)
        trainer.load_state_dict(*read_tensors(tmp_path / "state.safetensors"))
        return steps(trainer, 37, 45)

    (tensors, note), _ = in_two_threads(whole)
    begun, _ = in_two_threads(begin)
    assert len(begun[0]["state.lists_RL"]) == 5 * 256
    (again, same), _ = in_two_threads(go_on)
    assert same == note
    for name, part in tensors.items():
        assert torch.equal(part, again[name]), name
    alone, line = go_on(Processes())
    assert len(line["history"]) == len(note["history"])
    assert line["history"][-1]["held"] == pytest.approx(note["history"][-1]["held"], rel=0.05)
    torch.testing.assert_close(alone["sae.W_dec"], tensors["sae.W_dec"], rtol=0, atol=5e-3)


def test_checkpoints_are_due_at_the_end_and_not_shortly_before_it():
    config = CustomSAEConfig(steps=600, checkpoint_every=250)
    assert [step for step in range(1, 601) if checkpoint_due(config, step)] == [250, 600]
    config = CustomSAEConfig(steps=500, checkpoint_every=250)
    assert [step for step in range(1, 501) if checkpoint_due(config, step)] == [250, 500]


def test_a_non_finite_loss_stops_the_run_with_its_terms(small_config):
    z, domain = planted_activations(256)
    trainer = new_trainer(small_config, z)
    z[3, 4] = math.inf
    with pytest.raises(UserError, match=r"non-finite loss at step 0, seed 0: .*fit"):
        trainer.step(z, domain)


def test_a_line_of_the_curves_says_where_it_is(small_config):
    trainer = new_trainer(small_config, planted_activations(256)[0], seed=4)
    trainer.step_count = 7
    trainer.note({"loss": 1.0})
    assert trainer.history == [{"seed": 4, "step": 7, "tokens": 7 * 256, "loss": 1.0}]
