"""The activation buffer: half precision, one scale, batches that depend on seed and step alone."""

import pytest
import torch
from tiny_substrate import TinySource, tiny_substrate

from experiment import ActivationBuffer
from lab.console import UserError
from lab.language_model import LanguageModel
from lab.storage import randomness


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
    z, _ = buffer.batch(0, 0, len(buffer))
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


def test_batches_are_a_function_of_seed_and_step_and_cover_an_epoch():
    acts = torch.arange(40, dtype=torch.float16)[:, None].expand(40, 3)
    shard = {"acts": acts, "domain": (torch.arange(40) % 2).to(torch.uint8)}
    buffer = ActivationBuffer([shard, shard], 100)  # room for more than there is
    z, domain = buffer.batch(7, 3, 16)
    buffer.batch(7, 9, 16)
    repeated, _ = buffer.batch(7, 3, 16)
    assert torch.equal(z, repeated)
    epoch = torch.cat([buffer.batch(1, step, 16)[0][:, 0] for step in range(5)]) * buffer.scale
    assert sorted(epoch.round().tolist()) == sorted([*range(40), *range(40)])
    assert torch.equal((z[:, 0] * buffer.scale).round().long() % 2, domain)
    assert not torch.equal(buffer.batch(1, 0, 16)[0], buffer.batch(1, 5, 16)[0])
    assert not torch.equal(buffer.batch(1, 0, 16)[0], buffer.batch(2, 0, 16)[0])


def test_the_shares_of_processes_make_up_the_batch():
    z = torch.randn(80, 4, generator=randomness("shares")).half()
    buffer = ActivationBuffer([{"acts": z, "domain": torch.arange(80) % 2}], len(z))
    whole = buffer.batch(7, 3, 16)
    halves = [buffer.batch(7, 3, 16, share) for share in (slice(0, 8), slice(8, 16))]
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
