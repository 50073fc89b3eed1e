"""The activation buffer: half precision, one scale, batches that depend on seed and step alone."""

import pytest
import torch
from tiny_substrate import TinySource, tiny_substrate

from experiment import ActivationBuffer
from lab.console import UserError
from lab.language_model import LanguageModel
from lab.storage import randomness
from lab.substrates.texts import FORGET, RETAIN


@pytest.fixture
def tiny(tmp_path, processor):
    """In float32, so that what must be equal is."""
    processor(bfloat16=False)
    return tiny_substrate(tmp_path)


def again(substrate):
    """The same substrate, asked by another run."""
    return type(substrate)(substrate.source, substrate.sizes, substrate.cache, substrate.processes)


def read(substrate):
    return ActivationBuffer.read(substrate, shard_tokens=256)


def distort(monkeypatch, change_):
    """What the language model gives is changed in place before anybody sees it."""
    residual = LanguageModel.residual

    def distorted(lm, tokens, layout=None):
        x = residual(lm, tokens, layout)
        change_(x)
        return x

    monkeypatch.setattr(LanguageModel, "residual", distorted)


def test_it_holds_the_residuals_of_all_contexts_with_their_domains(tiny):
    buffer = read(tiny)
    tokens, domain = tiny.learn
    assert buffer.acts_ND.dtype == torch.float16
    assert len(buffer) == tokens.numel()  # no sinks in a random model
    x = tiny.lm.residual(tokens)
    torch.testing.assert_close(buffer.acts_ND.float(), x.reshape(-1, 32), atol=1e-2, rtol=2e-3)
    assert torch.equal(buffer.domain_N.view(len(tokens), -1)[:, 0], domain)
    assert 0 < float(domain.float().mean()) < 1
    assert not torch.equal(domain, domain.sort().values)  # documents are mixed


def test_the_scale_is_the_root_mean_square_norm(tiny):
    buffer = read(tiny)
    mean_square = float(buffer.acts_ND.double().square().sum(1).mean())
    assert buffer.scale == pytest.approx(mean_square**0.5)
    n_forget = int((buffer.domain_N == FORGET).sum())
    z, _ = buffer.batch(0, 0, len(buffer), n_forget / len(buffer))  # each token once
    assert float(z.square().sum(1).mean()) == pytest.approx(1, rel=1e-5)


def test_activations_come_from_the_cache_the_second_time(tiny, monkeypatch):
    first = read(tiny)
    monkeypatch.setattr(TinySource, "load_model", lambda *_: pytest.fail("the model was run"))
    second = read(again(tiny))
    assert torch.equal(first.acts_ND, second.acts_ND)
    assert first.scale == second.scale


def test_a_damaged_shard_is_rebuilt_alone(tiny):
    first = read(tiny)
    shards = sorted((tiny.cache.root / "tiny" / "activations").iterdir())
    times = [path.stat().st_mtime_ns for path in shards]
    data = bytearray(shards[2].read_bytes())
    data[-5] ^= 1
    shards[2].write_bytes(bytes(data))
    assert torch.equal(read(again(tiny)).acts_ND, first.acts_ND)
    after = [path.stat().st_mtime_ns for path in shards]
    assert [a == b for a, b in zip(times, after)].count(False) == 1


def test_attention_sinks_are_left_out(tiny, monkeypatch):
    distort(monkeypatch, lambda x: x[:, 0].mul_(1000))
    tokens, _ = tiny.learn
    buffer = read(tiny)
    assert len(buffer) == tokens.numel() - len(tokens)
    assert float(buffer.acts_ND.float().norm(dim=1).max()) < 10 * buffer.scale


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_residuals_that_are_not_finite_are_named_and_never_kept(tiny, monkeypatch, bad):
    tiny.sink_norm  # noqa: B018 - of sound residuals
    distort(monkeypatch, lambda x: x[:, 2].fill_(bad))
    with pytest.raises(UserError, match="^the language model gives residuals that are not finite$"):
        read(tiny)
    assert not list(tiny.cache.root.rglob("activations/*"))


@pytest.mark.parametrize(("size", "dtype"), [(1.0, torch.float16), (1e4, torch.bfloat16)])
def test_residuals_beyond_the_range_of_float16_are_kept_in_bfloat16(tiny, monkeypatch, size, dtype):
    distort(monkeypatch, lambda x: x.mul_(size))
    buffer = read(tiny)
    assert buffer.acts_ND.dtype == dtype
    assert len(buffer) == tiny.learn.tokens_NT.numel()
    x = tiny.lm.residual(tiny.learn.tokens_NT).reshape(-1, 32)
    torch.testing.assert_close(buffer.acts_ND.float(), x, atol=1e-2 * size, rtol=1e-2)


