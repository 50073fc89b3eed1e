"""The study's controls: they read what runs leave in the cache, and change one thing at a time."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_substrate import QUESTIONS, tiny_substrate

import experiment
from lab import storage
from lab.evaluations import unlearning
from lab.language_model import losses
from lab.results.final_info import read_result
from lab.storage import Cache
from lab.substrates.texts import DOMAINS, FORGET, OTHER, RETAIN

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import controls
import top_features

SMALL = dict(expansion=4, group_size=8, steps=12, batch_size=128, warmup_steps=2, n_seeds=1,
             regroup_every=4, resample_every=6, log_every=6, target_l0=6.0, sketch_size=16)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """On a random model and a handful of texts."""
    monkeypatch.setenv("SAE_BUDGET", "smoke")
    monkeypatch.setattr(experiment, "BUDGETS", {"smoke": SMALL})
    monkeypatch.setattr(controls, "FURTHER", 3)
    for module in (unlearning, controls):
        monkeypatch.setattr(module, "THRESHOLDS", (0.1, 0.9))
        monkeypatch.setattr(module, "MULTIPLIERS", (2.0, 8.0))
    monkeypatch.setattr(controls, "FRESH", {run: controls.FRESH[run] for run in controls.PAIR})
    monkeypatch.setattr(controls, "FOUR", controls.PAIR)
    monkeypatch.setattr(controls, "CHANGED", {name: controls.CHANGED[name] for name in (
        "vanilla (run_8)", "use term alone (run_4)", "first proposal, α 0.05")})
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
    controls.table([("run_8", again), ("again", again)])
    first, second, gaps = capsys.readouterr().out.splitlines()
    assert f"{finished['means']['explained_variance']:.3f} ±" in first
    assert first.removeprefix("| run_8") == second.removeprefix("| again")
    assert set(gaps.strip("| ").split(" | ")[1:]) <= {"+0.000 (+0.000 to +0.000)", "-"}


def test_top_features_are_those_that_the_run_clamped(job, monkeypatch, capsys):
    assert job("run_8") == 0
    monkeypatch.setattr(controls, "SIZES", experiment.SIZES)
    heldout = controls.HeldOut(controls.open_substrate())
    capsys.readouterr()
    top_features.show(Path("run_8"), heldout)
    lines = capsys.readouterr().out.splitlines()
    clamped = read_result(Path("run_8"))["unlearning"]["per_seed"][0]["selected"]["0.9"]
    chosen = clamped[: top_features.FEATURES]
    titles = [line for line in lines if line.startswith("  feature")]
    assert [int(line.split()[1].rstrip(":")) for line in titles] == chosen != []
    assert float(titles[0].split("forget ")[1].split("%")[0]) > 0
    assert sum(line.count("[") for line in lines) >= len(chosen)  # the token is marked


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
    run, changes = controls.CHANGED["use term alone (run_4)"]
    both, alone = controls.row(run), controls.row(run, **changes)
    assert alone.alpha * alone.eta == pytest.approx(both.alpha * both.eta)
    assert alone.alpha < 1e-4 * both.alpha
    assert {key for key, value in vars(alone).items() if value != vars(both)[key]} == {
        "alpha", "eta"}


def test_labels_without_meaning_are_as_many_and_as_steady_as_the_true_ones():
    domain_N = (torch.arange(40) % 5 < 2).to(torch.uint8).repeat_interleave(128)
    shards = [{"acts": torch.arange(len(domain_N)).half()[:, None] % 128, "domain": domain_N}]
    true, moved = (kind(shards, len(domain_N))
                   for kind in (experiment.ActivationBuffer, controls.Mislabelled))
    labels = torch.full((len(domain_N),), -1)
    for step in (4, 5, 6, 7):  # an epoch, the second one
        (z, _), (same, domain_B) = (one.batch(0, step, 1280) for one in (true, moved))
        assert torch.equal(z, same)
        index = moved.order[1][(step - 4) * 1280 : (step - 3) * 1280]
        labels[index] = domain_B
        part = moved.batch(0, step, 1280, slice(640, 1280))[1]
        assert torch.equal(part, domain_B[640:])
    stretches = labels.view(40, 128)
    assert (stretches == stretches[:, :1]).all()
    assert int(labels.sum()) == int(domain_N.sum())
    assert 5 < int((stretches[:, 0] != domain_N[::128]).sum()) < 35
    assert torch.equal(moved.sample(1, 99), true.sample(1, 99))  # features are chosen by true ones


def test_saes_trained_on_other_labels_are_others_and_kept_apart(bench):
    config = controls.row("run_4", alpha=0.5)
    true, moved = bench.saes(config)[0], bench.mislabelled().saes(config)[0]
    assert not torch.equal(true.W_enc, moved.W_enc)
    assert torch.equal(bench.saes(config)[0].W_enc, true.W_enc)
    untrained = bench.untrained(config)[0]
    assert torch.equal(untrained.W_enc, untrained.W_dec.T)


def test_an_informed_choice_spares_what_the_third_text_uses(bench):
    """With forget text itself in the third text's place, no frequent feature may be chosen."""
    plain = bench.fresh("run_8")
    informed = bench.fresh("run_8", None, bench.sample(FORGET))
    for seed, parts in informed.items():
        chosen, spared = (each[seed]["unlearning"]["selected"]["0.1"] for each in (plain, informed))
        sae = bench.saes(controls.row("run_8", first_seed=seed))[seed]
        rate_F = (sae.encode(bench.sample(FORGET)) > 0).float().mean(0)
        assert (rate_F[spared] < 0.1).all()
        assert float(rate_F[chosen].max()) > 0.1
        assert parts["reconstruction"] == plain[seed]["reconstruction"]


