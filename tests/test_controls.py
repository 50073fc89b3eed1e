"""The study's controls: they read what runs leave in the cache, and change one thing at a time."""

import re
import sys
from pathlib import Path

import pytest
import torch
from test_standin_texts import packages
from tiny_substrate import QUESTIONS, tiny_substrate

import experiment
from lab import storage
from lab.console import UserError
from lab.evaluations import unlearning
from lab.evaluations.heldout import HeldOut
from lab.results.final_info import read_result
from lab.substrates.standin import Standin
from lab.substrates.texts import SIZES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import controls
import top_features

SMALL = dict(expansion=4, group_size=8, steps=12, batch_size=128, warmup_steps=2, n_seeds=1,
             regroup_every=4, resample_every=6, log_every=6, target_l0=6.0, counted_tokens=512)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """On a random model and a handful of texts."""
    monkeypatch.setenv("SAE_BUDGET", "smoke")
    monkeypatch.setattr(experiment, "BUDGETS", {"smoke": SMALL})
    monkeypatch.setattr(unlearning, "THRESHOLDS", (0.1, 0.9))
    monkeypatch.setattr(controls, "CHANGED", {name: controls.CHANGED[name] for name in (
        "use term alone", "extra L1, 0.02", "first proposal, α 0.05")})
    return controls.Bench(tiny_substrate(tmp_path, questions=3 * QUESTIONS, frontier_contexts=2))


def forbidden(*_):
    raise AssertionError("what is in the cache is computed again")


def test_a_finished_run_is_read_from_the_cache_and_differs_from_itself_by_nothing(
        job, monkeypatch, capsys):
    assert job("run_8") == 0
    finished = read_result(Path("run_8"))
    monkeypatch.setattr(controls, "SIZES", experiment.SIZES)
    bench = controls.Bench(controls.open_substrate())
    for module in (storage, experiment):
        monkeypatch.setattr(module, "write_tensors", forbidden)
    again = bench.evaluated(bench.saes(controls.row("run_8")))
    for row, theirs in zip(controls.as_info(again)["seeds"], finished["seeds"], strict=True):
        assert row == {key: value for key, value in theirs.items() if key != "final_loss"}
    capsys.readouterr()
    controls.table([("run_8", again, ()), ("again", again, ("run_8",))])
    first, second, gaps = capsys.readouterr().out.splitlines()
    assert f"{finished['means']['explained_variance']:.3f} ±" in first
    assert first.removeprefix("| run_8") == second.removeprefix("| again")
    name, *differences = gaps.strip("| ").split(" | ")
    assert name == "minus run_8"
    assert set(differences) <= {"+0.000 (+0.000 to +0.000)", "-"}


def test_top_features_are_those_that_the_run_clamped(job, monkeypatch, capsys):
    assert job("run_8") == 0
    monkeypatch.setattr(controls, "SIZES", experiment.SIZES)
    heldout = HeldOut(controls.open_substrate())
    capsys.readouterr()
    top_features.show(Path("run_8"), heldout)
    lines = capsys.readouterr().out.splitlines()
    clamped = read_result(Path("run_8"))["unlearning"]["per_seed"][0]["selected"]["0.9"]
    chosen = clamped[: top_features.FEATURES]
    assert lines[1].startswith("## run_8: ")
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [int(row[0].removeprefix("| ")) for row in rows] == chosen != []
    assert float(rows[0][1].removesuffix(" %")) > 0
    assert {len(row) for row in rows} == {2 + len(heldout.substrate.domains)}
    assert all(row[-1].count("[") >= 1 for row in rows)  # the token is marked


def test_the_strongest_token_of_a_context_is_marked():
    class Words:
        @staticmethod
        def decode(ids):
            return " ".join(f"w{i}" for i in torch.tensor(ids).view(-1).tolist())

    f_CT = torch.zeros(3, 20)
    f_CT[1, 7] = 2.0
    first = top_features.examples(f_CT, torch.arange(60).view(3, 20), Words)[0]
    assert first.startswith("w20 w21 w22 w23 w24 w25 w26[w27]w28 w29")


