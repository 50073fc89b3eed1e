"""The study's controls: they read what runs leave in the cache, and change one thing at a time."""

import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import experiment as ex

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import controls
import top_features


@pytest.fixture
def bench(job):
    """Beside a finished run_8 of the small main job."""
    assert job("run_8") == 0
    return controls.Bench()


def forbidden(*_):
    raise AssertionError("what a run has left in the cache is computed again")


def test_a_finished_run_is_read_from_the_cache_and_differs_from_itself_by_nothing(
        bench, monkeypatch, capsys):
    for name in ("evaluate_unlearning", "evaluate_sparse_probing", "write_tensors"):
        monkeypatch.setattr(ex, name, forbidden)
    found = bench.evaluated(bench.row("run_8"))
    finished = ex.read_result(Path("run_8"))
    for row, theirs in zip(controls.as_info(found)["seeds"], finished["seeds"], strict=True):
        assert row == {key: value for key, value in theirs.items() if key != "final_loss"}
    controls.show("again", controls.as_info(found), finished)
    means, gaps = capsys.readouterr().out.splitlines()
    assert f"{finished['means']['explained_variance']:.3f} ±" in means
    assert set(gaps.split(" | ")[1:]) <= {"+0.000 (+0.000 to +0.000)", "-",
                                          "+0.000 (+0.000 to +0.000) |", "- |"}


def test_the_use_term_alone_pulls_at_no_direction(bench):
    both, alone = bench.row("run_4"), bench.row("run_4", **controls.USE_ALONE)
    assert alone.alpha * alone.eta == pytest.approx(both.alpha * both.eta)
    assert alone.alpha < 1e-4 * both.alpha
    assert {key for key, value in vars(alone).items() if value != vars(both)[key]} == {
        "alpha", "eta"}


def test_an_informed_choice_spares_what_the_third_text_uses(bench):
    """With forget text itself in the third text's place, no frequent feature may be chosen."""
    config = bench.row("run_8")
    x_ND = bench.buffer.sample(ex.FORGET, config.frequency_tokens) * bench.buffer.scale
    plain, found = bench.evaluated(config), bench.informed(config, x_ND)
    for seed, trained in bench.trained(config).items():
        rate_F = controls.firing_rate(trained, x_ND)
        for threshold in ex.THRESHOLDS:
            spared = found[seed]["unlearning"]["selected"][str(threshold)]
            assert (rate_F[torch.tensor(spared, dtype=torch.long)] < threshold).all()
        loosest = plain[seed]["unlearning"]["selected"][str(max(ex.THRESHOLDS))]
        assert float(rate_F[loosest].max()) > min(ex.THRESHOLDS)
        assert found[seed]["reconstruction"] == plain[seed]["reconstruction"]


def with_third_text(corpus):
    third = [f"a noun that means {n}, said of things" for n in range(4000)]
    return {**corpus, "learn": {**corpus["learn"], "other": third}}


def test_broad_labels_call_as_much_third_text_retain_text(bench):
    corpus = bench.material.corpus
    vars(bench.material)["corpus"] = with_third_text(corpus)
    third = bench.material.corpus["learn"]["other"]
    config, before = bench.row("run_8"), bench.evaluated(bench.row("run_8"))
    broad = bench.broad("broad", third)
    assert bench.material.corpus["learn"]["retain"] == corpus["learn"]["retain"]
    retain = broad.material.corpus["learn"]["retain"]
    added = [text for text in retain if text in set(third)]
    assert len(retain) - len(added) == len(corpus["learn"]["retain"])
    letters = sum(map(len, corpus["learn"]["retain"]))
    assert letters - 60 < sum(map(len, added)) <= letters
    assert set(broad.buffer.domain_N.tolist()) == {ex.FORGET, ex.RETAIN}
    # the buffer's retain tokens are not the old ones, what is measured is
    assert not torch.equal(*(one.buffer.sample(ex.RETAIN, 500) for one in (bench, broad)))
    for name in ("tokens", "rows", "base"):
        assert torch.equal(broad.material.heldout[name], bench.material.heldout[name])
    assert broad.material.questions[1] == bench.material.questions[1]
    assert broad.as_row(config)[1] != bench.as_row(config)[1]
    after = broad.evaluated(config)
    assert list(after) == list(before)
    assert after != before
    assert bench.evaluated(config) == before


@pytest.mark.parametrize("find", [controls.mean_difference, controls.logistic_regression])
def test_a_labelled_direction_is_found_and_measured_in_its_own_units(find, generator):
    """Forget tokens are retain tokens moved by 5 along one axis, of spread 1 along each."""
    retain_ND, forget_ND = torch.randn(2, 20_000, 8, generator=generator)
    retain_ND[:, 3] += 2.0
    forget_ND[:, 3] += 7.0
    sae = controls.labelled_features(forget_ND, retain_ND, find(forget_ND, retain_ND))
    forget_NF, retain_NF = sae.encode(forget_ND).detach(), sae.encode(retain_ND).detach()
    for place, threshold in enumerate(ex.THRESHOLDS):
        assert float((retain_NF[:, place] > 0).float().mean()) == pytest.approx(threshold, abs=2e-4)
        fires = forget_NF[:, place] > 0
        assert float(fires.float().mean()) > 0.95
        axis = sae.W_dec[place].detach()
        assert float(axis[3]) == pytest.approx(1.0, abs=1e-3)
        more = ((forget_ND[fires] - retain_ND.mean(0)) @ axis).mean()
        assert float(forget_NF[fires, place].mean()) == pytest.approx(float(more), rel=1e-4)
        assert float(more) == pytest.approx(5.0, abs=0.2)


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
    glossaries = controls.Glossaries(ex.Cache(tmp_path))
    assert set(glossaries.wheels) == set(files)
    assert glossaries.texts() == [
        "foo: A name. See bar.", "Overflow: Too much. By one.", "Race: Too late."]


