"""notes.txt: one section a run, and whatever a person wrote stays as the person wrote it."""

import codecs
import concurrent.futures
import os
import stat

import pytest

from experiment import RUNS
from lab.results.notes import HEADER, describe, headline, summary, update_notes
from lab.storage import Cache

CONFIG = dict(purpose="baseline", orthogonality="off", alpha=0.0, eta=4.0, regroup_every=250,
              activation="relu", seeds=[0, 1])


@pytest.fixture
def note(tmp_path):
    """Enters a run with an L0 in notes.txt."""
    cache, path = Cache(tmp_path / "cache"), tmp_path / "notes.txt"

    def note(run, l0=40.0, path=path):
        info = dict(run=run, config=CONFIG, means={"l0": l0}, stderrs={"l0": 0.5}, comparisons={},
                    substrate="standin", budget="smoke")
        update_notes(path, info, cache)
        return path

    return note


def test_a_section_says_what_ran_and_what_came_out(note):
    text = note("run_8").read_text()
    assert text.startswith(HEADER)
    section = text.removeprefix(HEADER).strip().splitlines()
    assert section[0] == "=== run_8 (written by experiment.py) ==="
    assert section[1] == "baseline: off, α 0; standin, smoke, seeds 0 1"
    assert section[2].startswith("L0 40.0 ± 0.5, explained variance undefined")
    assert section[-1] == "=== end of run_8 ==="
    assert len(section) == 6


def test_a_repeated_run_replaces_its_section_and_nothing_else(note):
    path = note("run_8")
    path.write_text("mine, above\n" + path.read_text() + "mine, below\n")
    note("run_1")
    text = note("run_8", 41.0).read_text()
    assert text.startswith("mine, above\n")
    assert text.count("=== run_8 (") == text.count("=== run_1 (") == 1
    assert "L0 41.0" in text
    assert text.index("run_8") < text.index("mine, below") < text.index("=== run_1 (")


def test_runs_that_finish_at_once_are_all_noted(note, tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        for done in [pool.submit(note, run) for run in [*RUNS] * 3]:
            done.result()
    text = (tmp_path / "notes.txt").read_text()
    assert text.startswith("mine\n")
    assert all(text.count(f"=== {run} (") == 1 for run in RUNS)


def test_text_in_an_encoding_like_ascii_stays_byte_for_byte(note, tmp_path):
    mine = b"caf\xe9, \r\nin Latin-1\r\n\n\n\n"
    (tmp_path / "notes.txt").write_bytes(mine)
    note("run_8")
    content = note("run_8", 2.0).read_bytes()
    assert content.startswith(mine + b"\n===")
    assert content.count(b"=== run_8 (") == 1
    assert b"L0 2.0" in content


@pytest.mark.parametrize(("mark", "encoding"), [
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be")])
def test_notes_stay_in_the_encoding_of_their_byte_order_mark(note, tmp_path, mark, encoding):
    (tmp_path / "notes.txt").write_bytes(mark + "mine: κ\r\n".encode(encoding))
    note("run_8")
    content = note("run_8", 2.0).read_bytes()
    assert content.startswith(mark)
    text = content.removeprefix(mark).decode(encoding)
    assert text.startswith("mine: κ\r\n\n=== run_8 (")
    assert text.count("=== run_8 (") == 1
    assert "L0 2.0" in text


def test_notes_that_cannot_be_decoded_stay_as_they_are_and_cost_no_run(note, tmp_path, capsys):
    mine = codecs.BOM_UTF16_LE + b"m\0i\0n"  # half a character at the end
    (tmp_path / "notes.txt").write_bytes(mine)
    assert note("run_8").read_bytes() == mine
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'notes.txt'} stays as it is: ")


def test_read_only_notes_stay_as_they_are_and_cost_no_run(note, tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    path.chmod(0o444)
    note("run_8")
    assert path.read_text() == "mine\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert capsys.readouterr().err == f"{path} stays as it is: is read-only\n"


def test_notes_keep_their_mode_and_new_ones_get_the_umasks(note, tmp_path):
    old = os.umask(0o027)
    try:
        path = note("run_8")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o600)
    note("run_1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_notes_that_are_a_link_stay_one_and_its_target_is_updated(note, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "log.txt"
    target.write_text("mine\n")
    (tmp_path / "notes.txt").symlink_to(target)
    path = note("run_8")
    assert path.is_symlink()
    assert target.read_text().startswith("mine\n\n=== run_8 (")


def test_a_section_that_lost_its_end_swallows_nothing(note):
    path = note("run_1")
    path.write_text(path.read_text().replace("=== end of run_1 ===", "") + "mine, after\n")
    for l0 in (2.0, 3.0):
        assert "mine, after\n" in note("run_1", l0).read_text()
    assert "L0 3.0" in path.read_text()
    assert "L0 2.0" not in path.read_text()


def test_a_section_of_run_1_is_not_taken_for_one_of_run_10(note):
    note("run_10")
    text = note("run_1", 41.0).read_text()
    assert text.count("=== run_10 (") == text.count("=== run_1 (") == 1
    assert "L0 40.0" in text


def test_headlines_show_what_is_undefined_and_leave_out_an_error_of_one_seed():
    info = {"means": {"l0": 40.26, "area": None}, "stderrs": {"l0": None}}
    assert headline(info, "l0", "L0", 1) == "L0 40.3"
    assert headline(info, "area", "area", 2) == "area undefined"
    assert headline(info, "other", "other", 2) == "other undefined"


def test_a_summary_compares_with_the_vanilla_run_where_there_is_an_interval():
    gap = {"difference": 0.5, "low": 0.1, "high": 0.9}
    info = {"means": {}, "stderrs": {}, "comparisons": {"run_8": {"unlearning_area": gap}}}
    assert summary(info)[1].endswith("; area minus run_8 +0.50 (0.10 to 0.90)")
    gap["low"] = None
    assert "run_8" not in summary(info)[1]


def test_a_summary_tells_what_the_clamps_cover_and_what_labels_alone_give():
    """Beside the area, on the same line."""
    means = {"unlearning_area": 1.234, "coverage_forget": 0.311, "coverage_retain": 0.0012,
             "coverage_news": 0.0049}
    parts = {"mean_difference": {"unlearning_area": 1.5},
             "logistic_regression": {"unlearning_area": 2.104}}
    info = {"means": means, "stderrs": {}, "comparisons": {}, "yardstick": parts}
    lines = summary(info)
    assert len(lines) == 3
    assert lines[1].startswith("unlearning area in nats 1.23, score undefined")
    assert lines[1].endswith("; clamps on 31.1 % of forget and at most 0.49 % of other tokens"
                             "; by labels alone 2.10")
    means["coverage_news"] = parts["logistic_regression"]["unlearning_area"] = None
    assert summary(info)[1].endswith("accuracy area undefined; by labels alone 1.50")


def test_a_row_is_described_by_what_it_trains_with():
    assert describe({**CONFIG, "orthogonality": "fixed", "alpha": 0.05}) == "fixed, α 0.05"
    assert describe({**CONFIG, "activation": "batch_topk"}) == "off, α 0, BatchTopK"
    assert describe({**CONFIG, "orthogonality": "adaptive", "alpha": 0.1}) == (
        "adaptive, α 0.1, η 4, regrouped every 250 steps")