def test_the_use_term_alone_pulls_at_no_direction(bench):
    run, changes = controls.CHANGED["use term alone"]
    both, alone = controls.row(run), controls.row(run, **changes)
    assert alone.alpha * alone.eta == pytest.approx(both.alpha * both.eta)
    assert alone.alpha < 1e-4 * both.alpha
    assert {key for key, value in vars(alone).items() if value != vars(both)[key]} == {
        "alpha", "eta"}


def test_labels_without_meaning_are_as_many_and_as_steady_as_the_true_ones():
    domain_N = (torch.arange(40) % 5 >= 2).to(torch.uint8).repeat_interleave(128)
    shards = [{"acts": torch.arange(len(domain_N)).half()[:, None] % 128, "domain": domain_N}]
    true, moved = (kind(shards, len(domain_N))
                   for kind in (experiment.ActivationBuffer, controls.Mislabelled))
    labels = torch.full((len(domain_N),), -1)
    for step in (4, 5, 6, 7):  # an epoch, the second one
        (z, _), (same, domain_B) = (one.batch(0, step, 1280, 0.4) for one in (true, moved))
        assert torch.equal(z, same)
        labels[moved.places(0, step, 1280, 0.4)] = domain_B
        part = moved.batch(0, step, 1280, 0.4, slice(640, 1280))[1]
        assert torch.equal(part, domain_B[640:])
    stretches = labels.view(40, 128)
    assert (stretches == stretches[:, :1]).all()
    assert int(labels.sum()) == int(domain_N.sum())
    assert 5 < int((stretches[:, 0] != domain_N[::128]).sum()) < 35
    assert torch.equal(moved.sample(1, 99), true.sample(1, 99))  # features are chosen by true ones


def test_random_partners_are_as_many_of_the_same_weights_and_others(generator):
    lists = torch.zeros(400, 12, dtype=torch.int32)
    for token in lists:  # two blocks of features, of which one fires
        block = int(torch.randint(0, 2, (), generator=generator))
        token[:6] = 1 + 20 * block + torch.randperm(20, generator=generator)[:6].int()
    seen = experiment.firing(lists, 40)
    counted = experiment.partners(seen, 8)
    with controls.in_place_of("partners", controls.random_partners):
        drawn = experiment.partners(seen, 8)
    again = experiment.partners(seen, 8)
    assert torch.equal(again.column_N, counted.column_N)
    assert torch.equal(drawn.row_N, counted.row_N)
    assert torch.equal(drawn.weight_N, counted.weight_N)
    apart = [((found.row_N < 20) != (found.column_N < 20)).float().mean()
             for found in (counted, drawn)]
    assert apart[0] == 0
    assert apart[1] > 0.3


def test_saes_trained_on_other_labels_are_others_and_kept_apart(bench):
    config = controls.row("run_4", alpha=0.5)
    true, moved = bench.saes(config)[0], bench.mislabelled().saes(config)[0]
    assert not torch.equal(true.W_enc, moved.W_enc)
    assert torch.equal(bench.saes(config)[0].W_enc, true.W_enc)


def test_what_is_not_trained_has_the_l0_at_which_training_ends(bench):
    config = controls.row("run_8", batch_size=512)
    untrained = bench.untrained(config)[0]
    assert torch.equal(untrained.W_enc, untrained.W_dec.T)
    z_BD, _ = bench.buffer.batch(0, 0, config.batch_size, config.forget_share)
    active = untrained.encode(z_BD * bench.buffer.scale) > 0
    assert float(active.sum(1).float().mean()) == pytest.approx(config.target_l0, rel=0.05)


def test_own_evenness_is_what_is_shared_where_partners_play_no_part():
    each = torch.tensor([0, 1])
    found = experiment.Partners(each, each.flip(0), torch.tensor([0.5, 0.5]))
    use_KF = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    arguments = found, torch.tensor([50, 5]), use_KF, 1.0
    with controls.in_place_of("sharing", controls.own_evenness):
        apart = experiment.sharing(*arguments)
    assert apart.tolist() == pytest.approx([2 * 0.4 / 1.2, 2 * 0.2 / 0.8])
    assert (apart - experiment.sharing(*arguments)).abs().min() > 0.05


