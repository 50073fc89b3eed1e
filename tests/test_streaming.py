"""Activations that memory does not hold: a window over shards, read ahead, or made on the fly."""

import collections
import dataclasses
import math
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_substrate import WIDTH, TinySource, tiny_substrate

import experiment as ex
from experiment import ActivationBuffer, StreamedBuffer
from lab import shards as shards_module
from lab.console import UserError
from lab.distributed import Interrupts, Processes
from lab.language_model import LanguageModel
from lab.shards import Reader, Shards, Stream, window_sizes
from lab.substrates.texts import FORGET, RETAIN

SHARD = 64  # tokens: four contexts
ONE = 2 * WIDTH * SHARD / 1e9  # gigabytes of a shard


@pytest.fixture
def tiny(tmp_path, processor, monkeypatch):
    """In float32, so that what must be equal is; its shards are never made smaller."""
    processor(bfloat16=False)
    monkeypatch.setattr(shards_module, "AT_LEAST", 1)
    return tiny_substrate(tmp_path / "cache", learn_tokens=1600)


def again(substrate):
    """The same substrate, asked by another run."""
    return type(substrate)(substrate.source, substrate.sizes, substrate.cache, substrate.processes)


def read(substrate, shards=12):
    """With memory for so many shards; 26 hold all there is."""
    return ActivationBuffer.read(substrate, SHARD, shards * ONE)


def rows(x):
    return collections.Counter(map(tuple, x.tolist()))


def batches(buffer, steps, seed=0):
    return [buffer.batch(seed, step, 50, 0.4) for step in steps]


def let_go(buffer):
    with buffer:
        pass


def same(ours, theirs):
    return all(torch.equal(a, b) for one, other in zip(ours, theirs, strict=True)
               for a, b in zip(one, other, strict=True))


@pytest.fixture
def full_disk(monkeypatch):
    """The cache's disk has less room than the activations need."""
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=90_000))


# -- What is in a batch --------------------------------------------------------------------------


def test_all_is_in_memory_where_it_fits_and_streamed_where_it_does_not(tiny):
    n = tiny.learn.tokens_NT.numel()
    held = ActivationBuffer.read(tiny, SHARD, n * 2 * WIDTH / 1e9)
    assert type(held) is ActivationBuffer
    streamed = ActivationBuffer.read(tiny, SHARD, (n - 1) * 2 * WIDTH / 1e9)
    assert type(streamed) is StreamedBuffer
    assert len(streamed) == len(held) == n
    assert streamed.d_in == held.d_in == WIDTH
    assert streamed.scale == pytest.approx(held.scale, rel=1e-9)


@pytest.mark.parametrize("shards", [6, 9, 12, 24])
def test_every_epoch_of_a_domain_uses_each_of_its_tokens_once_in_an_order_of_its_own(tiny, shards):
    held, buffer = ActivationBuffer.read(tiny, SHARD), read(tiny, shards)
    for domain in (FORGET, RETAIN):
        stream, orders = buffer.streams[domain], []
        for seed in (0, 1):
            orders += [stream.take(seed, epoch * len(stream), len(stream))[0] for epoch in range(3)]
        for x in orders:
            assert rows(x) == rows(held.acts_ND[held.domain_N.clamp(max=RETAIN) == domain])
        assert len({str(x.tolist()) for x in orders}) == len(orders)


def test_a_streamed_batch_has_its_forget_share_and_true_labels(tiny):
    held, buffer = ActivationBuffer.read(tiny, SHARD), read(tiny)
    known = [rows(held.acts_ND[held.domain_N == k]) for k in range(buffer.n_domains)]
    assert buffer.n_domains == held.n_domains == 3  # forget text and two kinds of retain text
    for z, domain in batches(buffer, range(20)):
        assert int((domain == FORGET).sum()) == 20
        assert 2 < int((domain[:25] == FORGET).sum()) < 18  # mixed, for processes that share it
        for row, k in zip((z * buffer.scale).half(), domain.tolist()):
            assert tuple(row.tolist()) in known[k]


@pytest.mark.parametrize("shards", [6, 12])
def test_a_streamed_batch_is_a_function_of_seed_and_step_alone(tiny, shards):
    buffer = read(tiny, shards)
    whole = batches(buffer, range(60))
    for step in (59, 3, 31, 0):
        assert same(batches(read(again(tiny), shards), [step]), [whole[step]])
        assert same(batches(buffer, [step]), [whole[step]])
    assert not same(batches(buffer, [3], seed=1), [whole[3]])
    let_go(buffer)
    assert same(batches(buffer, range(60)), whole)


