"""What a person is told: a log that can be followed without a terminal, and no tracebacks."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small import contents, started

import experiment as ex
from lab import console
from lab.console import Clock, Progress, duration, progress, report, report_error

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60  # seconds; a line that does not come is a failure, not a long wait


@pytest.fixture
def log(monkeypatch):
    """Lines in place of stderr; `log.wait_for(text)` until one holds it. A line every moment."""

    class Log(list):
        news = threading.Condition()

        def append(self, line):
            with self.news:
                super().append(line)
                self.news.notify_all()

        def wait_for(self, text):
            with self.news:
                arrived = self.news.wait_for(lambda: any(text in line for line in self), LIMIT)
            assert arrived, (text, self)

    lines = Log()
    monkeypatch.setattr(console, "report", lines.append)
    monkeypatch.setattr(console, "HEARTBEAT", 0.01)
    monkeypatch.setattr(console, "at_terminal", lambda: False)
    return lines


# -- The log -------------------------------------------------------------------------------------


def test_every_phase_of_a_run_begins_and_ends_with_a_line_and_the_end_tells_its_duration(whole):
    lines = (whole / "stderr").read_text().splitlines()
    phases = ["download", "activations", *(f"{phase}, seed {seed}" for phase in (
        "training", "reconstruction", "conditioning", "sparse probing", "unlearning")
        for seed in (0, 1))]
    marks = [line for line in lines if re.search(r": (begins|done in \d.*)$", line)]
    told = [re.sub(r": (begins|done in ((\d+ h )?\d+ min )?\d+ s)$", "", line) for line in marks]
    for phase in phases:
        first, second = (i for i, name in enumerate(told) if name == phase)
        assert marks[first] == f"{phase}: begins"
        assert ": done in " in marks[second]
        assert second == first + 1
    assert lines[0] == "run_1: α sweep, strong; substrate pythia, budget smoke".replace("α", "?")


def test_between_the_two_lines_of_a_phase_one_tells_how_far_it_is_and_how_long_it_will_take(log):
    clock = Clock()
    with clock.phase("sparse_probing", "seed 3"):
        log.wait_for("sparse probing, seed 3: 0 s so far")
        for number in progress("abc", "probing texts"):
            log.wait_for({"a": "probing texts: 0 of 3 after 0 s",
                          "b": "probing texts: 1 of 3 after 0 s, about 0 s left",
                          "c": "probing texts: 2 of 3 after 0 s, about 0 s left"}[number])
    assert log[0] == "sparse probing, seed 3: begins"
    assert log[-1] == "sparse probing, seed 3: done in 0 s"
    assert list(clock.seconds) == ["sparse_probing"]


def test_the_log_of_training_tells_its_steps(log, job, monkeypatch):
    step = ex.CustomTrainer.step

    def slow(self, *batch):
        if (self.seed, self.step_count) == (1, 12):
            log.wait_for("training, seed 1: 12 of 24 after ")
        return step(self, *batch)

    monkeypatch.setattr(ex.CustomTrainer, "step", slow)
    assert job() == 0
    assert any(re.fullmatch(r"training, seed 1: 12 of 24 after \d+ s, about \d+ s left", line)
               for line in log)


def test_what_a_continued_run_finds_done_does_not_make_the_rest_look_fast(monkeypatch):
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    work = Progress("training", 100, done=90)
    now += 30
    assert work.line() == "training: 90 of 100 after 30 s"
    work.advance()
    now += 30
    assert work.line() == "training: 91 of 100 after 1 min 0 s, about 9 min 0 s left"


@pytest.mark.parametrize(("done", "seconds", "told"), [
    (0, 0.5, ["training: 24,979 steps are left, at 2 a second: about 3 h 28 min"]),
    (24_000, 0.5, ["training: 979 steps are left, at 2 a second: about 8 min 10 s"]),
    (0, 0.0018, []), (24_990, 60, [])], ids=["new", "continued", "short", "nearly done"])
def test_how_long_training_takes_is_told_once_from_the_rate_of_its_first_steps(
        monkeypatch, capsys, done, seconds, told):
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    work = Progress("training", 25_000, done, foretold=True)
    now += 100  # the first step, which fills the window
    for _ in range(min(60, 25_000 - done)):
        work.advance()
        now += seconds
    assert capsys.readouterr().err.splitlines() == told


def test_a_failed_piece_of_work_is_not_what_the_log_speaks_of_next(log):
    clock = Clock()
    with contextlib.suppress(ZeroDivisionError), clock.phase("activations"):
        for _ in progress("abc", "shards"):
            raise ZeroDivisionError
    del log[:]
    with clock.phase("training"):
        log.wait_for("training: 0 s so far")
    assert not [line for line in log if "shards" in line or "activations" in line]


def test_a_terminal_has_a_bar_and_no_lines_between(monkeypatch, capsys):
    monkeypatch.setattr(console, "at_terminal", lambda: True)
    monkeypatch.setattr(console, "HEARTBEAT", 0.001)
    before = threading.enumerate()
    with Clock().phase("activations"):
        for _ in progress("abc", "shards"):
            assert not [one for one in set(threading.enumerate()) - {*before}
                        if "beat" in one.name]
    printed = capsys.readouterr().err
    assert "shards: " in printed
    assert "0/3" in printed
    assert "so far" not in printed


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3599.6, "1 h 0 min"),
    (7500, "2 h 5 min"), (90_061, "25 h 1 min")])
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_of_several_processes_only_the_first_speaks_but_each_tells_its_error(monkeypatch, capsys):
    monkeypatch.setattr(console, "IS_LEADER", False)
    with Clock().phase("training"):
        report("a line")
        assert capsys.readouterr().err == ""
    report_error("lost another one")
    assert capsys.readouterr().err == "error: lost another one\n"


# -- Streams -------------------------------------------------------------------------------------

PLAIN = {name: part for name, part in os.environ.items()
         if name not in ("PYTHONUNBUFFERED", "PYTHONIOENCODING")}


@pytest.fixture
def closed_pipe():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def help_to(stdout, **environment):
    return subprocess.run([sys.executable, ROOT / "experiment.py", "--help"], text=True,
                          env={**PLAIN, **environment}, stdout=stdout, stderr=subprocess.PIPE)


def test_a_run_whose_output_nobody_reads_ends_well(small_hub, whole, tmp_path, closed_pipe):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    done = started(small_hub, tmp_path, streams=dict(stdout=closed_pipe, stderr=subprocess.PIPE))
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stderr.splitlines()[-1] == "yardstick: done in 0 s"
    assert contents(tmp_path / "run_1") == contents(whole / "run_1")


def test_a_run_without_stdout_and_stderr_ends_well(small_hub, whole, tmp_path):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    done = started(small_hub, tmp_path, streams=dict(preexec_fn=lambda: os.closerange(1, 3)))
    assert done.returncode == 0
    assert contents(tmp_path / "run_1") == contents(whole / "run_1")


def test_help_that_nobody_reads_is_no_error(closed_pipe):
    done = help_to(closed_pipe)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_on_an_ascii_terminal_lists_rows_and_variables():
    done = help_to(subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert done.stdout.isascii()
    assert "  run_1   ? sweep, strong" in lines
    for name, row in ex.RUNS.items():
        purpose = row["purpose"].encode("ascii", "replace").decode()
        assert any(line.split() == [name, *purpose.split()] for line in lines), name
    for name in ("SAE_SUBSTRATE", "SAE_BUDGET", "SAE_CACHE_DIR", "WANDB_MODE"):
        assert any(line.startswith(f"  {name} ") for line in lines), name
    assert max(map(len, lines)) <= 100


def test_without_stderr_nothing_of_the_log_gets_among_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    report("a line")
    report_error("an error")
    assert capsys.readouterr().out == ""


# -- Packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "reason"), [
    ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
     "package torch is missing; pip install -r requirements.txt gives it"),
    ("raise ImportError('libtorch.so: cannot open shared object file')",
     "ImportError: libtorch.so: cannot open shared object file"),
    ("raise RuntimeError('built for another\\nversion of numpy')",
     "RuntimeError: built for another version of numpy"),
    ("import sys\nsys.nothing", "AttributeError: module 'sys' has no attribute 'nothing'"),
    ("open('/no/such/library')",
     "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/library'"),
    ("def broken(:", "SyntaxError: invalid syntax (torch.py, line 1)"),
])
def test_a_package_that_cannot_be_imported_is_one_line_with_the_cause(tmp_path, code, reason):
    (tmp_path / "torch.py").write_text(code)
    done = subprocess.run([sys.executable, ROOT / "experiment.py", "--out_dir=run_1"], text=True,
                          capture_output=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert reason in line