def test_nothing_is_shared_from_the_first_grouping_on(bench):
    config = controls.row("run_2")
    with controls.in_place_of("sharing", controls.nothing_shared):
        trainer = experiment.new_trainer(config, bench.buffer, 0, bench.substrate.processes)
        shared = []
        for step in range(config.steps):
            shared.append(float(trainer.state["share_F"].max()))
            trainer.step(*bench.buffer.batch(0, step, config.batch_size, config.forget_share))
    assert shared[0] == 1
    assert shared[-1] == 0


def test_an_extra_l1_is_on_the_lesser_side_of_every_feature():
    running = torch.tensor([[3.0, 1, 2], [1, 1, 1], [2, 4, 0]])
    mean = torch.arange(9.0).view(3, 3).requires_grad_()
    loss = controls.lesser_side(mean, running)
    assert float(loss.detach()) == mean[2, 0] + mean[0, 1] + mean[1, 2]
    loss.backward()
    assert mean.grad.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_a_kind_that_is_left_out_is_an_unnamed_text_of_which_nothing_is_learnt(
        tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SAE_SUBSTRATE", "standin")
    monkeypatch.setattr(Standin, "fetch", lambda self: None)
    whole, less = controls.open_substrate(), controls.open_substrate("paragraphs")
    assert less.domains == (*whole.domains, "paragraphs")
    assert less.source.domains["retain"] == ("leads", "how-to texts")
    assert less.source.learn_parts["paragraphs"] == 0 < whole.source.learn_parts["paragraphs"]
    assert less.causes != whole.causes
    less.source.read = packages()
    corpus = less.source.corpus(SIZES["smoke"])
    texts = corpus["ask"]["paragraphs"]
    assert len(texts) == corpus["documents"]["ask"]["paragraphs"] >= 50
    assert list(corpus["learn"]) == ["forget", "leads", "how-to texts"]
    assert corpus["documents"]["learn"]["paragraphs"] == 0
    assert not set(texts) & {*corpus["ask"]["retain"], *corpus["learn"]["leads"],
                             *corpus["learn"]["how-to texts"]}


def test_an_unknown_table_is_one_line():
    with pytest.raises(UserError, match="^faster: no such table; use fresh, changed, batch_topk"):
        controls.main(["faster"])


def test_an_interrupted_command_goes_on_where_it_was(bench, monkeypatch, capsys):
    monkeypatch.setattr(controls, "open_substrate", lambda *_: bench.substrate)
    controls.main()
    first = capsys.readouterr().out
    tables = first.split(": row (seeds) |")
    assert [table.splitlines()[-1].strip("| ") for table in tables[:-1]] == list(controls.TABLES)
    rows = [re.findall(r"^\| (.*?) \|", table, re.M) for table in tables[1:]]
    main = ["vanilla (1)", "fixed (1)", "minus vanilla", "OrtSAE (1)", "minus vanilla",
            "minus fixed", "adaptive (1)", "minus vanilla", "minus fixed", "minus OrtSAE"]
    fresh, changed, batch_topk, longer, left_out = (names[1:] for names in rows)
    assert fresh == batch_topk == main
    assert changed[: len(main)] == main
    assert changed[len(main):] == [
        "use term alone (1)", "minus vanilla", "minus adaptive",
        "extra L1, 0.02 (1)", "minus vanilla", "minus adaptive",
        "first proposal, α 0.05 (1)", "minus vanilla", "minus fixed",
        "random partners (1)", "minus vanilla", "minus adaptive",
        "own evenness alone (1)", "minus vanilla", "minus adaptive",
        "nothing shared (1)", "minus vanilla", "minus adaptive",
        "labels without meaning (1)", "minus vanilla", "minus adaptive",
        "not trained (1)", "minus vanilla"]
    assert longer == [name for name in main if "OrtSAE" not in name][:3] + [
        "adaptive (1)", "minus vanilla", "minus fixed"]
    assert left_out == ["retain unnamed", *main, "retain too unnamed", *main]
    for module in (storage, experiment):
        monkeypatch.setattr(module, "write_tensors", forbidden)
    controls.main()
    assert capsys.readouterr().out == first
