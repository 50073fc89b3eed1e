"""Where a run may find itself: under a number without name or home, in a profiler, in a tracer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small

ROOT = Path(__file__).resolve().parent.parent
NAMELESS = """
import pwd

def nobody(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

pwd.getpwuid = nobody
"""
HOMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "HF_HOME", "XDG_CACHE_HOME",
         "XDG_CONFIG_HOME", "WANDB_DIR", "MPLCONFIGDIR")
UNSHARE = ("unshare", "--user", "--map-user=54321")


def namespaces_work():
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def nameless(tmp_path):
    """Runs a script in an empty folder under a number that has no name and no home; where the
    system has no user namespaces, Python is told so."""
    folder, patch = tmp_path / "empty", tmp_path / "patch"
    folder.mkdir()
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(NAMELESS)
    launch, path = (UNSHARE, "") if namespaces_work() else ((), str(patch))

    def run(*command, **environment):
        plain = {key: value for key, value in small.inherited().items() if key not in HOMES}
        done = subprocess.run([*launch, sys.executable, *map(str, command)], cwd=folder, text=True,
                              env={**plain, "PYTHONPATH": path, "SAE_CACHE_DIR": ".cache",
                                   "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **environment},
                              capture_output=True)
        assert "Traceback" not in done.stderr, done.stderr[-1500:]
        assert not (folder / "~").exists()
        return done

    return run


def test_help_and_errors_need_neither_a_home_nor_a_name(nameless, tmp_path):
    done = nameless(ROOT / "experiment.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "run_10" in done.stdout
    done = nameless(ROOT / "experiment.py", "--out_dir=run_11", SAE_CACHE_DIR="~/sae")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --out_dir ends in 'run_11'")


def test_a_run_needs_neither_a_home_nor_a_name(nameless, small_hub, tmp_path):
    """Libraries keep in the cache what they would keep at home; wandb too."""
    done = nameless(small.__file__, small_hub, "x", 0, "never", "--out_dir=run_1",
                    SAE_SUBSTRATE="pythia", SAE_BUDGET="smoke")
    assert done.returncode == 0, done.stderr[-1500:]
    assert "wandb is off" not in done.stderr
    folder = tmp_path / "empty"
    assert (folder / "run_1" / "final_info.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == [".cache", "notes.txt", "run_1"]


def test_a_home_that_is_there_stays_the_home():
    program = "import os, lab; print(os.environ['HOME'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "HOME": "/some/home"}, check=True)
    assert done.stdout == "/some/home\n"


@pytest.mark.parametrize("launcher", [
    ("-m", "cProfile", "-o", "profile"),
    ("-m", "trace", "--trace", f"--ignore-dir={sys.prefix}:{sys.base_prefix}"),
], ids=lambda words: words[1])
def test_help_comes_under_pythons_profiler_and_tracer(launcher, tmp_path):
    done = subprocess.run([sys.executable, *launcher, ROOT / "experiment.py", "--help"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "Traceback" not in done.stderr
    assert "run_10" in done.stdout
