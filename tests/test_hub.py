"""The main job on the `pythia` substrate, against a Hub on this machine that may fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_fixtures
import pytest
from forked import Forked
from hub import Fault, Hub

from lab.storage import read_tensors
from lab.substrates.pythia import PROBE_SOURCES, Pythia
from lab.substrates.standin import Standin

ROOT = Path(__file__).resolve().parent.parent
NAME = Pythia.model_name
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there
FETCH = """
import os, pathlib
from lab.storage import Cache, to_json
from lab.substrates import Pythia, choose_source, quiet_libraries
from lab.substrates.texts import SIZES
quiet_libraries()
cache = Cache(pathlib.Path(os.environ["SAE_CACHE_DIR"]))
Pythia(cache).fetch()
"""
CORPUS = FETCH + """
print(to_json(Pythia(cache).corpus(SIZES["smoke"])))
"""
SHORT = """
import sys, experiment
experiment.BUDGETS["smoke"] |= dict(steps=40, ramp_fraction=0.5, n_seeds=1)
sys.exit(experiment.main(sys.argv[1:]))
"""  # as far as training goes: tests/test_main.py has the whole of it
CHOOSE = FETCH.replace("Pythia(cache).fetch()", "print(choose_source('auto', cache).name)")


def surroundings(endpoint, folder, **environment):
    """What a process finds whose Hub is `endpoint`, with caches of its own in `folder`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**inherited, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"),
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "SAE_CACHE_DIR": str(folder / "cache"), "SAE_SUBSTRATE": "pythia",
            "SAE_BUDGET": "smoke", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",  # beside the main job of the session
            **environment}


def run(endpoint, folder, *arguments, **environment):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                          env=surroundings(endpoint, folder, **environment))


def short(endpoint, folder, out_dir="run_2", **environment):
    return run(endpoint, folder, "-c", SHORT, f"--out_dir={out_dir}", **environment)


def one_line_error(done):
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr[-1500:]
    assert errors == lines[-1:], done.stderr[-1500:]
    assert "Traceback" not in done.stderr
    return errors[0]


@pytest.fixture(scope="module")
def running_hub():
    with Hub() as hub:
        hub_fixtures.fill(hub)
        yield hub


@pytest.fixture(scope="module")
def study(running_hub, tmp_path_factory):
    """A folder in which run_2 has run on what the Hub gave; its requests."""
    folder = tmp_path_factory.mktemp("pythia")
    done = short(running_hub.endpoint, folder)
    assert done.returncode == 0, done.stderr[-1500:]
    return folder, done, list(running_hub.requests)


@pytest.fixture
def hub(running_hub):
    yield running_hub
    running_hub.faults.clear()


