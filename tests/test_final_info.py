"""final_info.json: what counts as a result, how runs are compared, what SAEBench's keys say."""

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lab.console import UserError
from lab.evaluations.probing import K_VALUES
from lab.results.checksum import NOT_CHECKED, is_unaltered, result_checksum
from lab.results.final_info import (
    averaged,
    best_run,
    compare,
    comparisons,
    flat_metrics,
    means_and_stderrs,
    read_result,
    sae_bench_part,
    sampling_error,
    without_samples,
)
from lab.results.frontier import AREAS, COSTS, METRICS, summarize
from lab.storage import write_text
from lab.substrates.texts import Sizes

BASELINE = Path(__file__).parents[1] / "run_0" / "final_info.json"
ENVIRONMENT = {"evaluation_code": "abc", "language_model_dtype": "float32"}
RESULT = {"run": "run_2", "substrate": "standin", "budget": "smoke", "environment": ENVIRONMENT,
          "means": {"unlearning_area": 0.5, "l0": 40.0}, "stderrs": {}, "seeds": [],
          "config": {"alpha": 0.05, "regroup_every": 250}}


def write_result(folder, **changes):
    info = {**RESULT, **changes}
    write_text(folder / "final_info.json", json.dumps({**info, "sha256": result_checksum(info)}))
    return info


# -- What counts as a result -----------------------------------------------------------------------


