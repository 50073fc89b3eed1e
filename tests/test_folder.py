"""A run's folder: its name and neighbours as they were given, and nothing in it is ever lost."""

import json
import os

import pytest

from lab.console import UserError
from lab.results.folder import RunFolder
from lab.storage import Cache, write_text


def test_row_and_study_come_from_the_path_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch" / "job_4711").mkdir(parents=True)
    (tmp_path / "run_3").symlink_to(tmp_path / "scratch" / "job_4711")
    for given in ("run_3", "run_3/", "./run_3", "other/../run_3", tmp_path / "run_3"):
        folder = RunFolder(given)
        assert (folder.run, folder.study) == ("run_3", tmp_path)


def test_a_folder_that_is_missing_is_made_also_where_a_link_leads(tmp_path):
    (tmp_path / "run_3").symlink_to(tmp_path / "scratch" / "job_4711")
    for name in ("run_3", "study/run_4"):
        folder = RunFolder(tmp_path / name)
        with folder.held(Cache(tmp_path / "cache")):
            assert folder.path.is_dir()
    assert (tmp_path / "run_3").is_symlink()
    assert (tmp_path / "scratch" / "job_4711").is_dir()


def test_a_second_process_on_the_same_folder_is_refused(tmp_path):
    """Also by another name."""
    (tmp_path / "run_3").mkdir()
    (tmp_path / "run_4").symlink_to(tmp_path / "run_3")
    cache = Cache(tmp_path / "cache")
    with RunFolder(tmp_path / "run_3").held(cache):
        for name in ("run_3", "run_4"):
            with (pytest.raises(UserError, match="another process works on .*" + name),
                  RunFolder(tmp_path / name).held(cache)):
                pytest.fail("both hold it")
    with RunFolder(tmp_path / "run_3").held(cache):
        pass


def test_an_out_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run_3").write_text("")
    with (pytest.raises(UserError, match="run_3 is a file; name a folder"),
          RunFolder(tmp_path / "run_3").held(Cache(tmp_path / "cache"))):
        pytest.fail("held a file")


def test_a_link_inside_the_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run_3").mkdir()
    (tmp_path / "run_3" / "seed_0").symlink_to(tmp_path / "elsewhere")
    with (pytest.raises(UserError, match="seed_0 is a link and may lead out"),
          RunFolder(tmp_path / "run_3").held(Cache(tmp_path / "cache"))):
        pytest.fail("held it")


def finished(place, alpha):
    """A run folder with results, weights and curves of one configuration."""
    for name, text in (("config.json", json.dumps({"alpha": alpha})), ("history.jsonl", ""),
                       ("seed_0/sae_lens/cfg.json", "{}"), ("final_info.json", str(alpha))):
        write_text(place / name, text)


def files(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_another_configurations_results_are_set_aside_whole_and_numbered(tmp_path, capsys):
    place = tmp_path / "run_3"
    for number, alpha in enumerate((0.1, 0.2, 0.3)):
        RunFolder(place).set_aside_other({"alpha": alpha})
        assert files(place) == []
        finished(place, alpha)
        if number:
            aside = tmp_path / f"run_3_old_{number}"
            assert files(aside) == files(place)
            line = f"{place} held another configuration's results; they are in {aside} now\n"
            assert capsys.readouterr().err == line
    kept = [json.loads((tmp_path / name / "config.json").read_text())["alpha"]
            for name in ("run_3_old_1", "run_3_old_2", "run_3")]
    assert kept == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("config", [{"alpha": 0.1, "n": (1, 2), "x": float("nan")}])
def test_results_of_the_same_configuration_stay(tmp_path, capsys, config):
    """As it is written and read again: tuples are lists, NaN is null."""
    write_text(tmp_path / "run_3" / "config.json", '{"alpha": 0.1, "n": [1, 2], "x": null}')
    RunFolder(tmp_path / "run_3").set_aside_other(config)
    assert files(tmp_path) == ["run_3/config.json"]
    assert capsys.readouterr().err == ""


def test_results_without_a_config_file_are_known_by_their_own(tmp_path):
    write_text(tmp_path / "run_3" / "final_info.json", '{"config": {"alpha": 0.1}}')
    folder = RunFolder(tmp_path / "run_3")
    folder.set_aside_other({"alpha": 0.1})
    assert files(tmp_path) == ["run_3/final_info.json"]
    folder.set_aside_other({"alpha": 0.2})
    assert files(tmp_path) == ["run_3_old_1/final_info.json"]


@pytest.mark.parametrize("content", ["7", '{"alpha": 0.2}', "[]"])
def test_results_of_an_unreadable_configuration_are_set_aside(tmp_path, content):
    write_text(tmp_path / "run_3" / "config.json", content)
    RunFolder(tmp_path / "run_3").set_aside_other({"alpha": 0.1})
    assert files(tmp_path) == ["run_3_old_1/config.json"]


def test_a_folder_without_results_stays_where_it_is(tmp_path):
    """What else is in it is a person's."""
    write_text(tmp_path / "run_3" / "mine.txt", "mine")
    RunFolder(tmp_path / "run_3").set_aside_other({"alpha": 0.1})
    assert files(tmp_path) == ["run_3/mine.txt"]


def test_a_link_stays_and_what_it_leads_to_is_moved(tmp_path):
    scratch = tmp_path / "scratch" / "job_4711"
    finished(scratch, 0.1)
    (tmp_path / "run_3").symlink_to(scratch)
    folder = RunFolder(tmp_path / "run_3")
    folder.set_aside_other({"alpha": 0.2})
    assert (tmp_path / "run_3").is_symlink()
    assert files(tmp_path / "run_3") == []
    assert "final_info.json" in files(tmp_path / "scratch" / "job_4711_old_1")


def test_no_file_in_the_folder_is_changed_by_holding_it(tmp_path):
    finished(tmp_path / "run_3", 0.1)
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run_3").rglob("*")}
    with RunFolder(tmp_path / "run_3").held(Cache(tmp_path / "cache")):
        pass
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run_3").rglob("*")} == before
