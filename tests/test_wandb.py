"""wandb: curves arrive once and in order, a broken server costs no run, secrets stay at home."""

import concurrent.futures
import json
import os
import subprocess
import sys

import pytest
import small
from wandb_server import WandbServer

import experiment as ex


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    small.local_hub(folder)
    return folder


@pytest.fixture(scope="module")
def cache(hub, tmp_path_factory):
    """The cache of a finished run that logged nothing."""
    folder = tmp_path_factory.mktemp("first")
    done = small.child(hub, folder, WANDB_API_KEY="5ec7e7" + "0" * 34)
    assert done.returncode == 0, done.stderr[-1500:]
    assert not list(folder.rglob("*wandb*"))  # disabled is disabled
    return folder / "cache"


def sync(folder, server):
    """Let wandb itself read the offline runs in the cache of `folder`, and send them."""
    runs = sorted((folder / "cache" / "wandb").glob("offline-run-*"))
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, runs)],
        env={**small.inherited(), **server.environment, "WANDB_ERROR_REPORTING": "false"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
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
        found = [row for row in logged if expected.items() <= row.items()]
        assert len(found) == 1, line


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_stopped_and_continued_run_is_one_run_with_each_step_once(hub, tmp_path, mode):
    server = WandbServer()
    environment = {**server.environment, "WANDB_MODE": mode}
    stopped = small.child(hub, tmp_path, "SIGTERM", 32, "CustomTrainer.step", **environment)
    assert stopped.returncode == 143, stopped.stderr[-1500:]
    assert stopped.stderr.splitlines()[-1].startswith("stopped;")
    done = small.child(hub, tmp_path, **environment)
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


def test_a_second_run_adds_nothing(hub, cache, tmp_path):
    (tmp_path / "cache").symlink_to(cache)
    server = WandbServer()
    for _ in range(2):
        done = small.child(hub, tmp_path, WANDB_MODE="online", **server.environment)
        assert done.returncode == 0, done.stderr[-1500:]
    (run,) = server.runs.values()
    check_curves(run.rows(), tmp_path)


def test_a_broken_server_costs_no_run(hub, cache, tmp_path):
    servers = {mode: WandbServer(mode) for mode in ("error", "silent", "dies", "refuses")}
    servers["refuses"].shutdown()
    servers["refuses"].server_close()

    def run(mode):
        (tmp_path / mode).mkdir()
        (tmp_path / mode / "cache").symlink_to(cache)
        environment = {**servers[mode].environment, "WANDB_MODE": "online"}
        return small.child(hub, tmp_path / mode, **environment)  # has a limit of its own

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ended = dict(zip(servers, pool.map(run, servers)))
    for mode, done in ended.items():
        assert done.returncode == 0, (mode, done.stderr[-1500:])
        assert (tmp_path / mode / "run_1" / "final_info.json").exists()
        said = done.stderr.splitlines()
        assert len(said) <= 3, (mode, said)
        assert any(line.startswith("wandb is off: CommError") for line in said) == (mode != "dies")
    assert all(servers[mode].asked for mode in ("error", "silent", "dies"))


def broken(*_, **__):
    raise RuntimeError("")


def test_whatever_wandb_raises_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = {"seeds": [0], "steps": 9}
    arguments = ("run_1", config, "tiny", ex.Cache(tmp_path))
    line = {"seed": 0, "step": 3, "tokens": 30, "loss": 1.0}
    results = {"means": {"l0": 1.0}, "stderrs": {}}
    logger = ex.Logger(*arguments)
    run = logger.run
    with monkeypatch.context() as patch:
        for name in ("log", "finish"):
            patch.setattr(run, name, broken)
        logger.log(line)
        logger.finish(results)
    run.finish()
    assert logger.next == 0
    monkeypatch.setattr(ex.wandb, "init", broken)
    logger = ex.Logger(*arguments)
    assert capsys.readouterr().err == "wandb is off: RuntimeError: \n"
    logger.log(line)
    logger.finish(results)


def test_an_unknown_mode_and_a_missing_key_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for mode in ("nonsense", "online"):
        monkeypatch.setenv("WANDB_MODE", mode)
        logger = ex.Logger("run_1", {"seeds": [0], "steps": 9}, "tiny", ex.Cache(tmp_path))
        assert logger.run is None
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("wandb is off: ")
