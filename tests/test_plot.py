"""plot.py on fabricated run folders: complete, honest, deterministic, and hard to break."""

import ast
import json
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot  # noqa: E402
from lab.results.checksum import canonical, is_unaltered, result_checksum  # noqa: E402

NAMES = tuple(plot.FIGURES)
FILES = {f"{name}.{kind}" for name in NAMES for kind in ("png", "pdf")}
RUN_0_LINE = (
    "run_0: left out, the given baseline: an untrained SAE on gemma-2-2b, at chance"
)
ONLY_RUN_0_LINE = (
    "only the given baseline, run_0, is here, which is not drawn: "
    "begin with python experiment.py --out_dir=run_1"
)
# orthogonality, alpha, regroup_every, eta, and plausible area, median κ, explained variance
ROWS = {
    "run_1": ("adaptive", 0.1, 250, 5.0, 5.2, 1.95, 0.781),
    "run_2": ("adaptive", 0.05, 250, 5.0, 4.8, 2.05, 0.784),
    "run_3": ("adaptive", 0.01, 250, 5.0, 3.1, 2.35, 0.787),
    "run_4": ("adaptive", 0.05, 100, 5.0, 4.6, 2.02, 0.783),
    "run_5": ("adaptive", 0.05, 500, 5.0, 4.7, 2.10, 0.784),
    "run_6": ("adaptive", 0.05, 250, 0.0, 1.9, 2.01, 0.783),
    "run_7": ("fixed", 0.05, None, 0.0, 1.8, 1.94, 0.782),
    "run_8": ("off", 0.0, None, 0.0, 2.3, 2.52, 0.787),
    "run_9": ("max_cosine", 0.25, None, 0.0, 1.65, 2.17, 0.783),
    "run_10": ("adaptive", 0.1, 250, 5.0, 5.1, 1.96, 0.782),
}


def settings_of(area, rng):
    """Interventions on a saturating frontier of roughly the given area; cheaper is worse."""
    table = []
    for multiplier in np.geomspace(0.5, 64, 12):
        for n_features in (10, 20):
            retain = 0.01 * multiplier**0.9 * n_features / 10 * rng.uniform(0.8, 1.25) - 0.002
            forget = 1.6 * area * (1 - np.exp(-max(retain, 0) / 0.09)) * rng.uniform(0.75, 1.0)
            table.append(
                {
                    "threshold": 0.01,
                    "n_features": n_features,
                    "multiplier": multiplier,
                    "n_selected": n_features,
                    "forget_ce_rise": forget,
                    "retain_ce_rise": retain,
                    "retain_accuracy": max(0.3, 1 - retain),
                    "forget_accuracy": 0.25 + 0.75 * np.exp(-forget / 2.5),
                }
            )
    return table


def seed_of(row, seed, rng):
    """One seed's flat metrics, its unlearning and its conditioning."""
    *_, area, kappa, variance = row
    area *= rng.normal(1, 0.04)
    settings, costs = settings_of(area, rng), np.linspace(0, 0.3, 61)
    rises = 1.6 * area * (1 - np.exp(-costs / 0.09))
    control = [{**s, "forget_ce_rise": 1.1 * s["retain_ce_rise"]} for s in settings[-10:-8]]
    kappas = 1 + (kappa - 1) * rng.lognormal(0, 0.5, 72)
    metrics = {
        "l0": rng.normal(41, 0.5),
        "explained_variance": rng.normal(variance, 0.001),
        "ce_score": rng.normal(variance + 0.18, 0.002),
        "duplicates": float(rng.poisson(3)),
        "l_dir": 0.9,
        "l_dir_floor": 0.875,
        "l_use": 0.4,
        "kappa_random": 2.04,
        "kappa_median": np.median(kappas),
        "kappa_p90": np.quantile(kappas, 0.9),
        "kappa_max": kappas.max(),
        "accuracy_area": rng.uniform(0.05, 0.15),
        "unlearning_score": rng.uniform(0.1, 0.4) if area > 3 else None,
        "unlearning_area": float(rises.mean()),
        **{
            f"forget_rise_at_{b}": float(np.interp(float(b), costs, rises))
            for b in ("0.01", "0.05", "0.1")
        },
        "sae_test_accuracy": 0.93,
        "llm_test_accuracy": 0.95,
    }
    for i, k in enumerate((1, 2, 5, 10, 20, 50)):
        metrics[f"sae_top_{k}_test_accuracy"] = 0.68 + 0.045 * i + rng.normal(area / 400, 0.006)
        metrics[f"llm_top_{k}_test_accuracy"] = 0.60 + 0.055 * i
    conditioning = {"kappa": [*map(float, kappas[1:]), None]}
    frontier = [{"cost": c, "forget_rise": r} for c, r in zip(costs.tolist(), rises.tolist())]
    unlearning = {"frontier": frontier, "settings": settings, "control": control}
    return {"seed": seed, **metrics}, unlearning, conditioning


