"""plot.py on fabricated run folders: complete, honest, deterministic, and hard to break."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot  # noqa: E402

NAMES = (
    "unlearning_frontier",
    "unlearning_summary",
    "alpha_sweep",
    "grouping_interval",
    "condition_numbers",
    "sparse_probing",
    "reconstruction",
    "training_curves",
    "overview",
)
FILES = {f"{name}.{kind}" for name in NAMES for kind in ("png", "pdf")}
RUN_0_LINE = "run_0: untrained baseline on gemma-2-2b, chance accuracies; not drawn"
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
    mode, alpha, _, _, area, kappa, variance = row
    settings = settings_of(area * rng.normal(1, 0.04), rng)
    points = np.array([[s["retain_ce_rise"], s["forget_ce_rise"]] for s in settings])
    control = [{**s, "forget_ce_rise": 1.1 * s["retain_ce_rise"]} for s in settings[-10:-8]]
    kappas = 1 + (kappa - 1) * rng.lognormal(0, 0.5, 72)
    medians = kappa * np.array([0.9, 0.97, 1.03, 1.2]) * rng.normal(1, 0.02, 4)
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
        "unlearning_score": rng.uniform(0.1, 0.4) if area > 3 else None,
        "unlearning_area": plot.envelope(points, plot.BUDGETS).mean(),
        **{
            f"forget_rise_at_{b}": float(plot.envelope(points, np.array([float(b)]))[0])
            for b in ("0.01", "0.05", "0.1")
        },
        "sae_test_accuracy": 0.93,
        "llm_test_accuracy": 0.95,
    }
    for i, k in enumerate((1, 2, 5, 10, 20, 50)):
        metrics[f"sae_top_{k}_test_accuracy"] = 0.68 + 0.045 * i + rng.normal(area / 400, 0.006)
        metrics[f"llm_top_{k}_test_accuracy"] = 0.60 + 0.055 * i
    conditioning = {
        "kappa": [*map(float, kappas[1:]), None],
        "by_coactivation": [
            {"quartile": q + 1, "coactivation": 0.1 * q, "kappa_median": m}
            for q, m in enumerate(medians)
        ],
    }
    unlearning = {"area": metrics["unlearning_area"], "settings": settings, "control": control}
    return {"seed": seed, **metrics}, unlearning, conditioning


def history_of(row, seeds, rng):
    mode, alpha, _, _, _, kappa, variance = row
    for seed in seeds:
        for step in range(0, 1201, 25):
            decay, noise = np.exp(-step / 200), rng.normal(1, 0.01)
            line = {
                "seed": seed,
                "step": step,
                "tokens": 2048 * step,
                "loss": (0.5 + decay) * noise,
                "l0": (41 + 900 * np.exp(-step / 60)) * noise,
                "explained_variance": (variance - decay) * noise,
                "lambda": 0.04 + step * 1e-5,
                "l_dir": 0.88 + (0.3 * (mode == "off") + decay) * noise,
                "l_use": None if mode == "off" else 0.4 + 0.5 * decay * noise,
            }
            if step % 250 == 0:
                line["kappa_median"] = kappa + decay * noise
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


def run_plot(folder, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "plot.py")],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def run_here(folder, monkeypatch, capsys, *figures):
    """main() in this process with only the named figures: exit code and printed lines."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plot, "FIGURES", figures)
    code = plot.main()
    printed = capsys.readouterr()
    return code, (printed.out + printed.err).splitlines()


def notes_of(lines, name):
    return [line for line in lines if line.startswith(f"{name}:")]


# --- The envelope ---------------------------------------------------------------------------------


def test_envelope_by_hand():
    # (0.1, 1) and (0.2, 1.5) are on the hull, (0.15, 1.0) is below it, (0.4, 1.2) past the best
    points = np.array([[0.2, 1.5], [0.1, 1.0], [0.15, 1.0], [0.4, 1.2]])
    budgets = np.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.3])
    assert plot.envelope(points, budgets) == pytest.approx([0, 0.5, 1.0, 1.25, 1.5, 1.5])


def test_envelope_takes_negative_cost_as_free_and_keeps_the_best_of_equals():
    points = np.array([[-0.5, 0.3], [0.0, 0.2], [0.1, 0.1], [0.2, 0.5], [0.2, 0.4]])
    assert plot.envelope(points, np.array([0.0, 0.1, 0.2])) == pytest.approx([0.3, 0.4, 0.5])


def test_envelope_of_harmful_settings_is_doing_nothing():
    assert plot.envelope(np.array([[0.1, -1.0]]), plot.BUDGETS) == pytest.approx(0)


