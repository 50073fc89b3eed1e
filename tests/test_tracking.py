"""wandb: curves arrive once and in order, a broken server costs no run, secrets stay at home."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
import wandb
from wandb_server import WandbServer

from lab.results.tracking import Tracker
from lab.storage import Cache

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"seeds": [0], "steps": 9}
LINE = {"seed": 0, "step": 3, "tokens": 30, "loss": 1.0}
INFO = {"means": {"l0": 1.0}, "stderrs": {}, "comparisons": {},
        "config": {**CONFIG, "alpha": 0.7}}
TRACK = f"""
from pathlib import Path
from lab.results.tracking import Tracker
from lab.storage import Cache
from lab.substrates import quiet_libraries
quiet_libraries()
tracker = Tracker("run_2", {CONFIG}, "standin-smoke", Cache(Path("cache")))
tracker.log({LINE})
tracker.finish({INFO})
"""


def track(folder, **environment):
    """A tracker's whole life in a process of its own, in `folder`; its stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", TRACK], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**small.inherited(), "PYTHONPATH": str(ROOT), "WANDB_MODE": "online", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def continued(hub, whole, folder, **environment):
    """The small job where all is in the cache, from a finished run that logged nothing."""
    if not (folder / "cache").exists():
        shutil.copytree(whole / "cache", folder / "cache")
    return small.started(hub, folder, **environment)


def sync(folder, server):
    """Let wandb itself read the offline runs in the cache of `folder`, and send them."""
    runs = sorted((folder / "cache" / "wandb").glob("offline-run-*"))
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, runs)], cwd=folder, capture_output=True,
        env={**small.inherited(), **server.environment, "WANDB_ERROR_REPORTING": "false"},
        text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return len(runs)