def test_further_text_is_new_and_measured_as_the_study_s(bench, monkeypatch):
    monkeypatch.setattr(controls, "FURTHER", 3)
    monkeypatch.setattr(controls, "HOPELESS", float("inf"))
    study, further = bench.material.heldout, bench.further_text()
    held, config = further.heldout, bench.row("run_8")
    assert [int((held["domain"][held["rows"]] == k).sum()) for k in range(3)] == [3, 3, 3]
    old, new = ({tuple(row.tolist()) for row in part["tokens"][part["rows"]]}
                for part in (study, held))
    assert len(new) == 9
    assert not old & new
    tokens = held["tokens"][held["rows"]]
    torch.testing.assert_close(held["base"], bench.material.lm.losses(
        tokens, held["x"][held["rows"]]), atol=1e-4, rtol=0)
    # on the study's own text it gives the study's own areas
    again = bench.elsewhere(config, bench.material)
    for row, theirs in zip(again["seeds"], ex.read_result(Path("run_8"))["seeds"], strict=True):
        for key in ("unlearning_area", "unlearning_area_labelled"):
            assert row[key] == pytest.approx(theirs[key], abs=1e-6)


def test_a_fourth_text_takes_the_third_one_s_place(bench, monkeypatch):
    monkeypatch.setattr(controls, "FURTHER", 3)
    monkeypatch.setattr(controls, "HOPELESS", float("inf"))
    fourth, held = bench.unnamed_text(), bench.material.heldout
    assert "The" in bench.material.lm.tokenizer.decode(fourth.heldout["tokens"].flatten())
    known = {tuple(row.tolist()) for row in held["tokens"]}
    assert not known & {tuple(row.tolist()) for row in fourth.heldout["tokens"]}
    seeds = bench.elsewhere(bench.row("run_8"), fourth)["seeds"]
    study = ex.read_result(Path("run_8"))["seeds"]
    assert [row["unlearning_area"] for row in seeds] != [row["unlearning_area"] for row in study]
    # the third text itself there gives the study's own areas
    own = (held["domain"][held["rows"]] == ex.OTHER).nonzero()[:, 0]
    fourth.heldout = {**held, "rows": held["rows"][own], "base": held["base"][own]}
    vars(fourth).pop("frontier")
    again = bench.elsewhere(bench.row("run_8"), fourth)["seeds"]
    for row, theirs in zip(again, study, strict=True):  # whose samples are kept to 1e-4
        assert row["unlearning_area"] == pytest.approx(theirs["unlearning_area"], abs=1e-4)
    monkeypatch.setattr(ex, "MULTIPLIERS", (-2.0, -8.0))  # what raises a random model's losses
    for find in (controls.mean_difference, controls.logistic_regression):
        one, same = (bench.without_sae(find, text) for text in (None, fourth))
        assert same["area"] == pytest.approx(one["area"], abs=1e-4)
        assert one["area_labelled"] >= one["area"] > 0.01


def test_an_interrupted_command_goes_on_where_it_was(bench, monkeypatch, capsys):
    known = with_third_text(bench.material.corpus)
    corpus = functools.cached_property(lambda material: known)
    corpus.__set_name__(ex.Material, "corpus")
    monkeypatch.setattr(ex.Material, "corpus", corpus)
    monkeypatch.setattr(controls, "FRESH", {"vanilla": "run_8", "other": "run_4"})
    monkeypatch.setattr(controls, "CHANGED", {"not trained": ("run_8", {"steps": 0})})
    glossaries = [f"term {n}: what machines of kind {n} are called" for n in range(4000)]
    monkeypatch.setattr(controls.Glossaries, "texts", lambda _: glossaries)
    controls.main()
    first = capsys.readouterr().out
    assert first.count("minus vanilla") == 9
    assert first.count("minus run_4") == 6
    assert "| vanilla (4) |" in first
    for how in ("further text", "fourth text", "broad labels", "broad labels, fourth text",
                "glossaries", "glossaries, further text"):
        assert f"| vanilla, {how} (4) |" in first
    assert "| vanilla, informed choice (2) |" in first
    for how in ("", ", fourth text", ", broad labels", ", broad labels, fourth text",
                ", glossaries"):
        assert f"| no SAE, mean difference{how} |" in first
        assert f"| no SAE, logistic regression{how} |" in first
    monkeypatch.setattr(ex, "write_tensors", forbidden)
    controls.main()
    assert capsys.readouterr().out == first


def test_top_features_show_where_the_chosen_ones_fire(bench, capsys):
    top_features.show(Path("run_8"), bench.material)
    unlearning = ex.read_result(Path("run_8"))["unlearning"]["per_seed"][0]
    chosen = unlearning["selected"][str(max(ex.THRESHOLDS))][: top_features.FEATURES]
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.startswith("  feature")]
    assert [int(line.split()[1].rstrip(":")) for line in titles] == chosen != []
    shares = [float(line.split("forget ")[1].split("%")[0]) for line in titles]
    assert shares[0] > 0
    assert sum(line.count("[") for line in lines) >= len(chosen)  # the token is marked


def test_top_features_mark_the_strongest_token_of_a_context(bench):
    tokens_CT = bench.material.heldout["tokens"][:5]
    f_CT = torch.zeros(tokens_CT.shape)
    f_CT[3, 7] = 2.0
    tokenizer = bench.material.lm.tokenizer
    first = top_features.examples(f_CT, tokens_CT, tokenizer)[0]
    assert f"[{tokenizer.decode([int(tokens_CT[3, 7])])}]" in first