def test_third_text_is_what_no_label_names(bench):
    third_ND = controls.third_text(bench.substrate)
    tokens_NT = bench.substrate.contexts("learn", (0, 0, 99)).tokens_NT
    assert third_ND.shape == (tokens_NT.numel(), bench.substrate.source.d_in)
    torch.testing.assert_close(
        third_ND, bench.substrate.lm.residual(tokens_NT).flatten(0, 1).float(), atol=0.02,
        rtol=0.01)


def test_broad_labels_call_as_much_other_text_retain_text(bench):
    third = [f"a noun that means {n}, said of things" for n in range(400)]
    learn, broad = bench.substrate.corpus["learn"], bench.broad(third)
    retain = broad.substrate.corpus["learn"]["retain"]
    added = [text for text in retain if text in set(third)]
    assert [text for text in retain if text not in set(third)] == learn["retain"]
    letters = sum(map(len, learn["retain"]))
    assert letters - 60 < sum(map(len, added)) <= letters
    assert set(broad.buffer.domain_N.tolist()) == {FORGET, RETAIN}
    assert bench.substrate.corpus["learn"] == learn  # that of the bench itself stays
    assert not torch.equal(*(one.sample(RETAIN)[:500] for one in (bench, broad)))
    assert broad.substrate.ask.checksum() == bench.substrate.ask.checksum()
    assert broad.substrate.lm is bench.substrate.lm
    before, after = bench.fresh("run_8"), broad.fresh("run_8")
    assert list(after) == list(before)
    assert after != before
    assert bench.fresh("run_8") == before


def test_further_text_is_new_and_the_fourth_text_is_in_the_third_one_s_place(bench):
    further, fourth = controls.other_text(bench.substrate)
    known, new, reference = ({tuple(row.tolist()) for row in one["tokens"][one["rows"]]}
                             for one in (bench.heldout, further, fourth))
    assert further.domain_R.tolist() == fourth.domain_R.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert not known & new
    assert known & reference == {
        tuple(row.tolist()) for row in bench.heldout["tokens"][bench.heldout["rows"]]
        [bench.heldout.domain_R != OTHER]}
    lm, words = bench.substrate.lm, " ".join(controls.topics.values())
    ids = lm.tokenize([words])[0]
    last = fourth["tokens"][fourth["rows"]][-1].tolist()
    assert set(last) <= {*ids, lm.separator}
    torch.testing.assert_close(further["base"], losses(
        lm, further["tokens"][further["rows"]], further["x"][further["rows"]]), atol=1e-4, rtol=0)
    for one in (further, fourth):
        assert len(one.asked[0]) == 0


def test_on_other_text_unlearning_alone_is_measured_anew(bench):
    further, _ = controls.other_text(bench.substrate)
    study, again = bench.fresh("run_8"), bench.fresh("run_8", further)
    for seed, parts in again.items():
        other = parts["unlearning"]
        assert [len(other["samples"][f"{name}_rise"][0]) for name in DOMAINS] == [3, 3, 3]
        assert other["area"] is not None
        assert other["score"] is None
        assert other["selected"] == study[seed]["unlearning"]["selected"]
        assert {**parts, "unlearning": 0} == {**study[seed], "unlearning": 0}
    # on the study's own text it gives the study's own results
    same = bench.fresh("run_8", bench.heldout)
    assert same == study