def test_envelope_is_concave_monotone_and_above_all_points():
    points = np.random.default_rng(0).uniform(0, 0.3, (200, 2))
    line = plot.envelope(points, plot.BUDGETS)
    assert (np.diff(line) >= -1e-12).all()
    assert (np.diff(line, 2) <= 1e-9).all()
    assert (plot.envelope(points, points[:, 0]) >= points[:, 1] - 1e-12).all()


# --- Whole runs of the program --------------------------------------------------------------------


def test_no_run_folder_is_an_error(tmp_path):
    (tmp_path / "run.txt").write_text("a file is no folder")
    result = run_plot(tmp_path)
    assert result.returncode == 1
    assert "no run folder" in result.stdout
    assert not (tmp_path / "figures").exists()


def test_only_the_given_baseline_is_nothing_to_draw(tmp_path):
    (tmp_path / "run_0").mkdir()
    (tmp_path / "run_0" / "final_info.json").write_text('{"eval_type_id": "sparse_probing"}')
    result = run_plot(tmp_path)
    assert result.returncode == 0
    assert not (tmp_path / "figures").exists()
    assert result.stdout.splitlines() == [RUN_0_LINE, "nothing to draw: no finished run yet"]


def test_one_run_with_one_seed_and_the_same_bytes_again(tmp_path, monkeypatch, capsys):
    fabricate(tmp_path, "run_2", seeds=(0,))
    result = run_plot(tmp_path, PYTHONHASHSEED="1")
    assert (result.returncode, result.stderr) == (0, "")
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(first) == FILES  # and no temporary file
    assert not any(b"tEXtSoftware" in data or b"CreationDate" in data for data in first.values())
    again = (plot.unlearning_frontier, plot.condition_numbers, plot.overview)
    assert run_here(tmp_path, monkeypatch, capsys, *again)[0] == 0
    for draw, kind in ((draw, kind) for draw in again for kind in ("png", "pdf")):
        name = f"{draw.__name__}.{kind}"
        assert (tmp_path / "figures" / name).read_bytes() == first[name], name