def test_shares_of_processes_make_up_a_streamed_batch(tiny):
    buffer = read(tiny)
    whole = buffer.batch(7, 3, 16, 0.4)
    halves = [buffer.batch(7, 3, 16, 0.4, share) for share in (slice(0, 8), slice(8, 16))]
    assert same([[torch.cat(both) for both in zip(*halves)]], [whole])


def test_a_round_takes_from_every_shard_of_its_window_alike(tiny, monkeypatch):
    stream = read(tiny, 12).streams[RETAIN]
    n = len(stream.shards)
    monkeypatch.setattr(Shards, "read", lambda self, i: {
        "acts": torch.full((stream.tokens[i], WIDTH), float(i)).half(),
        "domain": torch.full((stream.tokens[i],), RETAIN, dtype=torch.uint8)})
    for number in range(2 * n):
        counts = collections.Counter(stream.block(0, number)[0][:, 0].int().tolist())
        assert len(counts) == stream.window == 4
        for i, count in counts.items():
            assert stream.tokens[i] // 4 <= count <= math.ceil(stream.tokens[i] / 4)


def test_a_streamed_sample_is_raw_of_one_domain_and_always_the_same(tiny, monkeypatch):
    held, buffer = ActivationBuffer.read(tiny, SHARD), read(tiny)
    for domain in range(3):
        x = buffer.sample(domain, 100)
        assert len(x) == 100
        assert torch.equal(x, read(again(tiny)).sample(domain, 100))
        assert not rows(x) - rows(held.acts_ND[held.domain_N == domain].float())
        assert len(buffer.sample(domain, 10**6)) == int((held.domain_N == domain).sum())


def test_a_sample_of_a_rare_kind_reads_no_more_than_some_times_its_size(tiny, monkeypatch):
    held, buffer, names = ActivationBuffer.read(tiny, SHARD), read(tiny), []
    read_shard = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, i: names.append(i) or read_shard(self, i))
    monkeypatch.setattr(shards_module, "SEARCHED", 2)
    assert 0 < len(buffer.sample(2, 70)) < 70 < int((held.domain_N == 2).sum())
    assert len(names) == 3  # of 64 tokens


def test_a_sample_of_a_kind_without_text_reads_nothing(tiny, monkeypatch):
    buffer = read(tiny)
    monkeypatch.setattr(Shards, "read", None)
    assert buffer.sample(len(tiny.learn_domains), 70).shape == (0, buffer.d_in)


def test_attention_sinks_are_left_out_of_a_stream(tiny, monkeypatch):
    monkeypatch.setattr(shards_module.Substrate, "is_plain", lambda self, x: (
        torch.arange(x.shape[1]) > 0).expand(x.shape[:2]))
    held, buffer = ActivationBuffer.read(tiny, SHARD), read(tiny)
    assert len(buffer) == len(held) == tiny.learn.tokens_NT.numel() * 15 // 16
    for k, stream in enumerate(buffer.streams):
        x, domain = stream.take(0, 0, len(stream))
        assert len(x) == int((held.domain_N.clamp(max=RETAIN) == k).sum())
        for kind in domain.unique().tolist():
            assert rows(x[domain == kind]) == rows(held.acts_ND[held.domain_N == kind])


# -- Memory and disk -----------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "counts", "windows"), [
    (6, (50, 50), [1, 1]), (24, (50, 50), [10, 10]), (25, (50, 50), [10, 11]),
    (24, (3, 50), [3, 17]), (24, (50, 3), [17, 3]), (24, (4, 5), [4, 5])])
def test_the_window_takes_what_memory_the_rounds_leave(shards, counts, windows):
    substrate = SimpleNamespace(source=SimpleNamespace(d_in=WIDTH))
    parts = [Shards.__new__(Shards) for _ in counts]
    for part, n in zip(parts, counts):
        vars(part).update(substrate=substrate, per_shard=4, starts=range(n),
                          tokens_NT=torch.zeros(4 * n, 16))
    assert window_sizes(parts, shards * ONE * 1.0001) == windows


@pytest.mark.parametrize(("gigabytes", "contexts"), [(32 * ONE, 4), (31.9 * ONE, 2),
                                                     (16 * ONE, 2), (8 * ONE, 1), (2 * ONE, 1)])
def test_shards_are_smaller_where_memory_has_room_for_few(tiny, monkeypatch, gigabytes, contexts):
    monkeypatch.setattr(shards_module, "AT_LEAST", 32)
    for stream in shards_module.open_streams(tiny, SHARD, gigabytes):
        assert stream.shards.per_shard == contexts


