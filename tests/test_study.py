"""The folders of a study, end to end: what a run finds in its own and beside it, and leaves."""

import json
import shutil

import pytest
import small
from small import contents

import experiment as ex
import plot
from lab.results.checksum import result_checksum
from lab.results.final_info import read_result
from lab.storage import to_json


@pytest.fixture
def cached_job(whole, job, tmp_path):
    """The small main job with everything of an undisturbed run in its cache."""
    shutil.copytree(whole / "cache", tmp_path / "cache")
    return job


@pytest.fixture
def budget(monkeypatch):
    """Trains the small job with other settings."""
    return lambda **changes: monkeypatch.setattr(
        ex, "BUDGETS", {"smoke": {**small.TINY, **changes}})


def place(folder, info, **changes):
    """Put results into `folder` as a run of its name that ended well would have."""
    folder.mkdir(parents=True)
    info = {**info, "run": folder.name, **changes}
    info["sha256"] = result_checksum(info)
    (folder / "final_info.json").write_text(to_json(info))


# -- Configurations ------------------------------------------------------------------------------


def test_results_of_the_same_configuration_are_written_over(cached_job, whole, tmp_path, capfd):
    shutil.copytree(whole / "run_1", tmp_path / "run_1")
    (tmp_path / "run_1" / "mine.txt").write_text("mine")
    assert cached_job() == 0
    assert "another configuration" not in capfd.readouterr().err
    assert [path.name for path in tmp_path.glob("run_*")] == ["run_1"]
    assert contents(tmp_path / "run_1") == {**contents(whole / "run_1"), "mine.txt": b"mine"}


def test_results_of_another_configuration_are_set_aside_whole_each_time_under_a_new_number(
        cached_job, budget, tmp_path, capfd):
    assert cached_job() == 0
    (tmp_path / "run_1" / "mine.txt").write_text("mine")
    for number, change in enumerate((dict(n_seeds=1), dict(n_seeds=1, alpha=0.2)), 1):
        before, aside = contents(tmp_path / "run_1"), tmp_path / f"run_1_old_{number}"
        budget(**change)
        assert cached_job() == 0
        assert contents(aside) == before
        assert (f"{tmp_path / 'run_1'} held another configuration's results; they are in {aside} "
                "now") in capfd.readouterr().err.splitlines()
    names = [path.name for path in sorted(tmp_path.glob("run_*"))]
    assert names == ["run_1", "run_1_old_1", "run_1_old_2"]
    assert "mine.txt" in contents(tmp_path / "run_1_old_1")
    assert not [name for name in contents(tmp_path / "run_1") if "seed_1" in name or "mine" in name]
    curves = (tmp_path / "run_1" / "history.jsonl").read_text().splitlines()
    assert {json.loads(line)["seed"] for line in curves} == {0}


def test_results_without_a_config_file_are_set_aside_by_the_configuration_inside_them(
        cached_job, whole, tmp_path):
    shutil.copytree(whole / "run_1", tmp_path / "run_1")
    (tmp_path / "run_1" / "config.json").unlink()
    assert cached_job() == 0
    assert not (tmp_path / "run_1_old_1").exists()
    shutil.rmtree(tmp_path / "run_1")
    place(tmp_path / "run_1", read_result(whole / "run_1"), config={"alpha": 0.2})
    assert cached_job() == 0
    assert read_result(tmp_path / "run_1_old_1")["config"] == {"alpha": 0.2}
    assert read_result(tmp_path / "run_1")["config"]["alpha"] == 0.1


def test_the_configuration_that_is_written_is_the_trainers_after_training(
        job, monkeypatch, tmp_path):
    step = ex.CustomTrainer.step

    def drifting(self, *batch):
        self.alpha = 0.07 if self.step_count >= 12 else self.alpha
        return step(self, *batch)

    monkeypatch.setattr(ex.CustomTrainer, "step", drifting)
    assert job() == 0
    written = json.loads((tmp_path / "run_1" / "config.json").read_text())
    info = read_result(tmp_path / "run_1")
    assert written == info["config"]
    assert (written["alpha"], written["seeds"]) == (0.07, [0, 1])
    for layout in ("sae_lens/cfg.json", "dictionary_learning/trainer_0/config.json"):
        assert '"alpha": 0.07' in (tmp_path / "run_1" / "seed_1" / layout).read_text()