def test_an_altered_result_does_not_count_and_a_line_says_so(tmp_path, capsys):
    write_result(tmp_path)
    assert read_result(tmp_path)["means"] == RESULT["means"]
    assert capsys.readouterr().err == ""
    file = tmp_path / "final_info.json"
    file.write_text(file.read_text().replace("0.5", "0.6"))
    assert read_result(tmp_path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{file} is damaged or was altered; it does not count"


@pytest.mark.parametrize("junk", ["[" * 100_000, '{"means": 1}', "[]", "7", '{"means": NaN',
                                  "\udcff", ""])
def test_a_damaged_result_does_not_count(tmp_path, capsys, junk):
    (tmp_path / "final_info.json").write_bytes(junk.encode("utf-8", "surrogateescape"))
    assert read_result(tmp_path) is None
    assert "damaged or was altered" in capsys.readouterr().err


def test_a_run_that_has_not_finished_is_no_news(tmp_path, capsys):
    assert read_result(tmp_path / "run_9") is None
    assert read_result(tmp_path) is None
    assert capsys.readouterr().err == ""


# -- The checksum ----------------------------------------------------------------------------------


def test_a_tool_that_writes_2_for_2_0_alters_nothing():
    """Nor one that sorts keys or writes other white space and escapes."""
    info = {"run": "run_α", "means": {"l0": 2.0, "area": 0.1, "n": 3, "none": None, "big": 1e22},
            "seeds": [{"seed": 0, "x": -0.0}]}
    info = {**info, "sha256": result_checksum(info)}
    text = json.dumps(info).replace("2.0", "2").replace("-0.0", "0").replace("1e+22", f"{10**22}")
    assert '"l0": 2,' in text
    for saved in (text, json.dumps(json.loads(text), sort_keys=True, indent=3),
                  json.dumps(json.loads(text), ensure_ascii=False)):
        assert is_unaltered(json.loads(saved))


@pytest.mark.parametrize(("old", "new"), [("0.1", "0.10000000000000002"), ("null", "0"),
                                          ("run_1", "run_2"), ('"n": 3', '"m": 3')])
def test_any_other_number_name_or_key_is_an_alteration(old, new):
    info = {"run": "run_1", "means": {"area": 0.1, "n": 3, "none": None}}
    text = json.dumps({**info, "sha256": result_checksum(info)})
    assert old in text
    assert not is_unaltered(json.loads(text.replace(old, new)))


def test_the_checksum_is_over_all_but_the_times():
    info = {"run": "run_1", "timing": {"seconds": 1.0}, "datetime_epoch_millis": 5}
    later = {**info, "timing": {"seconds": 9.0}, "datetime_epoch_millis": 7}
    assert result_checksum(info) == result_checksum(later)
    assert set(NOT_CHECKED) == {"timing", "datetime_epoch_millis", "sha256"}


def test_values_without_a_number_have_the_checksum_of_what_is_written_for_them():
    made = {"a": math.nan, "b": [math.inf, np.float64(1.5)], "c": (2, np.int64(3)), 1: True}
    written = {"a": None, "b": [None, 1.5], "c": [2, 3], "1": True}
    assert result_checksum(made) == result_checksum(written)


def test_results_without_a_checksum_count():
    info = {"means": {"l0": 2.0}, "run": "α"}
    assert is_unaltered(info)
    assert not is_unaltered({**info, "sha256": hashlib.sha256(b"").hexdigest()})


# -- The best of some runs -------------------------------------------------------------------------


def best(folder, **areas):
    for name, area in areas.items():
        number = int(name[-1])
        write_result(folder / name, means={"unlearning_area": area},
                     seeds=[{"seed": 0, "unlearning_area": area}],
                     config={"alpha": number / 10, "regroup_every": number})
    return best_run(folder, list(areas), "smoke", ("alpha", "regroup_every"))


def test_the_best_run_is_that_of_the_largest_area(tmp_path):
    assert best(tmp_path, run_1=0.3, run_2=0.9, run_3=-1.0) == {"alpha": 0.2, "regroup_every": 2}


def test_candidates_are_ranked_over_the_seeds_that_all_have(tmp_path):
    """A seed that one alone has, easy or hard, counts for nothing."""
    areas = {"run_1": {0: 0.5, 1: 0.7, 9: -5.0}, "run_2": {0: 0.6, 1: 0.5}}
    for name, by_seed in areas.items():
        write_result(tmp_path / name, config={"alpha": int(name[-1])},
                     means={"unlearning_area": sum(by_seed.values()) / len(by_seed)},
                     seeds=[{"seed": seed, "unlearning_area": area}
                            for seed, area in by_seed.items()])
    assert best_run(tmp_path, list(areas), "smoke", ("alpha",)) == {"alpha": 1}
    write_result(tmp_path / "run_2", config={"alpha": 2}, means={"unlearning_area": 1.0},
                 seeds=[{"seed": 4, "unlearning_area": 1.0}])
    with pytest.raises(UserError, match="run_1 to run_2 in .* have no seed in common"):
        best_run(tmp_path, list(areas), "smoke", ("alpha",))


def test_a_candidate_that_is_missing_altered_or_without_an_area_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing: run_2\. Run those first"):
        best(tmp_path, run_1=0.3, run_2=None, run_3=0.1)
    (tmp_path / "run_3" / "final_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"missing: run_2, run_3, run_4\."):
        best_run(tmp_path, ("run_1", "run_2", "run_3", "run_4"), "smoke", ("alpha",))
    with pytest.raises(UserError, match="at budget 'full'"):
        best_run(tmp_path, ("run_1",), "full", ("alpha",))


def test_candidates_that_were_not_measured_alike_are_named(tmp_path):
    best(tmp_path, run_1=0.3, run_2=0.9)
    write_result(tmp_path / "run_2", environment={**ENVIRONMENT, "evaluation_code": "other"})
    with pytest.raises(UserError, match=r"run_2 and run_1 in .* differ in evaluation_code"):
        best_run(tmp_path, ("run_1", "run_2"), "smoke", ("alpha",))


# -- Means -----------------------------------------------------------------------------------------


def test_means_and_standard_errors_by_hand():
    means, errors = means_and_stderrs([{"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}])
    assert means == {"a": 2.0, "b": None}
    assert errors == {"a": pytest.approx(1.0), "b": None}  # √2 / √2
    assert means_and_stderrs([{"a": 1.0}])[1] == {"a": None}


def test_a_metric_that_the_first_seed_lacks_is_undefined_and_not_forgotten():
    means, errors = means_and_stderrs([{"a": 1.0}, {"a": 3.0, "b": 2.0}])
    assert means == {"a": 2.0, "b": None}
    assert errors["b"] is None


def test_every_evaluations_numbers_have_a_name_of_their_own():
    parts = {
        "reconstruction": {"tokens": 9, "l0": 4.0, "by_domain": {
            name: {"tokens": 3, "l0": k, "explained_variance": 0.1 * k, "frac_alive": 1.0, "mse": 5}
            for k, name in enumerate(("forget", "retain", "other"))}},
        "conditioning": {"kappa_median": 2.0, "kappa": [1.0, 2.0], "by_coactivation": []},
        "sparse_probing": {"sae_test_accuracy": 0.9, "details": [], "skipped": {}},
        "separation": {"tpp_threshold_2_total_metric": 0.2, "details": [], "skipped": {"ratings":
                       "2 classes"}},
        "unlearning": {**{name: float(i) for i, name in enumerate(METRICS)}, "settings": [],
                       "unlearning_score": None, "unlearning_area_interval": [0.0, 1.0],
                       "coverage": {name: {"forget": 0.3 + i, "retain": 0.1, "news": 0.2}
                                    for i, name in enumerate(AREAS)}}}
    assert flat_metrics(parts) == {
        "l0": 4.0, "l0_forget": 0, "l0_retain": 1, "l0_other": 2,
        "explained_variance_forget": 0.0, "explained_variance_retain": 0.1,
        "explained_variance_other": 0.2, "frac_alive_forget": 1.0, "frac_alive_retain": 1.0,
        "frac_alive_other": 1.0, "kappa_median": 2.0, "sae_test_accuracy": 0.9,
        "tpp_threshold_2_total_metric": 0.2,
        "unlearning_area": 0.0, "unlearning_area_static": 1.0, "unlearning_area_sae_bench": 2.0,
        "unlearning_area_labelled": 3.0, "forget_rise_at_0.01": 4.0, "forget_rise_at_0.05": 5.0,
        "forget_rise_at_0.1": 6.0, "accuracy_area": 7.0, "unlearning_score": None,
        "coverage_forget": 0.3, "coverage_retain": 0.1, "coverage_news": 0.2}
    del parts["unlearning"]["coverage"]["unlearning_area"]  # of texts that are not there
    assert not [name for name in flat_metrics(parts) if name.startswith("coverage")]


# -- Comparisons -----------------------------------------------------------------------------------


def result(values, part):
    """A result with the seeds' `values` for every metric, all measured as `part` says."""
    names = ("x", *METRICS)
    return {**RESULT, "unlearning": {"per_seed": [part] * len(values)},
            "seeds": [{"seed": s, **dict.fromkeys(names, v)} for s, v in enumerate(values)]}


def compared(gains, ours, theirs):
    return compare(result(gains, ours), result([0.0] * len(gains), theirs))


def sample(rises, rights, n_sets=1):
    """What an evaluation keeps of one static setting at a cost of 0.15."""
    texts = {"forget": list(rises), "retain": [0.15] * len(rises), "news": [0.0] * len(rises)}
    one = {"n_features": 10, "limits": [-1.0], "multipliers": [2.0], "threshold": 0.01,
           "n_selected": 10, "rise": {kind: [rise] for kind, rise in texts.items()},
           "share": {kind: [0.5] * len(rise) for kind, rise in texts.items()}}
    asked = {"n_features": 10, "multiplier": 8.0, "limit": 0, "whole": True,
             "right": {"forget": rights, "retain": "1" * len(rights)}}
    return {"contexts": {kind: len(rise) for kind, rise in texts.items()}, "sets": [one] * n_sets,
            "reference_rise": [1e3] * len(rises), "asked": [asked] * n_sets,
            "counts": {name: {"kept": len(rights)} for name in ("forget", "retain")}}


def test_seeds_are_paired_and_the_interval_is_students():
    same = sample([1.0] * 4, "0101")
    difference = compared([1.0, 2.0, 3.0], same, same)["x"]
    half = 4.30265 / math.sqrt(3)  # t of two degrees of freedom, of a table
    expected = {"seeds": 3, "difference": 2.0, "stderr": 1 / math.sqrt(3), "low": 2 - half,
                "high": 2 + half}
    assert difference == pytest.approx(expected, abs=1e-4)
    alone = compared([1.0], same, same)["x"]
    assert alone == {"seeds": 1, "difference": 1.0, "stderr": None, "low": None, "high": None}


def test_seeds_that_only_one_run_has_count_for_nothing():
    """Neither in the difference nor in the sampling error of the texts."""
    rises = [0.1, 0.9, 0.3, 0.5, 0.2, 0.8]
    theirs = result([0.0, 0.5, 0.0], sample([0.2] * 6, "111111"))
    few = result([1.0, 2.5], sample(rises, "010101"))
    more = result([1.0, 2.5, 7.0, 9.0], sample(rises, "010101"))
    more["unlearning"]["per_seed"][2] = sample([5.0] * 6, "000000")
    more["seeds"][2]["seed"] = 40  # the third of the other has no partner either
    more["seeds"][3]["seed"] = 41
    assert compare(more, theirs) == compare(few, theirs)
    assert compare(few, theirs)["x"]["difference"] == 1.5
    assert compare(few, theirs)["x"]["seeds"] == 2
    assert compare(theirs, more)["x"]["difference"] == -1.5


def test_runs_of_other_seeds_are_not_compared():
    one, other = (result([1.0], sample([1.0] * 2, "11")) for _ in range(2))
    other["seeds"][0]["seed"] = 1
    assert compare(one, other) is None


def test_intervals_count_the_texts_and_questions_that_all_seeds_share():
    """Resampling what is the same everywhere changes nothing; else its known error is added."""
    rng = np.random.default_rng(0)
    rises = rng.normal(2.0, 1.0, 400).clip(0.01)
    rights = "".join(map(str, rng.integers(0, 2, 400)))
    nothing = sample([0.0] * 400, "1" * 400)
    gain = compared([1.0] * 3, sample(rises, rights), nothing)
    assert gain["x"]["low"] == gain["x"]["high"] == 1.0  # no text nor question in it
    # the area is a triangle to 0.15, then level: 0.75 times the mean rise; the score all that is
    # lost
    error = rises.std() / 20
    errors = {**dict.fromkeys((*AREAS, "unlearning_area_labelled"), 0.75 * error),
              **{f"forget_rise_at_{cost}": cost / 0.15 * error for cost in COSTS},
              "unlearning_score": 0.5 / 20, "accuracy_area": 0.5 / 20}
    assert errors.keys() == METRICS.keys()
    for name, expected in errors.items():
        assert gain[name]["high"] - 1 == pytest.approx(1.96 * expected, rel=0.2)
        assert gain[name]["stderr"] == 0  # over seeds
    more = sample([0.0] * 400, "1" * 400, n_sets=2)  # settings may differ in number
    again = compared([1.0] * 3, sample(rises, rights), more)
    assert again["unlearning_area"] == gain["unlearning_area"]
    none = sample([0.0] * 400, "1" * 400, n_sets=0)  # an SAE may have nothing to clamp
    assert compared([1.0] * 3, sample(rises, rights), none)["unlearning_area"] == gain[
        "unlearning_area"]
    both = compared([1.0] * 3, sample(rises + 1, rights), sample(rises, rights))
    assert both["unlearning_area"]["high"] == pytest.approx(1, abs=1e-6)  # all gain the same


def test_a_difference_of_sides_that_are_drawn_alike_has_the_error_of_the_difference():
    """Not of each side by itself: texts that are hard for one SAE are hard for the other."""
    rng = np.random.default_rng(0)
    shared, own = rng.normal(3.0, 1.0, 400), rng.normal(0.5, 0.1, 400)
    ours, theirs = [sample(shared + own, "1")], [sample(shared, "1")]
    error = sampling_error("unlearning_area", ours, theirs, draws=200)
    assert error == pytest.approx(0.75 * own.std() / 20, rel=0.2)
    twice = sampling_error("unlearning_area", ours * 2, theirs * 2, draws=200)
    assert twice == pytest.approx(error)  # seeds share the texts: more of them help nothing


def test_sides_measured_on_different_numbers_of_texts_have_no_interval():
    """A sampling error of 0 would narrow it silently; what is not sampled keeps its own."""
    gain = compared([1.0, 2.0, 3.0], sample([1.0] * 4, "0101"), sample([0.0] * 2, "11"))
    for name in METRICS:
        assert gain[name] == {"seeds": 3, "difference": 2.0,
                              "stderr": pytest.approx(1 / math.sqrt(3)), "low": None, "high": None}
    assert gain["x"]["low"] is not None


def test_a_metric_that_one_seed_lacks_costs_its_own_comparison_only():
    ours, theirs = (result([1.0, 2.0], sample([1.0] * 2, "11")) for _ in range(2))
    del ours["seeds"][0]["x"]
    theirs["seeds"][1]["unlearning_score"] = None
    difference = compare(ours, theirs)
    assert "x" not in difference
    assert "unlearning_score" not in difference
    assert difference["unlearning_area"]["difference"] == 0
    ours["seeds"][1]["y"] = theirs["seeds"][0]["y"] = 1.0  # and the other way round
    assert "y" not in compare(ours, theirs)


@pytest.mark.parametrize(("name", "changes"), [
    ("budget", {"budget": "full"}), ("substrate", {"substrate": "pythia"}),
    ("evaluation_code", {"environment": {**ENVIRONMENT, "evaluation_code": "other"}}),
    ("language_model_dtype", {"environment": {**ENVIRONMENT, "language_model_dtype": "bfloat16"}})])
def test_a_neighbour_that_was_not_measured_alike_is_not_compared(tmp_path, capsys, name, changes):
    info = result([1.0], sample([1.0] * 2, "11"))
    write_result(tmp_path / "run_7", **{**info, "run": "run_7"})
    write_result(tmp_path / "run_8", **{**info, "run": "run_8", **changes})
    assert comparisons(info, tmp_path).keys() == {"run_7"}
    assert capsys.readouterr().err == f"run_8 and run_2 differ in {name}; not compared\n"


def test_a_neighbour_without_a_seed_in_common_is_named(tmp_path, capsys):
    info = result([1.0], sample([1.0] * 2, "11"))
    other = {**info, "run": "run_8", "seeds": [{**info["seeds"][0], "seed": 100}]}
    write_result(tmp_path / "run_8", **other)
    assert comparisons(info, tmp_path) == {}
    assert capsys.readouterr().err == "run_8 and run_2 have no seed in common; not compared\n"


def test_a_malformed_neighbour_costs_its_own_comparison_only(tmp_path, capsys):
    info = result([1.0], sample([1.0] * 2, "11"))
    write_result(tmp_path / "run_7", **{**info, "run": "run_7"})
    write_result(tmp_path / "run_8", **{**info, "run": "run_8", "unlearning": None})
    assert comparisons(info, tmp_path).keys() == {"run_7"}
    assert "run_8 is of another version (TypeError); not compared" in capsys.readouterr().err


def test_a_reference_is_not_compared_with_itself(tmp_path):
    info = {**result([1.0], sample([1.0] * 2, "11")), "run": "run_8"}
    write_result(tmp_path / "run_8", **info)
    assert comparisons(info, tmp_path) == {}


# -- The yardstick ---------------------------------------------------------------------------------


def test_the_yardstick_keeps_all_but_its_samples():
    part = sample([2.0] * 4, "0101")
    kept = without_samples({**part, **summarize(part, 2)})
    assert not kept.keys() & {"sets", "asked", "reference_rise"}
    for name in METRICS:
        assert kept[name] is not None
        assert len(kept[f"{name}_interval"]) == 2
    assert kept["coverage"]["unlearning_area"].keys() == {"forget", "retain", "news"}
    assert kept["settings"] == [{"threshold": 0.01, "n_features": 10, "n_selected": 10,
                                 "multiplier": 2.0, "forget_ce_rise": 2.0,
                                 "retain_ce_rise": pytest.approx(0.15), "news_ce_rise": 0.0}]
    assert len(kept["frontier"]) > 10


# -- SAEBench's keys -------------------------------------------------------------------------------


def detail(name, accuracy, texts=None, **more):
    return {"dataset_name": f"{name}_results", "llm_test_accuracy": 0.9,
            "sae_test_accuracy": accuracy, "texts": texts or {"a": {"train": 8, "test": 4}}, **more}


def test_a_data_sets_accuracies_are_means_over_seeds():
    row = averaged("n_results", [[detail("n", 0.5)], [detail("m", 0.1), detail("n", 0.7)]])
    assert row["dataset_name"] == "n_results"
    assert row["sae_test_accuracy"] == pytest.approx(0.6)
    assert row["llm_test_accuracy"] == pytest.approx(0.9)
    assert row["sae_top_100_test_accuracy"] is None
    assert row["texts"] == {"a": {"train": 8, "test": 4}}


def test_an_accuracy_that_one_seed_lacks_is_undefined_and_harms_no_other():
    first, second = detail("n", 0.5), detail("n", 0.7, sae_top_1_test_accuracy=0.6)
    for rows in ([[first], [second]], [[second], [first]]):
        row = averaged("n_results", rows)
        assert row["sae_top_1_test_accuracy"] is None
        assert row["sae_test_accuracy"] == pytest.approx(0.6)


def saebench_part(*details):
    source = SimpleNamespace(
        model_name="described", loadable_name=None, layer=9, fingerprint="f", dataset_path=None)
    substrate = SimpleNamespace(source=source, sizes=Sizes(), precision="float32")
    config = {"steps": 600, "batch_size": 2048, "d_in": 8, "d_sae": 64, "context_length": 128,
              "learning_rate": 1e-3, "sparsity_penalty": 0.08,
              "activation": "relu"}
    info = {**RESULT, "config": config, "means": {"sae_test_accuracy": 0.5, "final_loss": 1.0}}
    return sae_bench_part(info, substrate, [{"details": list(details)}])


def test_the_probing_sizes_that_are_recorded_are_those_that_were_used():
    few = {"a": {"train": 1200, "test": 400}, "b": {"train": 600, "test": 90}}
    many = {"c": {"train": 4000, "test": 1000}}
    part = saebench_part(detail("small", 0.5, few), detail("large", 0.5, many))
    config = part["eval_config"]
    assert (config["probe_train_set_size"], config["probe_test_set_size"]) == (4000, 1000)
    assert config["texts"] == {"small": few, "large": many}
    assert [row["texts"] for row in part["eval_result_details"]] == [few, many]
    assert saebench_part(detail("small", 0.5, few))["eval_config"]["probe_train_set_size"] == 1200
    assert saebench_part()["eval_config"]["probe_train_set_size"] == 0


def test_saebenchs_keys_are_those_of_the_given_baseline():
    baseline = json.loads(BASELINE.read_text())
    part = saebench_part(detail("n", 0.5, **{
        f"{side}_top_{k}_test_accuracy": 0.5 for side in ("llm", "sae") for k in K_VALUES}))
    assert part.keys() >= baseline.keys()
    assert part["sae_cfg_dict"].keys() == baseline["sae_cfg_dict"].keys()
    for side in ("llm", "sae"):
        assert part["eval_result_metrics"][side].keys() == baseline["eval_result_metrics"][
            side].keys()
    extra = {"texts"}
    assert part["eval_config"].keys() - baseline["eval_config"].keys() == extra
    for ours, theirs in zip(part["eval_result_details"], baseline["eval_result_details"]):
        assert ours.keys() - theirs.keys() == extra
        assert ours.keys() >= theirs.keys()


def test_no_name_is_given_under_which_nothing_can_be_loaded():
    cfg = saebench_part()["sae_cfg_dict"]
    assert cfg["model_name"] is None
    assert cfg["dataset_path"] is None
    assert saebench_part()["sae_lens_version"] is None  # no SAELens ran it