@pytest.mark.parametrize("find", [controls.mean_difference, controls.logistic_regression])
def test_a_labelled_direction_is_measured_in_its_own_units(find, generator):
    """Forget tokens are retain tokens moved by 5 along one axis, of spread 1 along each."""
    retain_ND, forget_ND = torch.randn(2, 20_000, 8, generator=generator)
    retain_ND[:, 3] += 2.0
    forget_ND[:, 3] += 7.0
    sae = controls.labelled_features(forget_ND, retain_ND, find(forget_ND, retain_ND))
    forget_NF, retain_NF = sae.encode(forget_ND), sae.encode(retain_ND)
    for place, threshold in enumerate(controls.THRESHOLDS):
        assert float((retain_NF[:, place] > 0).float().mean()) == pytest.approx(threshold, abs=2e-4)
        fires = forget_NF[:, place] > 0
        assert float(fires.float().mean()) > 0.95
        axis = sae.W_dec[place]
        assert float(axis[3]) == pytest.approx(1.0, abs=1e-3)
        more = ((forget_ND[fires] - retain_ND.mean(0)) @ axis).mean()
        assert float(forget_NF[fires, place].mean()) == pytest.approx(float(more), rel=1e-4)
        assert float(more) == pytest.approx(5.0, abs=0.2)


def test_a_labelled_direction_is_clamped_as_features_are(bench):
    direction = bench.direction(controls.mean_difference)
    settings = [(one["threshold"], one["multiplier"]) for one in direction["settings"]]
    assert settings == [(0.1, 2.0), (0.1, 8.0), (0.9, 2.0), (0.9, 8.0)]
    assert len({one["forget_ce_rise"] for one in direction["settings"]} - {0.0}) == 4
    further, _ = controls.other_text(bench.substrate)
    other = bench.direction(controls.mean_difference, further)
    assert len(other["samples"]["forget_rise"][0]) == 3


def test_glossaries_are_terms_with_their_definitions(tmp_path, monkeypatch):
    files = {"jargon-file": {"data/jargon.json": json.dumps([
                 {"term": "foo", "senses": [{"definition": "A \x1b[36mname\x1b[0m."},
                                            {"definition": "See\n bar."}]}])},
             "cwe2": {"cwe2/database/cwec_v4.14.xml":
                      '<Weakness_Catalog xmlns="http://cwe"><Weaknesses><Weakness Name="Overflow">'
                      "<Description>Too much.</Description><Extended_Description><p>By\n one.</p>"
                      "</Extended_Description></Weakness><Weakness Name=\"Race\"><Description>Too "
                      "late.</Description></Weakness></Weaknesses></Weakness_Catalog>",
                      "cwe2/cwe.NOTICE": "not this"}}
    monkeypatch.setattr(controls.Glossaries, "read", lambda _, package, inside: {
        name: text for name, text in files[package].items() if re.search(inside, name)})
    glossaries = controls.Glossaries(Cache(tmp_path))
    assert set(glossaries.wheels) == set(files)
    assert glossaries.texts() == [
        "foo: A name. See bar.", "Overflow: Too much. By one.", "Race: Too late."]


def test_an_interrupted_command_goes_on_where_it_was(bench, monkeypatch, capsys):
    glossaries = [f"term {n}: what machines of kind {n} are called" for n in range(400)]
    monkeypatch.setattr(controls.Glossaries, "texts", lambda _: glossaries)
    monkeypatch.setattr(controls, "open_substrate", lambda: bench.substrate)
    controls.main()
    first = capsys.readouterr().out
    for name in controls.FRESH.values():
        assert f"| {name} (2) |" in first
    for name in (*controls.CHANGED, "labels without meaning (run_4)", "not trained"):
        assert f"| {name} (1) |" in first
    for how in ("further text", "fourth text", "informed choice", "broad labels",
                "broad labels, fourth text", "glossaries", "glossaries, further text"):
        assert f"| {controls.FRESH['run_8']}, {how} (2) |" in first
    for find in ("mean difference", "logistic regression"):
        for how in ("", ", fourth text", ", broad labels", ", broad labels, fourth text",
                    ", glossaries", ", glossaries, further text"):
            assert f"| no SAE, {find}{how} |" in first
    for module in (storage, experiment):
        monkeypatch.setattr(module, "write_tensors", forbidden)
    controls.main()
    assert capsys.readouterr().out == first


def test_a_substrate_whose_third_text_has_no_learn_half_has_the_rows_that_do_not_need_it(
        bench, monkeypatch, capsys):
    learn = bench.substrate.corpus["learn"]
    bench.substrate.corpus = {**bench.substrate.corpus, "learn": {**learn, "other": []}}
    monkeypatch.setattr(controls, "open_substrate", lambda: bench.substrate)
    for name in ("fresh", "without_sae"):
        monkeypatch.setattr(controls, name, lambda *measured: None)
    controls.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| not trained (1) |")
    assert lines[-1].startswith("| minus vanilla |")