@pytest.fixture(scope="module")
def forked(running_hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forked")
    return folder, Forked(**surroundings(running_hub.endpoint, folder))


@pytest.fixture
def attempt(hub, forked):
    """run_2 from the beginning, with the faults that the Hub has now."""
    folder, processes = forked

    def attempt(**environment):
        for name in ("hf", "cache", "run_2"):
            shutil.rmtree(folder / name, ignore_errors=True)
        done = processes.run("sys.exit(experiment.main(['--out_dir=run_2']))", folder,
                             surroundings(hub.endpoint, folder, **environment))
        assert not (folder / "run_2" / "final_info.json").exists()
        return one_line_error(done)

    return attempt


def read(folder, run):
    text = (folder / run / "final_info.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    return json.loads(text)


# -- A sound Hub ---------------------------------------------------------------------------------


def test_the_main_job_runs_on_what_the_hub_serves(study):
    folder, done, _ = study
    info = read(folder, "run_2")
    assert "run_2 on pythia (smoke)" in done.stdout
    assert (info["substrate"], info["config"]["model_name"]) == ("pythia", NAME)
    assert (info["config"]["d_in"], info["config"]["d_sae"]) == (512, 1024)
    assert info["config"]["hook_name"] == "blocks.3.hook_resid_post"
    assert info["means"]["explained_variance"] > 0.3
    assert info["means"]["llm_test_accuracy"] > 0.75
    unlearning = info["unlearning"]["per_seed"][0]
    assert unlearning["counts"]["forget"]["asked"] == 16
    assert len(unlearning["settings"]) == 16
    exported = json.loads((folder / "run_2" / "seed_0" / "sae_lens" / "cfg.json").read_text())
    assert exported["d_in"] == 512
    assert exported["metadata"]["model_name"] == NAME


def test_every_probing_set_is_either_used_or_skipped_with_a_reason(study):
    folder, done, _ = study
    info = read(folder, "run_2")
    used, skipped = info["eval_config"]["dataset_names"], info["skipped"]
    assert sorted([*used, *skipped]) == sorted(PROBE_SOURCES)
    assert "codeparrot/github-code" in used  # from its converted files: main holds a script
    absent, broken = hub_fixtures.ABSENT, hub_fixtures.BROKEN
    assert set(skipped) == {absent, f"{absent}_sentiment", broken}
    assert "doesn't exist on the Hub" in skipped[absent]
    assert "corrupted" in skipped[broken]
    for name, reason in skipped.items():
        assert f"{name} is skipped" in done.stderr
        assert reason in done.stderr


def test_pinned_repositories_are_read_at_their_commit(running_hub, study):
    files = [request.split("/resolve/") for request in study[2] if "/resolve/" in request]
    for name, revision in Pythia.revisions.items():
        kind = "models" if name == NAME else "datasets"
        pinned = [repository.commit for repository in running_hub.repositories[kind, name]
                  if revision in (repository.commit, repository.branch)]
        asked = [path for start, path in files if start.endswith(f" /{name}")
                 or start.endswith(f" /datasets/{name}")]
        assert asked
        assert all(path.startswith((revision, *pinned)) for path in asked), name


def test_another_row_runs_offline_from_the_cache(hub, study):
    """`auto` takes Pythia from the cache, and no request is made."""
    folder, _, requests = study
    hub.faults.append(Fault("", "hang up"))
    before = len(hub.requests)
    done = short(hub.endpoint, folder, "run_8", HF_HUB_OFFLINE="1", SAE_SUBSTRATE="auto")
    assert done.returncode == 0, done.stderr[-1500:]
    assert len(hub.requests) == before
    first, second = read(folder, "run_2"), read(folder, "run_8")
    assert second["config"]["orthogonality"] == "off"
    for key in ("substrate", "skipped"):
        assert second[key] == first[key]
    assert second["means"]["llm_test_accuracy"] == first["means"]["llm_test_accuracy"]


# -- The choice of a substrate -------------------------------------------------------------------


def test_auto_takes_pythia_where_the_hub_serves_it_and_where_nobody_answers_the_standin(
        hub, tmp_path):
    done = run(hub.endpoint, tmp_path, "-c", CHOOSE)
    assert (done.stdout, done.stderr) == ("pythia\n", "")
    done = run(NOWHERE, tmp_path, "-c", CHOOSE)
    assert done.stdout == "standin\n"
    assert len(done.stderr.splitlines()) == 1
    assert f"substrate: standin ({Standin.model_name}); {NAME} cannot be had" in done.stderr
    assert "Connection refused" in done.stderr


@pytest.mark.parametrize("substrate", ["auto", "pythia"])
@pytest.mark.parametrize(("pattern", "kind", "name", "status"), [
    ("/api/", "401", NAME, 401),
    ("/api/datasets/cais/wmdp", "403", "cais/wmdp", 403),
    (f"/api/models/{NAME}", "gated", NAME, 403),
    ("wmdp.*parquet", "gated", "cais/wmdp", 403),
    ("safetensors", "401", NAME, 401),
])
def test_a_hub_that_refuses_names_the_token_and_no_other_substrate_is_taken(
        hub, attempt, substrate, pattern, kind, name, status):
    hub.faults.append(Fault(pattern, kind))
    error = attempt(SAE_SUBSTRATE=substrate)
    assert f"the Hugging Face Hub refuses {name} (status {status}); set HF_TOKEN" in error
    assert "network" not in error


# -- Faults --------------------------------------------------------------------------------------


def test_pythia_with_nobody_there_is_one_line(tmp_path):
    error = one_line_error(run(NOWHERE, tmp_path, ROOT / "experiment.py", "--out_dir=run_2"))
    assert NAME in error
    assert "Connection refused" in error
    assert not (tmp_path / "run_2" / "final_info.json").exists()


@pytest.mark.parametrize(
    ("pattern", "kind", "names", "reason"),
    [
        (f"/api/models/{NAME}", "404", NAME, "404"),
        ("/api/datasets/cais/wmdp", "429", "cais/wmdp", "429"),
        ("/api/", "500", NAME, "500"),
        ("/api/", "stall", NAME, "timed out"),
        ("GET .*safetensors", "404", NAME, "404"),
        ("GET .*safetensors", "429", NAME, "429"),
        ("GET .*safetensors", "500", NAME, "500"),
        ("GET .*safetensors", "hang up", NAME, "disconnected"),
        ("safetensors", "short", NAME, "damaged"),
        ("wmdp.*parquet", "500", "cais/wmdp", "500"),
        ("wmdp.*parquet", "short", "cais/wmdp", ""),
    ],
)
def test_a_hub_that_keeps_failing_is_one_line(hub, attempt, pattern, kind, names, reason):
    hub.faults.append(Fault(pattern, kind))
    error = attempt()
    assert names in error
    assert reason in error


def test_passing_faults_change_nothing(hub, study, tmp_path):
    """What is cut, slow or refused once is asked for again, and the whole of it is got."""
    hub.faults += [Fault("GET .*safetensors", "cut", 1), Fault("GET .*tokenizer.json", "stall", 1),
                   Fault("wikitext-103-raw-v1/train.*parquet", "cut", 1),
                   Fault("wikitext-103-raw-v1/test.*parquet", "stall", 1),
                   Fault("wmdp.*parquet", "500", 1), Fault("mmlu.*parquet", "429", 2),
                   Fault("github-code.*0000.parquet", "hang up", 1)]
    done = run(hub.endpoint, tmp_path, "-c", CORPUS, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == 0, done.stderr[-1500:]
    assert [fault.kind for fault in hub.faults if fault.times] == []
    (path,) = (study[0] / "cache" / "pythia").glob("corpus-*.safetensors")
    assert json.loads(done.stdout) == read_tensors(path)[1]
    (weights,) = (tmp_path / "hf").rglob("model.safetensors")
    served = hub.repositories["models", NAME][0].files["model.safetensors"]
    assert weights.read_bytes() == served

    weights.write_bytes(served[:-9] + b"!" + served[-8:])
    done = run(hub.endpoint, tmp_path, "-c", FETCH)
    assert "does not match its hash" in done.stderr
    assert weights.read_bytes() == served