def test_ten_runs_on_an_ascii_terminal(tmp_path):
    for name in ROWS:
        fabricate(tmp_path, name, seeds=(3, 4, 5) if name == "run_10" else (0, 1, 2))
    (tmp_path / "run_0").mkdir()
    (tmp_path / "run_0" / "final_info.json").write_text('{"eval_type_id": "sparse_probing"}')
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
    code, lines = run_here(tmp_path, monkeypatch, capsys, plot.overview)
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
        plot.unlearning_frontier,
        plot.condition_numbers,
        plot.overview,
    )
    assert code == 0
    assert notes_of(lines, "run_2") == [
        "run_2: drawn without ce_score, unlearning settings, group condition numbers "
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
    for section in ("seeds", "unlearning", "conditioning", "comparisons"):
        edit(tmp_path, "run_1", lambda info, section=section: info.update({section: junk}))
        (run,), _ = plot.read_study([tmp_path / "run_1"])
        plot.table_rows([run])
    (tmp_path / "run_1" / "final_info.json").write_text(json.dumps(info))
    edit(tmp_path, "run_1", lambda info: info["means"].update(dict.fromkeys(info["means"], junk)))
    (run,), _ = plot.read_study([tmp_path / "run_1"])
    numbers = {run.stat(key)[0] for key in info["means"]}
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
    runs, _ = plot.read_study(sorted(folder.glob("run_*")))
    return plot.difference(runs[0], runs[1])


def test_differences_are_paired_over_seeds(tmp_path):
    gains = pair_of_runs(tmp_path)
    error = gains.std(ddof=1) / 3**0.5
    assert difference(tmp_path) == f"{gains.mean():+.2f} ± {error:.2f}"


def test_the_bootstrap_interval_is_shown_while_it_is_current(tmp_path):
    gains = pair_of_runs(tmp_path)

    def compare(difference):
        stored = {"unlearning_area": {"difference": difference, "low": 2.5, "high": 3.5}}
        edit(tmp_path, "run_1", lambda info: info.update(comparisons={"run_8": stored}))

    compare(gains.mean())
    assert difference(tmp_path) == f"{gains.mean():+.2f} [2.50, 3.50]"
    compare(gains.mean() + 0.5)  # run_8 was trained anew since
    assert "±" in difference(tmp_path)


def test_runs_without_a_common_seed_are_marked(tmp_path):
    fabricate(tmp_path, "run_10", seeds=(7, 8, 9))
    fabricate(tmp_path, "run_8")
    runs, _ = plot.read_study([tmp_path / "run_8", tmp_path / "run_10"])
    assert plot.difference(runs[1], runs[0]).endswith("†")


# --- Honest axes ----------------------------------------------------------------------------------


def drawn(folder, draw):
    runs, _ = plot.read_study(sorted(folder.glob("run_*"), key=lambda path: path.name))
    with matplotlib.rc_context(plot.STYLE):  # as plot.main has it
        return draw(runs).axes


def test_bars_start_at_zero_and_accuracies_at_chance(tmp_path):
    for name in ("run_2", "run_7", "run_8"):
        fabricate(tmp_path, name)
    assert all(ax.get_xlim()[0] == 0 for ax in drawn(tmp_path, plot.unlearning_summary))
    (probing,) = drawn(tmp_path, plot.sparse_probing)
    assert probing.get_ylim()[0] == 0.5
    assert probing.get_title(loc="left") == "y axis from 0.5"
    assert all(
        "y axis from" in ax.get_title(loc="left") for ax in drawn(tmp_path, plot.reconstruction)
    )


def test_accuracies_below_chance_are_not_cut_off(tmp_path):
    fabricate(tmp_path, "run_8")
    edit(tmp_path, "run_8", lambda info: info["means"].update(sae_top_1_test_accuracy=0.41))
    (probing,) = drawn(tmp_path, plot.sparse_probing)
    assert probing.get_ylim()[0] < 0.41


def test_singular_groups_keep_the_distribution_below_one(tmp_path):
    fabricate(tmp_path, "run_8")  # one group in 72 is null
    top = max(
        line.get_ydata().max()
        for line in drawn(tmp_path, plot.condition_numbers)[0].lines
        if len(line.get_xdata()) > 2
    )
    assert top == pytest.approx(71 / 72)


def test_what_was_not_recorded_is_said_in_its_panel(tmp_path):
    fabricate(tmp_path, "run_8")
    (tmp_path / "run_8" / "history.jsonl").unlink()
    panels = [*drawn(tmp_path, plot.training_curves), drawn(tmp_path, plot.condition_numbers)[1]]
    assert all(ax.texts[0].get_text() == "no finished run records this" for ax in panels)


def test_runs_of_different_precision_are_said_to_be(tmp_path):
    for name, precision in (("run_2", "bfloat16"), ("run_7", None), ("run_8", "bfloat16")):
        fabricate(tmp_path, name)
        if precision:
            where = {"environment": {"language_model_dtype": precision}}
            edit(tmp_path, name, lambda info, where=where: info.update(where))

    def note():
        runs, _ = plot.read_study(sorted(tmp_path.glob("run_*")))
        return plot.sparse_probing(runs).get_supxlabel()

    assert "language model ran" not in note()  # of run_7 it is not known
    where = {"environment": {"language_model_dtype": "float32"}}
    edit(tmp_path, "run_8", lambda info: info.update(where))
    assert "The language model ran in bfloat16 or float32" in note()


def test_every_run_has_its_own_colour_and_marker():
    assert list(plot.labels) == list(plot.COLOURS) == list(plot.MARKERS) == list(ROWS)
    assert len(set(plot.COLOURS.values())) == len(set(plot.MARKERS.values())) == len(ROWS)


def test_a_term_that_a_run_lacks_is_not_drawn_as_zero(tmp_path):
    """`off` logs L_dir and L_use as 0, which would look like the best of all, below the floor."""
    fabricate(tmp_path, "run_7")
    fabricate(tmp_path, "run_8")
    path = tmp_path / "run_8" / "history.jsonl"
    rows = [{**json.loads(line), "l_dir": 0.0, "l_use": 0.0} for line in path.open()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    panels = {ax.get_ylabel().split(",")[0]: ax for ax in drawn(tmp_path, plot.training_curves)}
    colours = {
        name: {line.get_color() for line in panels[name].lines} & set(plot.COLOURS.values())
        for name in ("L_dir", "L_use", "sparsity penalty λ")
    }
    assert colours["L_dir"] == {plot.COLOURS["run_7"]}
    assert plot.COLOURS["run_8"] not in colours["L_use"]
    assert colours["sparsity penalty λ"] == {plot.COLOURS["run_7"], plot.COLOURS["run_8"]}
    assert all(np.isfinite(ax.get_ylim()).all() for ax in panels.values())


def test_legends_name_only_what_is_drawn(tmp_path):
    fabricate(tmp_path, "run_7")
    fabricate(tmp_path, "run_8")
    runs, _ = plot.read_study(sorted(tmp_path.glob("run_*")))
    (legend,) = plot.grouping_interval(runs).legends  # no run of the sweep, so no bands
    assert not legend.get_texts()


def test_small_bars_keep_two_digits(tmp_path):
    fabricate(tmp_path, "run_8")
    edit(tmp_path, "run_8", lambda info: info["means"].update(unlearning_score=0.0374))
    panels = drawn(tmp_path, plot.unlearning_summary)
    assert [text.get_text() for text in panels[4].texts] == ["0.037"]
    assert panels[4].get_xlim()[0] == 0