def test_too_little_memory_for_a_window_is_one_line_that_says_how_much_is_needed(
        tiny, monkeypatch):
    monkeypatch.setattr(shards_module, "AT_LEAST", 32)
    with pytest.raises(UserError, match=r"^buffer_gigabytes=5e-06 in RUNS, BUDGETS or "
                                        "CustomSAEConfig is too little to train with; use at least "
                                        r"6.1e-06 GB, and more to mix well$"):
        ActivationBuffer.read(tiny, SHARD, 5e-6)


def test_no_more_shards_are_held_than_the_window_has(tiny):
    buffer, most = read(tiny, 12), 0
    for step in range(60):
        buffer.batch(0, step, 50, 0.4)
        for stream in buffer.streams:
            for one in stream.reader.pending.values():
                one.result()
            most = max(most, len(stream.held))
    assert most == 4
    let_go(buffer)
    assert not any(stream.held or stream.now or stream.reader.pending for stream in buffer.streams)


def test_from_one_round_to_the_next_one_shard_is_read(tiny, monkeypatch):
    buffer = read(tiny, 12)
    names, read_shard = [], Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, i: names.append(i) or read_shard(self, i))
    stream = buffer.streams[FORGET]
    for number in range(20):
        stream.block(0, number)
    stream.let_go()
    assert len(names) in (4 + 19, 4 + 20)  # the last one may be read ahead


def test_a_run_that_goes_on_reads_no_shard_that_it_does_not_need(tiny, monkeypatch):
    read(tiny)
    monkeypatch.setattr(TinySource, "load_model", lambda *_: pytest.fail("the model was run"))
    monkeypatch.setattr(Shards, "read", lambda *_: pytest.fail("a shard was read"))
    assert len(read(again(tiny))) == tiny.learn.tokens_NT.numel()


def test_a_shard_that_vanished_or_is_damaged_is_made_anew(tiny, capfd):
    whole = batches(read(tiny), range(40))
    files = sorted((tiny.cache.root / "tiny" / "activations").glob("retain-*"))
    first, second = [path for path in files if "-size" not in path.name][:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-9])
    assert same(batches(read(again(tiny)), range(40)), whole)
    assert f"{second} is damaged" in capfd.readouterr().err


def test_activations_that_the_disk_does_not_hold_are_made_on_the_fly_to_the_same_bits(
        tiny, tmp_path, full_disk, monkeypatch, capfd):
    on_the_fly = read(tiny)
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"activations need 0.000102 GB and {tiny.cache.root} has 9e-05 GB free: they are made "
        "whenever they are needed and not written")
    ours = batches(on_the_fly, range(60))
    samples = [on_the_fly.sample(k, 100) for k in (FORGET, RETAIN)]
    let_go(on_the_fly)
    kept = [path.name for path in (tiny.cache.root / "tiny" / "activations").iterdir()]
    assert all("-size-" in name for name in kept)
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    from_disk = read(again(tiny))
    assert same(batches(from_disk, range(60)), ours)
    assert same([[from_disk.sample(k, 100) for k in (FORGET, RETAIN)]], [samples])
    assert from_disk.scale == on_the_fly.scale
    tokens = tiny.learn.tokens_NT[:2]  # and the language model is still what it was
    assert torch.equal(tiny.lm.residual(tokens), again(tiny).lm.residual(tokens))
    assert len(list((tiny.cache.root / "tiny" / "activations").iterdir())) == 2 * len(kept)
    assert not capfd.readouterr().err.count("free")


def test_a_full_disk_costs_activations_that_fit_in_memory_nothing_either(tiny, full_disk, capfd):
    tokens = tiny.learn.tokens_NT.numel()
    buffer = ActivationBuffer.read(tiny, SHARD)
    assert "are made whenever they are needed" in capfd.readouterr().err
    assert len(buffer) == tokens
    assert not list(tiny.cache.root.rglob("activations/*"))