def check_curves(rows, folder):
    """The server has every line of history.jsonl once, with its numbers, in rising steps."""
    written = [json.loads(line) for line in (folder / "run_1/history.jsonl").open()]
    logged = [row for row in rows if any(key.startswith("seed_") for key in row)]
    assert len(logged) == len(written)
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    for line in written:
        curves = {f"seed_{line['seed']}/{k}": v for k, v in line.items()}
        del curves[f"seed_{line['seed']}/seed"], curves[f"seed_{line['seed']}/tokens"]
        expected = {"tokens": line["tokens"], **curves}
        matches = [row for row in logged if expected.items() <= row.items()]
        assert len(matches) == 1, line


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_stopped_and_continued_run_is_one_run_with_each_step_once(small_hub, tmp_path, mode):
    server = WandbServer()
    environment = {**server.environment, "WANDB_MODE": mode}
    stopped = small.started(small_hub, tmp_path, "SIGTERM", 32, "experiment.CustomTrainer.step",
                          **environment)
    assert stopped.returncode == 143, stopped.stderr[-1500:]
    assert stopped.stderr.splitlines()[-1].startswith("stopped;")
    done = small.started(small_hub, tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "wandb" not in done.stdout + done.stderr
    if mode == "offline":
        assert server.asked == 0
        assert sync(tmp_path, server) == 2
    (run,) = server.runs.values()
    check_curves(run.rows(), tmp_path)
    assert (run.name, run.group) == ("run_1", "pythia-smoke")
    config = json.loads((tmp_path / "run_1/config.json").read_text())
    assert {key: run.config[key]["value"] for key in config} == config
    metrics = json.dumps(run.config["_wandb"]["value"]["m"])
    assert '"*"' in metrics
    assert '"tokens"' in metrics
    means = json.loads((tmp_path / "run_1/final_info.json").read_text())["means"]
    summary = json.loads(run.files["wandb-summary.json"])
    assert {key: summary.get(key) for key in means} == means
    (page,) = (data for name, data in run.files.items() if name.endswith(".html"))
    assert "κ median" in page.decode()


def test_a_repeated_run_adds_nothing(small_hub, whole, tmp_path):
    server = WandbServer()
    for _ in range(2):
        done = continued(small_hub, whole, tmp_path, WANDB_MODE="online", **server.environment)
        assert done.returncode == 0, done.stderr[-1500:]
    (run,) = server.runs.values()
    check_curves(run.rows(), tmp_path)


def test_a_broken_server_costs_no_run(small_hub, whole, tmp_path):
    servers = {mode: WandbServer(mode) for mode in ("error", "silent", "dies", "refuses")}
    servers["refuses"].shutdown()
    servers["refuses"].server_close()

    def run(mode):
        (tmp_path / mode).mkdir()
        environment = {**servers[mode].environment, "WANDB_MODE": "online"}
        return continued(small_hub, whole, tmp_path / mode, **environment)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ended = dict(zip(servers, pool.map(run, servers)))
    for mode, done in ended.items():
        assert done.returncode == 0, (mode, done.stderr[-1500:])
        assert (tmp_path / mode / "run_1" / "final_info.json").exists()
        lines = [line for line in done.stderr.splitlines() if "wandb" in line]
        assert len(lines) == (mode != "dies"), (mode, lines)
        assert all(line.startswith("wandb is off: CommError") for line in lines)
    assert all(servers[mode].asked for mode in ("error", "silent", "dies"))


# -- The user's own settings -----------------------------------------------------------------------


def test_a_run_goes_by_its_row_and_group_where_the_user_names_nothing(tmp_path):
    server = WandbServer()
    assert track(tmp_path, **server.environment) == ""
    (run,) = server.runs.values()
    assert (run.project, run.name, run.group) == ("adaptive-orthogonal-sae", "run_2",
                                                  "standin-smoke")
    assert run.rows()[0]["seed_0/loss"] == 1.0
    assert run.config["alpha"]["value"] == 0.7  # as it trained
    assert (tmp_path / "cache" / "wandb").is_dir()


def test_names_that_the_user_gives_are_kept(tmp_path):
    server = WandbServer()
    given = {"WANDB_PROJECT": "mine", "WANDB_NAME": "first try", "WANDB_RUN_GROUP": "tuesday",
             "WANDB_RUN_ID": "abc123", "WANDB_DIR": str(tmp_path)}
    track(tmp_path, **server.environment, **given)
    ((name, run),) = server.runs.items()
    assert (name, run.project, run.name, run.group) == ("abc123", "mine", "first try", "tuesday")
    assert (tmp_path / "wandb").is_dir()


def test_an_empty_name_counts_as_none_given(tmp_path):
    server = WandbServer()
    track(tmp_path, WANDB_PROJECT="", WANDB_NAME="", WANDB_RUN_GROUP="", **server.environment)
    (run,) = server.runs.values()
    assert (run.project, run.name, run.group) == ("adaptive-orthogonal-sae", "run_2",
                                                  "standin-smoke")


def test_disabled_is_disabled(tmp_path, whole):
    server = WandbServer()
    track(tmp_path, WANDB_MODE="disabled", **server.environment)
    assert server.asked == 0
    assert not [path for top in (tmp_path, whole) for path in top.rglob("*wandb*")]


def test_no_secret_of_the_environment_is_written(tmp_path):
    track(tmp_path, WANDB_MODE="offline", **small.SECRETS)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for path in written:
        assert b"5ec7e7" not in path.read_bytes(), path


# -- Whatever goes wrong ---------------------------------------------------------------------------


def broken(*_, **__):
    raise RuntimeError("no\nreason")


def test_whatever_wandb_raises_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = ("run_1", CONFIG, "tiny", Cache(tmp_path))
    tracker = Tracker(*arguments)
    run = tracker.run
    with monkeypatch.context() as patch:
        for name in ("log", "finish"):
            patch.setattr(run, name, broken)
        tracker.log(LINE)
        tracker.finish(INFO)
    run.finish()
    assert tracker.next == 0
    monkeypatch.setattr(wandb, "init", broken)
    tracker = Tracker(*arguments)
    assert capsys.readouterr().err == "wandb is off: RuntimeError: no reason\n"
    tracker.log(LINE)
    tracker.finish(INFO)


def test_an_unknown_mode_and_a_missing_key_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for mode in ("nonsense", "online"):
        monkeypatch.setenv("WANDB_MODE", mode)
        tracker = Tracker("run_1", CONFIG, "tiny", Cache(tmp_path))
        assert tracker.run is None
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("wandb is off: ")


class Recorder:
    """In the place of a wandb run: what is logged at which step."""

    offline = False

    def __init__(self):
        self.logged = []

    def log(self, values, step=None):
        self.logged.append((step, values))


def test_each_line_of_the_curves_has_a_step_of_its_own_and_none_is_logged_twice(tmp_path,
                                                                                monkeypatch):
    """Training lines of a seed first, then its groupings, then the next seed."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker("run_1", {"seeds": [4, 5], "steps": 9}, "tiny", Cache(tmp_path))
    tracker.run = recorder = Recorder()
    history = [{"seed": 4, "step": 3, "tokens": 30, "loss": 1.0},
               {"seed": 4, "step": 3, "tokens": 30, "kappa_median": 2.0},
               {"seed": 4, "step": 9, "tokens": 90, "loss": 0.5}]
    tracker.log(history[0])
    tracker.log_rest(history)
    tracker.log_rest([{**line, "seed": 5} for line in history])
    tracker.log_rest(history)
    assert [step for step, _ in recorder.logged] == [3, 9, 13, 23, 29, 33]
    assert recorder.logged[0][1] == {"tokens": 30, "seed_4/step": 3, "seed_4/loss": 1.0}
    assert recorder.logged[2][1]["seed_4/kappa_median"] == 2.0


def test_only_the_first_of_several_processes_speaks(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.results.tracking.IS_LEADER", False)
    monkeypatch.setattr(wandb, "init", broken)
    tracker = Tracker("run_1", CONFIG, "tiny", Cache(tmp_path))
    tracker.log(LINE)
    tracker.finish(INFO)
    assert tracker.run is None