def numbered(n_forget, n_retain):
    """Tokens that hold their number, forget text at every third place as long as there is any."""
    n = n_forget + n_retain
    domain = torch.full((n,), RETAIN, dtype=torch.uint8)
    domain[torch.arange(n).argsort(stable=True)[::3][:n_forget]] = FORGET
    assert int((domain == FORGET).sum()) == n_forget
    acts = torch.arange(1, n + 1).half()[:, None].expand(n, 3)
    halves = [{"acts": acts[part], "domain": domain[part]}
              for part in (slice(0, n // 2), slice(n // 2, n))]
    return ActivationBuffer(halves, n + 20)  # room for more than there is


def drawn(buffer, seed, steps, size, forget_share):
    """Numbers of the tokens of these batches, by domain."""
    batches = [buffer.batch(seed, step, size, forget_share) for step in steps]
    numbers = torch.cat([z[:, 0] * buffer.scale for z, _ in batches]).round().long()
    domain = torch.cat([domain for _, domain in batches])
    assert torch.equal(buffer.domain_N[numbers - 1].long(), domain)
    return [numbers[domain == k].tolist() for k in (FORGET, RETAIN)]


@pytest.mark.parametrize(("size", "share", "n"), [(10, 0.4, 4), (10, 0.25, 2), (7, 0.4, 3),
                                                  (16, 0.5, 8), (30, 0.9, 27)])
def test_the_forget_share_of_every_batch_is_exact_however_much_forget_text_there_is(size, share, n):
    for forget, retain in ((5, 40), (30, 70)):
        buffer = numbered(forget, retain)
        for step in range(30):
            _, domain = buffer.batch(3, step, size, share)
            assert len(domain) == size
            assert int((domain == FORGET).sum()) == n == round(share * size)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    """Whatever was asked for before, and by which object."""
    one, other = numbered(20, 60), numbered(20, 60)
    batches = {step: one.batch(7, step, 16, 0.4) for step in range(12)}
    for step in (11, 3, 0, 7, 3):
        other.batch(8, step + 1, 16, 0.4)
        for kept, again in zip(batches[step], other.batch(7, step, 16, 0.4)):
            assert torch.equal(kept, again)
    for seed, step in ((7, 1), (8, 0)):
        assert not torch.equal(one.batch(seed, step, 16, 0.4)[0], batches[0][0])


def test_each_domain_is_read_whole_before_any_of_it_comes_again():
    """Forget text of 12 tokens comes six times while the retain text of 48 comes twice."""
    buffer = numbered(12, 48)
    forget, retain = drawn(buffer, 1, range(12), 14, 6 / 14)
    epochs = {FORGET: [forget[at : at + 12] for at in range(0, 72, 12)],
              RETAIN: [retain[at : at + 48] for at in range(0, 96, 48)]}
    assert all(sorted(epoch) == sorted(epochs[FORGET][0]) for epoch in epochs[FORGET])
    assert all(sorted(epoch) == sorted(epochs[RETAIN][0]) for epoch in epochs[RETAIN])
    assert len({*forget}) == 12
    assert len({*retain}) == 48
    first_halves = {tuple(sorted(epoch[:6])) for epoch in epochs[FORGET]}
    assert len(first_halves) > 1, "every epoch has an order of its own"


@pytest.mark.parametrize("n", [1, 3, 7, 12, 31])
def test_batches_go_on_where_the_last_one_ended_across_the_ends_of_epochs(n):
    buffer = numbered(12, 48)
    whole = buffer.stream(1, FORGET, 0, 60).tolist()
    parts = [buffer.stream(1, FORGET, start, n).tolist() for start in range(0, 60 - n + 1, n)]
    assert sum(parts, []) == whole[: n * len(parts)]
    for at in range(0, 60, 12):
        assert sorted(whole[at : at + 12]) == buffer.of[FORGET].tolist()


def test_a_batch_may_hold_more_forget_tokens_than_there_are():
    forget, _ = drawn(numbered(5, 100), 0, range(1), 40, 0.5)
    counts = [forget.count(number) for number in set(forget)]
    assert sorted(counts) == [4] * 5


def test_the_domains_of_a_batch_are_mixed():
    """So that processes that take parts of it get both."""
    _, domain = numbered(20, 60).batch(0, 0, 40, 0.5)
    assert 5 < int((domain[:20] == FORGET).sum()) < 15


def test_the_shares_of_processes_make_up_the_batch():
    z = torch.randn(80, 4, generator=randomness("shares")).half()
    buffer = ActivationBuffer([{"acts": z, "domain": torch.arange(80) % 2}], len(z))
    whole = buffer.batch(7, 3, 16, 0.4)
    halves = [buffer.batch(7, 3, 16, 0.4, share) for share in (slice(0, 8), slice(8, 16))]
    for part, both in zip(whole, zip(*halves)):
        assert torch.equal(torch.cat(both), part)


def test_a_sample_is_raw_of_one_domain_always_the_same_and_no_token_twice():
    acts = torch.arange(1, 81).half()[:, None].expand(80, 3)
    buffer = ActivationBuffer([{"acts": acts, "domain": torch.arange(80) % 2}], 80)
    sample = buffer.sample(1, 30)
    assert torch.equal(sample, buffer.sample(1, 30))
    values = sample[:, 0].tolist()
    assert len(set(values)) == 30
    assert all(value % 2 == 0 for value in values)
    assert len(buffer.sample(0, 1000)) == 40  # all there are