def history_of(row, seeds, rng):
    mode = row[0]
    for seed in seeds:
        for step in range(0, 1201, 25):
            decay, noise = np.exp(-step / 200), rng.normal(1, 0.01)
            line = {
                "seed": seed,
                "step": step,
                "tokens": 2048 * step,
                "loss": (0.5 + decay) * noise,
                "l0": (41 + 900 * np.exp(-step / 60)) * noise,
                "fit": (0.2 + decay) * noise,
                "lambda": 0.04 + step * 1e-5,
                "l_dir": 0.88 + (0.3 * (mode == "off") + decay) * noise,
                "l_use": None if mode == "off" else 0.4 + 0.5 * decay * noise,
            }
            yield json.dumps(line)


def fabricate(folder, name, seeds=(0, 1, 2), substrate="standin", budget="full"):
    """A whole finished run folder as experiment.py writes it."""
    row, rng = ROWS[name], np.random.default_rng(int(name[4:]))
    parts = [seed_of(row, seed, rng) for seed in seeds]
    metrics = {key: [part[0][key] for part in parts] for key in parts[0][0] if key != "seed"}
    whole = {key: None not in values for key, values in metrics.items()}
    info = {
        "run": name,
        "substrate": substrate,
        "budget": budget,
        "seeds": [p[0] for p in parts],
        "config": {
            "orthogonality": row[0],
            "alpha": row[1],
            "regroup_every": row[2],
            "eta": row[3],
            "target_l0": 41,
            "d_in": 576,
            "d_sae": 4608,
        },
        "means": {k: float(np.mean(v)) if whole[k] else None for k, v in metrics.items()},
        "stderrs": {
            k: float(np.std(v, ddof=1) / len(v) ** 0.5) if whole[k] and len(v) > 1 else None
            for k, v in metrics.items()
        },
        "unlearning": {"per_seed": [part[1] for part in parts]},
        "conditioning": {"per_seed": [part[2] for part in parts]},
    }
    path = folder / name
    path.mkdir()
    (path / "final_info.json").write_text(json.dumps(info))
    (path / "history.jsonl").write_text("\n".join(history_of(row, seeds, rng)) + "\n")
    return info


def edit(folder, name, change):
    """Change a run's final_info.json in place."""
    path = folder / name / "final_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def fabricate_baseline(folder):
    (folder / "run_0").mkdir()
    (folder / "run_0" / "final_info.json").write_text('{"eval_type_id": "sparse_probing"}')