# -- Neighbours ----------------------------------------------------------------------------------


def test_a_malformed_neighbour_costs_the_comparison_only(cached_job, whole, tmp_path, capfd):
    place(tmp_path / "run_8", read_result(whole / "run_1"), unlearning=None)
    assert cached_job() == 0
    assert "run_8 is of another version (TypeError); not compared" in capfd.readouterr().err
    assert read_result(tmp_path / "run_1")["comparisons"] == {}


def test_neighbours_that_were_evaluated_otherwise_are_not_compared_and_one_line_says_in_what(
        cached_job, whole, tmp_path, capfd):
    info = read_result(whole / "run_1")
    place(tmp_path / "run_7", info)
    other = {**info["environment"], "evaluation_code": "0" * 16, "language_model_dtype": "float16"}
    place(tmp_path / "run_8", info, environment=other)
    assert cached_job() == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "compared" in line]
    assert line == "run_8 and run_1 differ in evaluation_code, language_model_dtype; not compared"
    results = read_result(tmp_path / "run_1")["comparisons"]
    assert results.keys() == {"run_7"}
    assert results["run_7"]["explained_variance"]["difference"] == 0


def test_altered_results_count_neither_for_a_run_nor_for_a_figure(whole, tmp_path, capsys):
    folder = tmp_path / "run_1"
    shutil.copytree(whole / "run_1", folder)
    info = read_result(folder)
    assert plot.read_info(folder) == info
    value = info["means"]["explained_variance"]
    text = (folder / "final_info.json").read_text()
    (folder / "final_info.json").write_text(text.replace(str(value), str(value + 1)))
    assert read_result(folder) is None
    assert "damaged or was altered" in capsys.readouterr().err
    with pytest.raises(ValueError, match="altered"):
        plot.read_info(folder)


# -- Places --------------------------------------------------------------------------------------


def test_a_link_is_the_row_of_its_own_name_with_the_neighbours_of_the_link(
        cached_job, budget, whole, tmp_path):
    info = read_result(whole / "run_1")
    place(tmp_path / "study" / "run_7", info)
    place(tmp_path / "scratch" / "run_8", info)  # beside what the link leads to: no neighbour
    link, target = tmp_path / "study" / "run_1", tmp_path / "scratch" / "job_4711"
    link.symlink_to("../scratch/job_4711")
    for exists in (False, True):  # what it leads to
        assert target.exists() == exists
        assert cached_job("study/run_1") == 0
        assert read_result(link)["run"] == "run_1"
        assert read_result(link)["comparisons"].keys() == {"run_7"}
        assert contents(target) == contents(link)
    assert "=== run_1 (" in (tmp_path / "study" / "notes.txt").read_text()
    assert not (tmp_path / "scratch" / "notes.txt").exists()

    before = contents(target)
    budget(n_seeds=1)
    assert cached_job("study/run_1") == 0
    assert link.is_symlink()
    assert link.resolve() == target
    assert read_result(target)["config"]["seeds"] == [0]
    assert contents(tmp_path / "scratch" / "job_4711_old_1") == before
    assert [path.name for path in sorted((tmp_path / "study").iterdir())] == [
        "notes.txt", "run_1", "run_7"]


def test_only_the_run_folder_the_cache_and_the_notes_are_written(cached_job, tmp_path):
    (tmp_path / "study" / "run_2").mkdir(parents=True)
    assert cached_job("study/run_2/../run_1") == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cache", "study"]
    assert [path.name for path in sorted((tmp_path / "study").iterdir())] == [
        "notes.txt", "run_1", "run_2"]
    assert not list((tmp_path / "study" / "run_2").iterdir())


def test_a_run_may_be_started_from_any_folder_its_own_included(
        cached_job, whole, monkeypatch, tmp_path):
    for here, out_dir in (("elsewhere", str(tmp_path / "one" / "run_1")), ("two/run_1", ".")):
        (tmp_path / here).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / here)
        assert cached_job(out_dir) == 0
    assert not list((tmp_path / "elsewhere").iterdir())
    for study in ("one", "two"):
        assert contents(tmp_path / study / "run_1") == contents(whole / "run_1")
        assert (tmp_path / study / "notes.txt").exists()
