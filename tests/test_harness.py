"""Used as an agent's harness uses a template: copied, run, read, drawn, its errors fed back.

The harness knows a command, an exit code, a file, which it reads raw as the one that made run_0
did, and the end of stderr; nothing else of us. The published AI-Scientist harness expects an entry
with means of its own under every top-level key, which run_0 has not either.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small

ROOT = Path(__file__).resolve().parent.parent
FED_BACK = 1500  # characters of stderr
# The copied script runs as it is, but on the small model and texts of tests/small.py.
GUARD = 'if __name__ == "__main__":\n    sys.exit(main())\n'
SMALL_GUARD = """if __name__ == "__main__":
    sys.modules["experiment"] = sys.modules["__main__"]
    sys.path.insert(0, os.environ["TESTS"])
    import small

    small.prepare(Path(os.environ["HUB"]))
    sys.exit(main())
"""


class Harness:
    """A folder of ideas' results, and what the harness does in it."""

    def __init__(self, folder, hub):
        self.folder = folder
        self.environment = {
            "HUB": str(hub), "TESTS": str(ROOT / "tests"), "SAE_SUBSTRATE": "pythia",
            "SAE_BUDGET": "smoke", "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": str(small.THREADS)}
        script = (ROOT / "experiment.py").read_text()
        assert script.count(GUARD) == 1
        (folder / "experiment.py").write_text(script.replace(GUARD, SMALL_GUARD))
        shutil.copy(ROOT / "plot.py", folder)
        for name in ("lab", "run_0"):
            shutil.copytree(ROOT / name, folder / name)

    def command(self, *arguments, limit=600, **environment):
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, text=True, timeout=limit,
            env={**os.environ, **self.environment, **environment}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE)

    def run(self, number, **environment):
        """Exit code, and the results of a run that ended well or what is fed back of another."""
        name = f"run_{number}"
        shutil.copy(self.folder / "experiment.py", self.folder / f"{name}.py")
        done = self.command("experiment.py", f"--out_dir={name}", **environment)
        if done.returncode:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            return done.returncode, done.stderr[-FED_BACK:]
        return 0, json.loads((self.folder / name / "final_info.json").read_text())


@pytest.fixture(scope="module")
def harness(small_hub, tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("idea"), small_hub)


def check_results(info):
    """Means and standard errors as templates have them: a number, or null, under each name; beside
    them what run_0 has."""
    assert set(json.loads((ROOT / "run_0" / "final_info.json").read_text())) <= set(info)
    assert set(info["means"]) == set(info["stderrs"])
    for name in ("unlearning_area", "kappa_median", "explained_variance", "sae_test_accuracy"):
        assert isinstance(info["means"][name], float), name
        values = [row[name] for row in info["seeds"]]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        assert info["means"][name] == pytest.approx(mean)
        assert info["stderrs"][name] == pytest.approx((variance / len(values)) ** 0.5)
    flat = [*info["means"].values(), *info["stderrs"].values()]
    assert all(value is None or isinstance(value, int | float) for value in flat)


def test_a_study_from_the_harness(harness):
    code, info = harness.run(1)
    assert (code, info["run"]) == (0, "run_1")
    check_results(info)
    code, fed_back = harness.run(11)  # the model may ask for a run that does not exist
    assert code == 1
    assert fed_back.startswith("error: --out_dir ends in 'run_11', which is no row of the table")
    assert [line.split()[0] for line in fed_back.splitlines()[1:]] == [
        f"run_{i}" for i in range(1, 11)]
    assert not (harness.folder / "run_11").exists()
    code, info = harness.run(8)
    assert code == 0
    check_results(info)
    assert set(info["comparisons"]) <= {"run_7"}
    notes = (harness.folder / "notes.txt").read_text()
    for name in ("run_1", "run_8"):
        assert notes.count(f"=== {name} (written by experiment.py) ===") == 1
        assert f"=== end of {name} ===" in notes
    drawn = harness.command("plot.py", limit=600)
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert len(list((harness.folder / "figures").glob("*.png"))) == 9


def test_a_failed_run_says_why_at_the_end_of_stderr_and_can_be_run_again(harness):
    crash = """
step = CustomTrainer.step
def broken(self, *batch):
    if self.step_count == 20 and not os.path.exists("repaired"):
        raise ZeroDivisionError("the idea divides by zero")
    return step(self, *batch)
CustomTrainer.step = broken
"""
    script = harness.folder / "experiment.py"
    whole = script.read_text()
    script.write_text(whole.replace(SMALL_GUARD, crash + SMALL_GUARD))
    code, fed_back = harness.run(2)
    assert code == 1
    assert not (harness.folder / "run_2").exists()
    assert fed_back.rstrip().endswith("ZeroDivisionError: the idea divides by zero")
    assert "in broken" in fed_back  # where it happened, not only what
    assert "\r" not in fed_back  # no progress bar
    assert "it/s" not in fed_back
    assert "training, seed 0: begins" in fed_back
    (harness.folder / "repaired").touch()
    code, info = harness.run(2)
    assert (code, info["run"]) == (0, "run_2")
    script.write_text(whole)


def test_labels_are_the_first_thing_to_edit_in_plot(harness):
    """The harness has the model edit `labels`; what it names otherwise is drawn by that name."""
    lines = (harness.folder / "plot.py").read_text().splitlines()
    imports = [i for i, line in enumerate(lines) if line.startswith(("import ", "from "))]
    (place,) = (i for i, line in enumerate(lines) if line.startswith("labels = {"))
    assert not [line for line in lines[imports[-1] + 1 : place] if line and line[0] != "#"]