def run_plot(folder, script=ROOT / "plot.py", shell=None, **environment):
    """plot.py as a person runs it; `shell` is put behind the command."""
    command = [sys.executable, "-W", "error", str(script)]
    if shell:
        command = ["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(
        command,
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def run_here(folder, monkeypatch, capsys, *figures):
    """main() in this process with only the named figures: exit code and printed lines."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plot, "FIGURES", {name: plot.FIGURES[name] for name in figures})
    code = plot.main()
    printed = capsys.readouterr()
    return code, (printed.out + printed.err).splitlines()


def notes_of(lines, name):
    return [line for line in lines if line.startswith(f"{name}:")]


def read(folder):
    runs, _ = plot.read_study(sorted(folder.glob("run_*"), key=lambda path: path.name))
    return runs


def drawn(folder, name):
    runs = read(folder)
    with matplotlib.rc_context(plot.STYLE):  # as plot.main has it
        return plot.explain(plot.FIGURES[name](runs), runs)


# --- Whole runs of the program --------------------------------------------------------------------


def test_no_run_folder_is_an_error(tmp_path):
    (tmp_path / "run.txt").write_text("a file is no folder")
    result = run_plot(tmp_path)
    assert result.returncode == 1
    assert "no run folder" in result.stdout
    assert not (tmp_path / "figures").exists()


def test_a_checkout_with_only_run_0_is_told_in_one_line_and_is_no_error(tmp_path):
    fabricate_baseline(tmp_path)
    result = run_plot(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [ONLY_RUN_0_LINE]
    assert not (tmp_path / "figures").exists()


def test_an_unfinished_run_is_nothing_to_draw_and_no_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "run_1").mkdir()
    assert run_here(tmp_path, monkeypatch, capsys) == (
        0,
        [
            "run_1: left out, unfinished (no final_info.json)",
            "nothing to draw: no finished run yet",
        ],
    )


def test_one_run_with_one_seed_and_the_same_bytes_again(tmp_path, monkeypatch, capsys):
    fabricate(tmp_path, "run_2", seeds=(0,))
    result = run_plot(tmp_path, PYTHONHASHSEED="1")
    assert (result.returncode, result.stderr) == (0, "")
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(first) == FILES  # and no temporary file
    assert not any(b"tEXtSoftware" in data or b"CreationDate" in data for data in first.values())
    again = ("unlearning_frontier", "condition_numbers", "overview")
    assert run_here(tmp_path, monkeypatch, capsys, *again)[0] == 0
    for name in (f"{name}.{kind}" for name in again for kind in ("png", "pdf")):
        assert (tmp_path / "figures" / name).read_bytes() == first[name], name


def test_ten_runs_on_an_ascii_terminal(tmp_path):
    for name in ROWS:
        fabricate(tmp_path, name, seeds=(3, 4, 5) if name == "run_10" else (0, 1, 2))
    fabricate_baseline(tmp_path)
    result = run_plot(tmp_path, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == FILES
    lines = result.stdout.splitlines()
    assert lines[0] == RUN_0_LINE
    assert lines[1].startswith("run ")
    assert len(lines) == 2 + len(ROWS) + 3  # heading, a row a run, the note and the files
    assert not any("0.500" in line for line in lines[1:])  # run_0's chance accuracies


def test_unwritable_figures_are_one_clear_line(tmp_path):
    fabricate(tmp_path, "run_8")
    (tmp_path / "figures").write_text("in the way")
    result = run_plot(tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["cannot write figures/: File exists"]


def test_the_committed_study_is_unaltered_and_drawn_whole():
    runs, notes = plot.read_study(sorted((ROOT / "study").glob("run_*")))
    assert [run.name for run in runs] == list(ROWS)
    assert notes == []
    assert plot.incomparable(runs) == []


# --- Surroundings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", [">&-", ">/dev/full", "| true", ">&- 2>&-"])
def test_nobody_reading_the_output_is_no_error(tmp_path, shell):
    fabricate_baseline(tmp_path)
    result = run_plot(tmp_path, shell=shell)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no_backend"])
def test_a_backend_that_is_not_installed_is_not_asked_for(tmp_path, backend):
    fabricate_baseline(tmp_path)
    result = run_plot(tmp_path, MPLBACKEND=backend)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_package_that_fails_to_import_is_one_line_with_the_real_cause(tmp_path):
    fabricate_baseline(tmp_path)
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text(
        'try:\n    raise OSError("libpng.so: cannot open")\nexcept OSError as error:\n'
        '    raise ImportError("please\\nread the manual") from error\n'
    )
    result = run_plot(tmp_path, PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: plot.py cannot start: OSError: libpng.so: cannot open (in ")
    assert str(tmp_path / "matplotlib") in line


def test_plot_without_the_laboratory_beside_it_names_what_is_missing(tmp_path):
    shutil.copy(ROOT / "plot.py", tmp_path)
    result = run_plot(tmp_path, tmp_path / "plot.py")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "No module named 'lab'" in line
    assert "needs lab/ beside it" in line


def test_the_laboratory_is_found_where_python_does_not_look_beside_the_script(tmp_path):
    fabricate_baseline(tmp_path)
    assert run_plot(tmp_path, PYTHONSAFEPATH="1").stdout.splitlines() == [ONLY_RUN_0_LINE]


def test_plot_imports_of_the_laboratory_only_what_reads_results_and_never_torch():
    code = "import sys, plot; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "scipy", "experiment", "lab.storage"} & set(loaded)
    nodes = ast.walk(ast.parse((ROOT / "plot.py").read_text()))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {"lab.results", *(f"lab.results.{room}" for room in (
        "checksum", "reading", "statistics"))}
    assert {name for name in modules if name.split(".")[0] == "lab"} == names


def test_plot_stays_short_enough_to_be_read():
    text = (ROOT / "plot.py").read_text()
    assert len(text.splitlines()) <= 610
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name


# --- Checksums ------------------------------------------------------------------------------------


def test_results_saved_again_with_2_for_2_0_or_in_another_order_count_as_unaltered():
    info = {"means": {"l0": 2.0, "area": 0.1}, "seeds": [{"seed": 0}], "none": float("nan")}
    info["sha256"] = result_checksum(info)
    again = json.loads('{"none": null, "seeds": [{"seed": 0.0}], "means": {"area": 1e-1, "l0": 2}}')
    again |= {"sha256": info["sha256"], "timing": {"seconds": 3}}
    assert is_unaltered(info)
    assert is_unaltered(again)
    assert is_unaltered({key: again[key] for key in again if key != "sha256"})  # nothing to check


@pytest.mark.parametrize("change", [{"l0": 2.5}, {"l0": None}, {"l0": "2"}, {"l0": True}, {}])
def test_altered_results_do_not_pass_for_unaltered(change):
    info = {"means": {"l0": 2.0}}
    checksum = result_checksum(info)
    assert not is_unaltered({"means": change, "sha256": checksum})
    assert not is_unaltered({"means": {"l0": 2.0}, "sha256": [checksum]})


def test_results_in_numpy_numbers_and_as_read_again_have_one_checksum():
    info = {"a": np.float64(2), "b": np.int64(3), "c": (np.float32(0.5), np.inf), "d": np.True_}
    assert canonical(info) == '{"a":2,"b":3,"c":[0.5,null],"d":true}'
    assert result_checksum(json.loads(canonical(info))) == result_checksum(info)


def test_results_saved_again_by_another_tool_are_drawn(tmp_path):
    fabricate(tmp_path, "run_8")
    edit(tmp_path, "run_8", lambda info: info["means"].update(l0=41.0))
    edit(tmp_path, "run_8", lambda info: info.update(sha256=result_checksum(info)))
    path = tmp_path / "run_8" / "final_info.json"
    assert ": 41.0" in path.read_text()
    path.write_text(path.read_text().replace(": 41.0", ": 41"))
    assert [run.name for run in read(tmp_path)] == ["run_8"]
    path.write_text(path.read_text().replace(": 41,", ": 42,", 1))
    (note,) = plot.read_study([tmp_path / "run_8"])[1]
    assert "altered" in note


# --- Any mixture of folders -----------------------------------------------------------------------


def test_every_unsound_folder_gets_one_line_and_the_rest_is_drawn(tmp_path, monkeypatch, capsys):
    fabricate(tmp_path, "run_1")
    fabricate(tmp_path, "run_8")
    fabricate(tmp_path, "run_3", substrate="pythia")
    fabricate(tmp_path, "run_4", budget="smoke")
    for name in ("run_2", "run_5", "run_6", "run_7", "run_9", "run_10", "run_77"):
        (tmp_path / name).mkdir()
    (tmp_path / "run_5" / "final_info.json").write_text('{"run": "run_5", "means": {"l0"')
    (tmp_path / "run_6" / "final_info.json").write_text('{"run": "run_6", "means": {}}')
    (tmp_path / "run_7" / "final_info.json").write_text("[" * 100_000)
    (tmp_path / "run_9" / "final_info.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "run_10" / "final_info.json").write_bytes(
        (tmp_path / "run_1" / "final_info.json").read_bytes()
    )
    code, lines = run_here(tmp_path, monkeypatch, capsys, "overview")
    assert code == 0
    assert (tmp_path / "figures" / "overview.png").exists()
    reasons = {
        "run_2": "unfinished",
        "run_3": "pythia/full",
        "run_4": "standin/smoke",
        "run_5": "malformed",
        "run_6": "older version",
        "run_7": "malformed",
        "run_9": "malformed",
        "run_10": "another run",
        "run_77": "labels",
    }
    for name, reason in reasons.items():
        (line,) = notes_of(lines, name)
        assert "left out" in line
        assert reason in line
    assert not notes_of(lines, "run_1")
    assert not notes_of(lines, "run_8")


def test_a_run_without_a_part_is_drawn_without_it(tmp_path, monkeypatch, capsys):
    fabricate(tmp_path, "run_2")
    edit(
        tmp_path,
        "run_2",
        lambda info: (
            info.pop("unlearning"),
            info["means"].pop("ce_score"),
            info.update(conditioning={"per_seed": [None, 3]}),
        ),
    )
    history = tmp_path / "run_2" / "history.jsonl"
    history.write_text(history.read_text()[:-40] + '\n{"seed": 0, "ste')
    code, lines = run_here(
        tmp_path,
        monkeypatch,
        capsys,
        "unlearning_frontier",
        "condition_numbers",
        "overview",
    )
    assert code == 0
    assert notes_of(lines, "run_2") == [
        "run_2: drawn without ce_score, unlearning settings, condition numbers "
        "(missing or malformed)"
    ]


def test_the_larger_study_is_drawn_and_full_wins_a_tie(tmp_path):
    for name, budget in (("run_1", "smoke"), ("run_2", "full")):
        fabricate(tmp_path, name, budget=budget)
    folders = sorted(tmp_path.iterdir())
    assert [run.name for run in plot.read_study(folders)[0]] == ["run_2"]
    fabricate(tmp_path, "run_3", budget="smoke")
    folders = sorted(tmp_path.iterdir())
    runs, notes = plot.read_study(folders)
    assert [run.name for run in runs] == ["run_1", "run_3"]
    assert notes == ["run_2: left out, standin/full while standin/smoke is drawn"]


JUNK = [None, "x", [], {}, True, float("nan"), float("inf"), 10**400, -1]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_anywhere_neither_raises_nor_becomes_a_number(tmp_path, junk):
    info = fabricate(tmp_path, "run_1")
    fabricate(tmp_path, "run_8")
    for section in (
        *("seeds", "unlearning", "conditioning", "comparisons"),
        *("environment", "evaluation_code", "datetime_epoch_millis"),
    ):
        edit(tmp_path, "run_1", lambda info, section=section: info.update({section: junk}))
        runs = read(tmp_path)
        plot.table_rows(runs)
        plot.incomparable(runs)
    (tmp_path / "run_1" / "final_info.json").write_text(json.dumps(info))
    edit(tmp_path, "run_1", lambda info: info["means"].update(dict.fromkeys(info["means"], junk)))
    run = read(tmp_path)[0]
    numbers = {run.metric(key)[0] for key in info["means"]}
    assert numbers == {-1.0} if junk == -1 else all(np.isnan(list(numbers)))


# --- The summary table ----------------------------------------------------------------------------


def pair_of_runs(folder):
    fabricate(folder, "run_1")
    fabricate(folder, "run_8")
    mine, theirs = (
        [
            seed["unlearning_area"]
            for seed in json.loads((folder / name / "final_info.json").read_text())["seeds"]
        ]
        for name in ("run_1", "run_8")
    )
    return np.array(mine) - np.array(theirs)


def difference(folder):
    mine, theirs = read(folder)
    return plot.area_gain(mine, theirs)[3]


def store_comparison(folder, difference, low=2.5, high=3.5, run="run_1", base="run_8"):
    stored = {"unlearning_area": {"difference": difference, "low": low, "high": high}}
    edit(folder, run, lambda info: info.update(comparisons={base: stored}))


def test_differences_are_paired_over_seeds(tmp_path):
    gains = pair_of_runs(tmp_path)
    error = gains.std(ddof=1) / 3**0.5
    assert difference(tmp_path) == f"{gains.mean():+.2f} ± {error:.2f}"


def test_the_stored_interval_is_shown_while_it_is_about_these_two_runs(tmp_path):
    gains = pair_of_runs(tmp_path)
    store_comparison(tmp_path, gains.mean())
    assert difference(tmp_path) == f"{gains.mean():+.2f} [2.50, 3.50]"
    store_comparison(tmp_path, gains.mean() + 0.5)  # run_8 was trained anew since
    assert "±" in difference(tmp_path)


def test_an_interval_that_the_other_run_stored_is_shown_mirrored(tmp_path):
    gains = pair_of_runs(tmp_path)
    store_comparison(tmp_path, -gains.mean(), -3.5, -2.5, run="run_8", base="run_1")
    assert difference(tmp_path) == f"{gains.mean():+.2f} [2.50, 3.50]"


def test_runs_without_a_common_seed_are_marked(tmp_path):
    fabricate(tmp_path, "run_10", seeds=(7, 8, 9))
    fabricate(tmp_path, "run_8")
    assert difference(tmp_path).endswith("†")


# --- Runs that may not be compared ----------------------------------------------------------------


def evaluated(folder, **by_run):
    """Store what runs were evaluated by, and when: (evaluation code, precision, time)."""
    for name, (code, precision, time) in by_run.items():
        environment = {"evaluation_code": code, "language_model_dtype": precision}
        environment = {key: value for key, value in environment.items() if value}
        change = {"environment": environment, "datetime_epoch_millis": time}
        edit(folder, name, lambda info, change=change: info.update(change))


OTHER_PRECISION = ("a1", "bfloat16", 1), ("a1", "float32", 2)
OTHER_CODE = ("a1", "bfloat16", 1), ("b2", "bfloat16", 2)
OLDER = (None, "bfloat16", 1), ("b2", "bfloat16", 2)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (*OTHER_PRECISION, "language_model_dtype (bfloat16 ≠ float32)"),
        (*OTHER_CODE, "evaluation_code (a1 ≠ b2)"),
        (*OLDER, "evaluation_code (not stored ≠ b2)"),
    ],
)
def test_runs_evaluated_differently_are_drawn_but_never_subtracted(tmp_path, old, new, what):
    gains = pair_of_runs(tmp_path)
    store_comparison(tmp_path, gains.mean())  # even if somebody did
    evaluated(tmp_path, run_1=old, run_8=new)
    assert difference(tmp_path) == "n/c"
    line = (
        "Not compared (n/c): run_1 with run_8, the newest. They differ in "
        f"{what}. Repeat run_1."
    )
    assert plot.incomparable(read(tmp_path)) == [line]
    figure = drawn(tmp_path, "overview")
    assert what in figure.get_supxlabel().replace("\n", " ")
    dotted = [line for ax in figure.axes[3:] for line in ax.lines if line.get_linestyle() == ":"]
    assert not dotted  # the vanilla SAE's


def test_the_printed_line_names_who_differs_and_the_table_has_n_c(tmp_path, monkeypatch, capsys):
    for name in ("run_1", "run_2", "run_8"):
        fabricate(tmp_path, name)
    old, new = OTHER_PRECISION
    evaluated(tmp_path, run_1=old, run_2=old, run_8=new)
    code, lines = run_here(tmp_path, monkeypatch, capsys)
    assert code == 0
    assert lines[0] == (
        "Not compared (n/c): run_1, run_2 with run_8, the newest. They differ in "
        "language_model_dtype (bfloat16 ≠ float32). Repeat run_1, run_2."
    )
    assert ["n/c" in line for line in lines[2:5]] == [True, True, False]


def test_runs_without_a_stored_evaluation_code_are_compared(tmp_path):
    pair_of_runs(tmp_path)
    evaluated(tmp_path, run_1=(None, "bfloat16", 1), run_8=(None, "bfloat16", 2))
    assert "±" in difference(tmp_path)
    assert plot.incomparable(read(tmp_path)) == []


def test_sweeps_draw_no_band_of_a_run_that_may_not_be_compared(tmp_path):
    for name in ("run_1", "run_2", "run_7", "run_8"):
        fabricate(tmp_path, name)

    def bands():
        (legend,) = drawn(tmp_path, "alpha_sweep").legends
        return [text.get_text()[0] for text in legend.get_texts()]

    assert bands() == ["2", "1", "7", "8"]
    old, new = OTHER_PRECISION
    evaluated(tmp_path, run_1=new, run_2=new, run_7=new, run_8=old)
    assert bands() == ["2", "1", "7"]


def test_sweeps_do_not_connect_runs_that_may_not_be_compared(tmp_path):
    for name in ("run_1", "run_2"):
        fabricate(tmp_path, name)

    def connected():
        lines = drawn(tmp_path, "alpha_sweep").axes[0].lines
        return any(len(line.get_xdata()) == 2 and line.get_color() == plot.INK for line in lines)

    assert connected()
    evaluated(tmp_path, **dict(zip(("run_1", "run_2"), OTHER_CODE)))
    assert not connected()


# --- Honest figures -------------------------------------------------------------------------------


def test_no_text_of_any_figure_overlaps_another(tmp_path, monkeypatch):
    for name in ROWS:
        fabricate(tmp_path, name, seeds=(7, 8, 9) if name == "run_10" else (0, 1, 2))
    texts, draw = [], Text.draw

    def spy(text, renderer):
        if text.get_text().strip():
            texts.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    for name in plot.FIGURES:
        figure = drawn(tmp_path, name)
        texts.clear()
        with matplotlib.rc_context(plot.STYLE), monkeypatch.context() as patch:
            patch.setattr(Text, "draw", spy)
            FigureCanvasAgg(figure).draw()
        assert len(texts) > 20
        for (one, box), (other, second) in combinations(texts, 2):
            shared = box.intersection(box, second)
            assert shared is None or min(shared.width, shared.height) < 2, (name, one, other)
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for _, box in texts), name


def test_figures_explain_the_terms_that_their_panels_use(tmp_path):
    fabricate(tmp_path, "run_8")
    notes = {name: drawn(tmp_path, name).get_supxlabel() for name in plot.FIGURES}
    assert all(term in notes["overview"] for term in ("area:", "κ:", "TPP:", "Arrows"))
    assert "κ:" not in notes["sparse_probing"]
    assert "Probes" not in notes["condition_numbers"]
    assert all("budget full, seeds a run: 3" in note for note in notes.values())


def test_metrics_start_at_zero_and_accuracies_at_chance(tmp_path):
    for name in ("run_2", "run_7", "run_8"):
        fabricate(tmp_path, name)
    panels = drawn(tmp_path, "unlearning_summary").axes
    assert [ax.get_xlim()[0] for ax in (panels[0], *panels[2:])] == [0] * 3
    probing = drawn(tmp_path, "sparse_probing").axes[2]
    assert probing.get_ylim()[0] == 0.5
    assert probing.get_ylabel() == "probe accuracy, chance 0.5 (axis from 0.5)"
    assert drawn(tmp_path, "alpha_sweep").axes[3].get_ylim()[0] == 0.5


def test_axes_cut_above_zero_say_so(tmp_path):
    for name in ("run_2", "run_7", "run_8"):
        fabricate(tmp_path, name)
    panels = drawn(tmp_path, "reconstruction").axes
    assert [("axis from" in ax.get_xlabel()) for ax in panels] == [False, True, True]
    assert not any("axis from" in ax.get_ylabel() for ax in panels)


def test_accuracies_below_chance_are_not_cut_off(tmp_path):
    fabricate(tmp_path, "run_8")
    edit(tmp_path, "run_8", lambda info: info["means"].update(sae_top_1_test_accuracy=0.41))
    assert drawn(tmp_path, "sparse_probing").axes[2].get_ylim()[0] < 0.41


def test_singular_groups_keep_the_distribution_below_one(tmp_path):
    fabricate(tmp_path, "run_8")  # one group in 72 is null
    curves = drawn(tmp_path, "condition_numbers").axes[2]
    top = max(line.get_ydata().max() for line in curves.lines if len(line.get_xdata()) > 2)
    assert top == pytest.approx(71 / 72)


def test_the_frontier_is_the_mean_of_the_seeds_as_they_were_judged(tmp_path):
    info = fabricate(tmp_path, "run_8")
    judged = [[point["forget_rise"] for point in seed["frontier"]]
              for seed in info["unlearning"]["per_seed"]]
    (line, *_) = drawn(tmp_path, "overview").axes[0].lines
    assert line.get_ydata()[::5] == pytest.approx(np.mean(judged, 0))
    assert info["means"]["unlearning_area"] == pytest.approx(np.mean(judged))


def test_a_settings_cost_is_its_largest_rise_on_any_text_but_the_forgotten(tmp_path):
    fabricate(tmp_path, "run_8")
    rows = [{"forget_ce_rise": 2.0, "retain_ce_rise": 0.1, "news_ce_rise": 0.2},
            {"forget_ce_rise": 1.0, "retain_ce_rise": 0.3, "news_ce_rise": None},
            {"forget_ce_rise": None, "retain_ce_rise": 0.3}, {"forget_ce_rise": 1.0}]
    edit(tmp_path, "run_8", lambda info: info["unlearning"]["per_seed"][0].update(settings=rows))
    assert read(tmp_path)[0].settings()[0].tolist() == [[0.2, 2.0], [0.3, 1.0]]


def test_every_frontier_and_area_shows_what_labels_alone_give(tmp_path):
    curve = [{"cost": float(cost), "forget_rise": 4 * float(cost)} for cost in plot.COSTS[::100]]
    directions = {"mean_difference": {"unlearning_area": 0.6, "frontier": curve},
                  "logistic_regression": {"unlearning_area": 0.5, "frontier": None}}
    for name in ("run_7", "run_8"):
        fabricate(tmp_path, name)
        edit(tmp_path, name, lambda info: info.update(yardstick=directions))
    runs = read(tmp_path)
    for ax in [drawn(tmp_path, "overview").axes[0], *drawn(tmp_path, "unlearning_frontier").axes]:
        (line,) = [line for line in ax.lines if str(line.get_label()).startswith("labels alone")]
        assert line.get_ydata() == pytest.approx(4 * plot.COSTS)
    summary = drawn(tmp_path, "unlearning_summary").axes[0]
    assert {0.5, 0.6} <= {line.get_xdata()[0] for line in summary.lines}
    explained = {name for name in plot.FIGURES if "Labels alone"
                 in drawn(tmp_path, name).get_supxlabel().replace("\n", " ")}
    assert explained == {"overview", "unlearning_frontier", "unlearning_summary"}
    assert [row[:2] for row in plot.table_rows(runs)[2:]] == [
        ["labels alone: difference of means", "0.60"],
        ["labels alone: logistic regression", "0.50"]]


def test_the_printed_table_has_every_column_also_above_what_labels_alone_give(
        tmp_path, monkeypatch, capsys):
    fabricate(tmp_path, "run_8")
    directions = {"mean_difference": {"unlearning_area": 0.6, "frontier": None}}
    edit(tmp_path, "run_8", lambda info: info.update(yardstick=directions))
    _, lines = run_here(tmp_path, monkeypatch, capsys)
    (head,) = [line for line in lines if line.startswith("run  ")]
    assert head.split("  ")[-1].strip() == plot.TABLE_HEAD[-1]
    (alone,) = [line for line in lines if line.startswith("labels alone")]
    assert alone.split() == ["labels", "alone:", "difference", "of", "means", "0.60"]


def test_no_yardstick_stands_for_runs_that_were_measured_otherwise(tmp_path):
    for name, code in (("run_7", "a"), ("run_8", "b")):
        fabricate(tmp_path, name)
        changes = {"yardstick": {"mean_difference": {"unlearning_area": 0.6}},
                   "environment": {"evaluation_code": code}}
        edit(tmp_path, name, lambda info, changes=changes: info.update(changes))
    assert plot.table_rows([]) == []
    assert [row[0] for row in plot.table_rows(read(tmp_path))] == ["7 · fixed orthogonal",
                                                                   "8 · vanilla (off)"]


def test_what_was_not_measured_is_said_in_its_panel(tmp_path):
    fabricate(tmp_path, "run_8")
    (tmp_path / "run_8" / "history.jsonl").unlink()
    edit(tmp_path, "run_8", lambda info: info["means"].pop("ce_score"))
    panels = [*drawn(tmp_path, "training_curves").axes, drawn(tmp_path, "reconstruction").axes[2]]
    assert all("not measured" in [text.get_text() for text in ax.texts] for ax in panels)


def test_every_run_has_its_own_colour_and_marker():
    assert list(plot.labels) == list(plot.LOOKS) == list(ROWS)
    for kind in ("color", "marker"):
        assert len({look[kind] for look in plot.LOOKS.values()}) == len(ROWS)


def test_a_term_that_a_run_lacks_is_not_drawn_as_zero(tmp_path):
    """`off` logs L_dir and L_use as 0, which would look like the best of all, below the floor."""
    fabricate(tmp_path, "run_7")
    fabricate(tmp_path, "run_8")
    path = tmp_path / "run_8" / "history.jsonl"
    rows = [{**json.loads(line), "l_dir": 0.0, "l_use": 0.0} for line in path.open()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    panels = drawn(tmp_path, "training_curves").axes
    fixed, off = (plot.LOOKS[name]["color"] for name in ("run_7", "run_8"))
    colours = [{line.get_color() for line in ax.lines} & {fixed, off} for ax in panels]
    assert colours == [{fixed, off}] * 3 + [{fixed}] * 2 + [{fixed, off}]
    assert all(np.isfinite(ax.get_ylim()).all() for ax in panels)


def test_legends_name_only_what_is_drawn(tmp_path):
    fabricate(tmp_path, "run_7")
    fabricate(tmp_path, "run_8")
    (legend,) = drawn(tmp_path, "grouping_interval").legends  # no run of the sweep, so no bands
    assert not legend.get_texts()


def test_the_overview_sets_forgetting_and_separation_against_explained_variance(tmp_path):
    for name in ("run_2", "run_8"):
        fabricate(tmp_path, name)
        edit(tmp_path, name, lambda info: info["means"].update({plot.TPP: info["means"]["l0"]}))
    runs = {run.name: run for run in read(tmp_path)}
    for panel, key in zip(drawn(tmp_path, "overview").axes[1:], ("unlearning_area", plot.TPP)):
        points = [bar.lines[0].get_xydata()[0].tolist() for bar in panel.containers]
        assert points == [[runs[name].metric("explained_variance")[0], runs[name].metric(key)[0]]
                          for name in ("run_2", "run_8")]


def test_small_values_keep_two_digits(tmp_path):
    fabricate(tmp_path, "run_8")
    edit(tmp_path, "run_8", lambda info: info["means"].update(unlearning_score=0.0374))
    panels = drawn(tmp_path, "unlearning_summary").axes
    assert [text.get_text() for text in panels[2].texts] == ["0.037"]
    assert panels[2].get_xlim()[0] == 0