def test_what_is_on_disk_already_needs_no_more_room(tiny, full_disk, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(shards_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
        read(tiny)
    monkeypatch.setattr(TinySource, "load_model", lambda *_: pytest.fail("the model was run"))
    batches(read(again(tiny)), range(10))
    assert "free" not in capfd.readouterr().err


# -- Reading ahead -------------------------------------------------------------------------------


def test_what_is_begun_is_made_in_another_thread_before_it_is_asked_for():
    begun, threads = threading.Event(), []

    def make(key):
        threads.append(threading.get_ident())
        if key == 2:
            begun.set()
        return 10 * key

    reader = Reader()
    assert reader.result(make, 1) == 10
    reader.begin(make, 2)
    assert begun.wait(10)
    assert reader.result(make, 2) == 20
    reader.begin(make, 3)
    assert reader.result(make, 7) == 70  # what was begun in vain is let go
    assert reader.pending == {}
    assert threading.get_ident() not in threads


def test_errors_of_what_was_read_ahead_are_raised_where_it_is_asked_for():
    def make(key):
        raise OSError(5, "Input/output error")

    reader = Reader()
    reader.begin(make, 2)
    with pytest.raises(OSError, match="Input/output error"):
        reader.result(make, 2)
    assert reader.result(int, 3) == 3


def test_a_signal_ends_the_making_of_a_window_at_once(tiny, full_disk, monkeypatch):
    """Which may take minutes on the fly."""
    buffer, calls = read(tiny, 24), []
    interrupts, residual = Interrupts(), LanguageModel.residual

    def counted(self, *arguments):
        calls.append(threading.current_thread())
        if len(calls) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            while not buffer.streams[0].reader.stopped:
                time.sleep(0.01)
        return residual(self, *arguments)

    monkeypatch.setattr(LanguageModel, "residual", counted)
    before = signal.signal(signal.SIGTERM, interrupts.handle)
    try:
        with pytest.raises(Interrupts.Stop):
            buffer.batch(0, 0, 50, 0.4)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert threading.main_thread() not in calls
    assert len(calls) == 3
    assert len(buffer.batch(0, 0, 50, 0.4)[0]) == 50
    assert len(calls) > 20


# -- Training ------------------------------------------------------------------------------------


@pytest.fixture
def train(small_config, tmp_path):
    config = dataclasses.replace(small_config, steps=24, checkpoint_every=7, batch_size=64)

    def train(buffer, name, interrupts=None):
        return ex.train_sae(config, buffer, 0, tmp_path / name, interrupts or Interrupts(), None,
                            Processes())

    return train


def test_a_streamed_training_that_is_stopped_and_continued_ends_with_the_same_bits(
        tiny, train, monkeypatch):
    whole = train(read(tiny), "whole")
    interrupts, step = Interrupts(), ex.CustomTrainer.step

    def stopping(self, *arguments):
        if self.step_count == 11:
            interrupts.signal = 15
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ex.CustomTrainer, "step", stopping)
        with pytest.raises(Interrupts.Stop):
            train(read(again(tiny)), "stopped", interrupts)
    continued = train(read(again(tiny)), "stopped")
    (ours, note), (theirs, other) = continued.state_dict(), whole.state_dict()
    assert note == other
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(part, theirs[name]) for name, part in ours.items())


def test_a_training_that_is_done_reads_no_activations(tiny, train, monkeypatch):
    weights = train(read(tiny), "done").sae.state_dict()
    monkeypatch.setattr(Stream, "take", lambda *_: pytest.fail("activations were read"))
    again_weights = train(read(again(tiny)), "done").sae.state_dict()
    assert all(torch.equal(part, again_weights[name]) for name, part in weights.items())


def test_memory_enters_the_key_of_what_is_trained_if_and_only_if_it_changes_the_batches(tiny):
    def key(gigabytes):
        config = ex.CustomSAEConfig(buffer_gigabytes=gigabytes)
        return ex.training_key(config, tiny, ActivationBuffer.read(tiny, SHARD, gigabytes))

    assert key(30 * ONE) == key(2.0)
    assert len({key(30 * ONE), key(12 * ONE), key(9 * ONE)}) == 3
    assert key(12 * ONE) == key(12.4 * ONE)  # not enough for one more shard


def test_two_processes_that_read_shards_of_their_own_have_the_batches_of_one(tiny):
    whole = batches(read(tiny), range(30))

    class Team:
        """Processes that run in threads and meet at every sum."""

        device, size = torch.device("cpu"), 2

        def __init__(self, rank, parts, barrier):
            self.rank, self.parts, self.barrier = rank, parts, barrier

        def sum_(self, part):
            self.parts[self.rank] = part
            self.barrier.wait(60)
            total = self.parts[0] + self.parts[1]
            self.barrier.wait(60)
            return part.copy_(total)

        def wait(self):
            self.barrier.wait(60)

    parts, barrier, results, used = [None, None], threading.Barrier(2), {}, {}

    def work(rank):
        substrate = again(tiny)
        substrate.processes = Team(rank, parts, barrier)
        buffer = read(substrate)
        results[rank] = batches(buffer, range(30))
        used[rank] = {i for stream in buffer.streams for i in stream.held}

    team = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for one in team:
        one.start()
    for one in team:
        one.join(120)
    for rank in range(2):
        assert same(results[rank], whole)
        assert {i % 2 for i in used[rank]} == {rank}
