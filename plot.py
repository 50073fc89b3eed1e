"""Draw the study: every finished run folder ./run_* in one visual language, into ./figures/.

    python plot.py                     # the runs of the folder you are in
    cd study && python ../plot.py      # the committed study

Each figure is a PNG and a PDF. What cannot be drawn is named with the reason. Of several substrates
or budgets the one with most runs is drawn. Runs evaluated differently are never subtracted.
"""

import json
import math
import os
import re
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, zip_longest
from pathlib import Path

# What is drawn, in this order, and how legends name it. Any other folder is left out.
labels = {
    "run_1": "adaptive, α 0.1",
    "run_2": "adaptive, α 0.05",
    "run_3": "adaptive, α 0.01",
    "run_4": "adaptive, regroup 100",
    "run_5": "adaptive, regroup 500",
    "run_6": "direction only (η 0)",
    "run_7": "fixed orthogonal",
    "run_8": "vanilla (off)",
    "run_9": "OrtSAE (max cosine)",
    "run_10": "best, fresh seeds",
}
OFF, FIXED = "run_8", "run_7"  # what the others are compared with
DIRECTIONS = {"mean_difference": "difference of means",
              "logistic_regression": "logistic regression"}
SWEEPS = {"alpha": ("run_1", "run_2", "run_3"), "regroup_every": ("run_4", "run_2", "run_5")}

os.environ["MPLBACKEND"] = "agg"  # figures are files; a notebook's backend may not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))  # where lab/ is
try:
    import matplotlib.lines
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from lab.results import statistics
    from lab.results.checksum import is_unaltered
    from lab.results.reading import dicts, dig, number, numbers
    from lab.results.statistics import comparability, differences, mean_stderr
except Exception as error:
    place, cause = traceback.extract_tb(error.__traceback__)[-1].filename, error
    while cause.__cause__:
        cause = cause.__cause__
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())
    raise SystemExit(f"error: plot.py cannot start: {reason} (in {place}). It needs lab/ beside it "
                     "and the packages of requirements.txt") from error

# One colour, marker and dash a run, everywhere. Any two colours differ by more than 25 in CIELAB,
# seen with protanopia, deuteranopia or tritanopia as well; markers and dashes say it once more.
COLOURS = ("#4D00A1", "#1141FE", "#03B5FF", "#8BB587", "#4B253D", "#A07932", "#EF9700", "#777777",
           "#AE32A0", "#700000")
LOOKS = {name: {"color": colour, "marker": marker, "linestyle": dash} for name, colour, marker, dash
         in zip(labels, cycle(COLOURS), cycle("os^DvPXh<*"), cycle(["-"] * 5 + ["--"] * 4 + ["-"]))}
INK = "#444444"  # remarks
REFERENCE = {"color": INK, "linewidth": 1.3, "zorder": 1.6}
DASHES = dict(zip(DIRECTIONS, ("-.", (0, (5, 3)))))  # of the yardstick
STYLE = {
    "figure.constrained_layout.use": True, "savefig.dpi": 150, "pdf.fonttype": 42, "font.size": 9,
    "axes.titlelocation": "left", "axes.titlesize": 9, "legend.frameon": False, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#E6E6E6",
}
FOLDER, TPP = Path("figures"), "tpp_threshold_20_total_metric"
COSTS = np.linspace(0, statistics.FRONTIER_END, 301)  # nats
PROBES = {**{str(k): f"_top_{k}_test_accuracy" for k in (1, 2, 5, 10, 20, 50)},
          "all": "_test_accuracy"}  # metrics by the number of features a probe may use
METRICS = {  # name (the arrow is the better direction), format, where its axis begins if it can
    "unlearning_area": ("unlearning area (nats) ↑", ".2f", 0),
    "area_gain": ("minus vanilla's (95 %) ↑", "", math.nan),
    "unlearning_score": ("SAEBench score ↑", ".3f", 0),
    "accuracy_area": ("area of accuracies ↑", ".3f", 0),
    TPP: ("TPP, 20 features ↑", ".3f", 0),
    "sae_top_1_test_accuracy": ("top-1 probe ↑", ".3f", math.nan),
    "sae_top_5_test_accuracy": ("top-5 probe ↑", ".3f", math.nan),
    "l0": ("L0", ".1f", 0),
    "explained_variance": ("expl. variance ↑", ".3f", math.nan),
    "ce_score": ("CE score ↑", ".3f", math.nan),
    "kappa_median": ("median κ ↓", "#.3g", 1),
    "kappa_p90": ("90th percentile κ ↓", "#.3g", 1),
    "duplicates": ("duplicates ↓", ".1f", 0),
}
TABLE = list(METRICS)[-7:]
TABLE_HEAD = ["run", "area ± se ↑", "area - vanilla", "area - fixed",
              *(METRICS[key][0] for key in TABLE)]
TABLE_NOTE = """\
Differences of areas (nats) are paired over seeds, with the 95 % interval if a run has one, or
± standard error. †: no seed in common. n/c: not comparable. Labels alone: no SAE."""
TERMS = {  # what a figure explains if a panel names it
    "[↑↓↗]": "Arrows show the better direction, dotted vertical lines (if any) the vanilla SAE.",
    "area|forget": "Unlearning area: forgetting, averaged over costs from 0 to 0.3 nats. "
    "Forgetting: rise of cross-entropy (CE) on the text to forget when SAE features are clamped. "
    "Cost: the largest rise on a text that is to be kept.",
    "vanilla's": "Minus vanilla's: paired over seeds, bars are 95 % intervals or else ± standard "
    "errors; †: no seed in common, n/c: not comparable.",
    "accuracies": "Area of accuracies: the same for questions.",
    "TPP": "TPP: how much more a class's probe loses without its 20 features than others do.",
    "κ": "κ: condition number of the directions of features that fire together, 1 if orthogonal.",
    "CE score": "CE score: 1 if the SAE keeps the language model's loss, 0 if as bad as ablation.",
    "probe": "Probes tell classes of text apart from the k best features; chance is 0.5.",
}


# --- Reading: whatever lies in a folder becomes clean numbers, NaN, or a reason ------------------
def frontier(block: dict) -> np.ndarray | None:
    """Forgetting at each of COSTS as it was judged, if it was."""
    points = numbers(dicts(block, "frontier"), "cost", "forget_rise")
    return np.interp(COSTS, *points.T) if len(points) and np.isfinite(points).all() else None


@dataclass
class Run:
    """A finished run and views of it in clean numbers; lists hold an array a seed."""

    name: str
    info: dict
    history: list[dict[str, float]]

    @property
    def label(self) -> str:
        return f"{self.name.removeprefix('run_')} · {labels[self.name]}"

    @property
    def study(self) -> tuple[str, str]:
        return self.info["substrate"], self.info["budget"]

    def config(self, key: str) -> float:
        return number(self.info["config"].get(key))

    def metric(self, key: str) -> tuple[float, float]:
        """Mean and standard error over seeds."""
        return number(self.info["means"].get(key)), abs(number(self.info["stderrs"].get(key)))

    def by_seed(self, key: str) -> dict[float, float]:
        rows = numbers(dicts(self.info, "seeds"), "seed", key)
        return dict(rows[np.isfinite(rows[:, 0])].tolist())

    def settings(self, kind: str = "settings") -> list[np.ndarray]:
        """Interventions by seed, [n, (cost, forget CE rise)]; cost is the largest other rise."""
        points = []
        for seed in dicts(self.info, "unlearning", "per_seed"):
            rows = dicts(seed, kind)
            texts = {key for row in rows for key in row if key.endswith("_ce_rise")}
            rises = numbers(rows, "forget_ce_rise", *sorted(texts - {"forget_ce_rise"}))
            cost = np.fmax.reduce(rises[:, 1:], 1, initial=-np.inf)
            points.append(np.column_stack([cost, rises[:, 0]]))
        return [part for rows in points if len(part := rows[np.isfinite(rows).all(1)])]

    def frontiers(self) -> list[np.ndarray]:
        """Forgetting at each of COSTS by seed, as it was judged."""
        curves = [frontier(seed) for seed in dicts(self.info, "unlearning", "per_seed")]
        return [part for part in curves if part is not None]

    def kappas(self) -> list[np.ndarray]:
        """All condition numbers by seed; null means singular, and counts as infinite."""
        lists = [seed.get("kappa") for seed in dicts(self.info, "conditioning", "per_seed")]
        arrays = [np.array([number(k) for k in ks]) for ks in lists if isinstance(ks, list) and ks]
        return [np.where(ks >= 1, ks, np.inf) for ks in arrays]


def read_info(folder: Path) -> dict:
    """The run's final_info.json; ValueError says why the folder is left out."""
    if folder.name == "run_0":
        raise ValueError("the given baseline: an untrained SAE on gemma-2-2b, at chance")
    if folder.name not in labels:
        raise ValueError("not in `labels` at the top of plot.py")
    try:
        info = json.loads((folder / "final_info.json").read_bytes())
        unaltered = isinstance(info, dict) and is_unaltered(info)
    except FileNotFoundError:
        raise ValueError("unfinished (no final_info.json)") from None
    except OSError as error:
        raise ValueError(f"final_info.json cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ValueError("final_info.json is malformed") from None
    needed = {"substrate": str, "budget": str, "config": dict, "means": dict, "stderrs": dict}
    if missing := [key for key, kind in needed.items() if not isinstance(dig(info, key), kind)]:
        raise ValueError(f"final_info.json lacks {', '.join(missing)} (older version?)")
    if info.get("run", folder.name) != folder.name:
        raise ValueError("final_info.json is of another run")
    if not unaltered:
        raise ValueError("final_info.json was altered since the run wrote it")
    return info


def read_history(path: Path) -> list[dict[str, float]]:
    """Logged steps; a line cut short or without its place in training is dropped."""
    history = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        entry = {key: number(entry[key]) for key in entry} if isinstance(entry, dict) else {}
        if all(math.isfinite(entry.get(key, math.nan)) for key in ("seed", "step", "tokens")):
            history.append(entry)
    return history


def lacks(run: Run) -> list[str]:
    """What a reader of the figures would miss of this run."""
    parts = {key: math.isfinite(run.metric(key)[0]) for key in ("unlearning_area", *TABLE[:-1])}
    parts |= {"unlearning settings": run.settings(), "condition numbers": run.kappas(),
              "results by seed": run.by_seed("seed"), "training history": run.history}
    return [name for name, part in parts.items() if not part]


def read_study(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs to draw together, and one line a folder on what is left out and why."""
    runs, notes = {}, {}
    for folder in folders:
        try:
            history = folder / "history.jsonl"
            run = runs[folder.name] = Run(folder.name, read_info(folder), read_history(history))
            if missing := lacks(run):
                notes[run.name] = f"drawn without {', '.join(missing)} (missing or malformed)"
        except (ValueError, OSError) as reason:
            notes[folder.name] = f"left out, {reason}"
    counts = Counter(run.study for run in runs.values())
    drawn = max(counts, key=lambda study: (counts[study], study[1] != "smoke", study), default=None)
    for run in runs.values():
        if run.study != drawn:
            notes[run.name] = f"left out, {'/'.join(run.study)} while {'/'.join(drawn)} is drawn"
    order = [runs[name] for name in labels if name in runs and runs[name].study == drawn]
    return order, [f"{name}: {notes[name]}" for folder in folders if (name := folder.name) in notes]


# --- Comparing: only what was measured alike is subtracted ---------------------------------------
def comparable(*runs: Run) -> bool:
    return not any(differences(runs[0].info, run.info) for run in runs)


def yardstick(runs: list[Run]) -> dict[str, dict]:
    """Results of the directions that labels give without an SAE, if the same for all runs."""
    found = [(name, dig(run.info, "yardstick", name)) for run in runs[:1] for name in DIRECTIONS]
    return {name: part for name, part in found if isinstance(part, dict) and comparable(*runs)}


def incomparable(runs: list[Run]) -> list[str]:
    """Which runs may not be compared with the newest one, a line for all that differ alike."""
    newest = max(runs, key=lambda run: np.nan_to_num(number(run.info.get("datetime_epoch_millis"))))
    now, groups = comparability(newest.info), {}
    for run in runs:
        what = ", ".join(f"{key} ({value or 'not stored'} ≠ {now[key] or 'not stored'})"
                         for key, value in comparability(run.info).items() if value != now[key])
        groups.setdefault(what, []).append(run.name)
    return [f"Not compared (n/c): {', '.join(names)} with {newest.name}, the newest. They differ "
            f"in {what}. Repeat {', '.join(names)}." for what, names in groups.items() if what]


def show(value: float, form: str = ".2f") -> str:
    return "n/a" if math.isnan(value) else format(value, form)


def area_gain(run: Run, base: Run | None) -> tuple[float, float, float, str]:
    """Unlearning area minus the base's: mean, ends of its error bar, text. A stored interval serves
    only while it is about these two; either may be repeated."""
    if base is None or run is base or not comparable(run, base):
        return *[math.nan] * 3, "-" if base is None or run is base else "n/c"
    key = "unlearning_area"
    ours, theirs = run.by_seed(key), base.by_seed(key)
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    means, errors = zip(run.metric(key), base.metric(key))
    mean, stderr = mean_stderr(pairs) if pairs else (means[0] - means[1], math.hypot(*errors))
    for one, other, sign in ((run, base, 1), (base, run, -1)):
        stored = dig(one.info, "comparisons", other.name, key)
        middle, *ends = (sign * number(dig(stored, part)) for part in ("difference", "low", "high"))
        low, high = sorted(ends)
        if pairs and math.isclose(middle, mean, rel_tol=1e-3, abs_tol=1e-6) and low <= mean <= high:
            return mean, low, high, f"{mean:+.2f} [{low:.2f}, {high:.2f}]"
    text = f"{show(mean, '+.2f')} ± {show(stderr)}{'' if pairs else ' †'}"
    return mean, mean - stderr, mean + stderr, text


def table_rows(runs: list[Run]) -> list[list[str]]:
    """One row a run, in the columns of TABLE_HEAD."""
    bases = [next((run for run in runs if run.name == name), None) for name in (OFF, FIXED)]
    return [[run.label, " ± ".join(map(show, run.metric("unlearning_area"))),
             *(area_gain(run, base)[3] for base in bases),
             *(show(run.metric(key)[0], METRICS[key][1]) for key in TABLE)] for run in runs] + [
        [f"labels alone: {DIRECTIONS[name]}", show(number(part.get("unlearning_area")))]
        for name, part in yardstick(runs).items()]


def curve(run: Run, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (millions), mean and standard error of a logged quantity, where all seeds log it."""
    seeds: dict[float, dict[float, float]] = {}
    for entry in run.history:
        if math.isfinite(entry.get(key, math.nan)):
            seeds.setdefault(entry["seed"], {})[entry["tokens"]] = entry[key]
    tokens = sorted(set.intersection(*map(set, seeds.values()))) if seeds else []
    values = [[seed[place] for place in tokens] for seed in seeds.values()] or [[]]
    return np.array(tokens) / 1e6, *mean_stderr(values)


# --- Panels: each draws one thing on given axes --------------------------------------------------
def draw_line(ax: Axes, run: Run, x: np.ndarray, mean: np.ndarray, stderr: np.ndarray) -> None:
    """A run's line with its band of one standard error; markers are staggered to stay apart."""
    look, place = LOOKS[run.name], list(LOOKS).index(run.name) / len(LOOKS)
    ax.plot(x, mean, **look, markevery=(0.14 * place, 0.14))
    ax.fill_between(x, mean - stderr, mean + stderr, color=look["color"], alpha=0.15, linewidth=0)


def draw_points(ax: Axes, run: Run, x: object, y: object, **look: object) -> None:
    """A run's points with their standard errors, unconnected unless a linestyle is given."""
    ax.errorbar(x, y, **{**LOOKS[run.name], "linestyle": "none", "capsize": 2.5, **look})


def finish(ax: Axes, title: str, xlabel: str, ylabel: str, floor: float = math.nan) -> bool:
    """Name panel and axes, start y at its floor if it can, own up to cut axes; False if empty."""
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if not np.isfinite(ax.dataLim.get_points()).all():
        ax.text(0.5, 0.5, "not measured", color=INK, ha="center", transform=ax.transAxes)
        ax.set(xscale="linear", yscale="linear", xticks=[], yticks=[])
        return False
    low, high = ax.get_ylim()
    if ax.dataLim.y0 >= floor:
        ax.set_ylim(floor, high + 0.04 * (high - floor))
    elif high - low < 0.02 * high:  # noise must not fill a panel
        ax.set_ylim((low + high) / 2 - 0.01 * high, (low + high) / 2 + 0.01 * high)
    for axis in ax.xaxis, ax.yaxis:
        if axis.get_scale() == "linear" and (start := min(axis.get_view_interval())) > 0:
            axis.set_label_text(f"{axis.get_label_text()} (axis from {start:.3g})".strip())
    return True


def metric_panel(ax: Axes, runs: list[Run], key: str) -> None:
    """A metric in rows, a run each: value, error bar, and number; dotted, where vanilla is."""
    base = next((run for run in runs if run.name == OFF), None)
    for row, run in enumerate(runs):
        (value, stderr), text = run.metric(key), show(run.metric(key)[0], METRICS[key][1])
        low, high = value - stderr, value + stderr
        if key == "area_gain":
            value, low, high, text = area_gain(run, base)
        draw_points(ax, run, value, row, xerr=[[value - low], [high - value]])
        ax.text(1.03, row, text.partition(" [")[0], transform=ax.get_yaxis_transform(), va="center")
    for name, part in yardstick(runs).items():
        ax.axvline(number(part.get(key)), linestyle=DASHES[name], **REFERENCE)
    if base and comparable(*runs):
        ax.axvline(0 if key == "area_gain" else base.metric(key)[0], linestyle=":", **REFERENCE)
    floor, high = METRICS[key][2], ax.get_xlim()[1]
    if ax.dataLim.x0 >= floor:
        ax.set_xlim(floor, high + 0.1 * (high - floor))
    ax.locator_params(axis="x", nbins=4)
    finish(ax, METRICS[key][0], "", "")
    ax.set(yticks=range(len(runs)), yticklabels=[run.label for run in runs],
           ylim=(max(len(runs), 4) - 0.5, -0.5))
    ax.label_outer()


def frontier_panel(ax: Axes, runs: list[Run], title: str, detailed: bool) -> None:
    """Best forgetting at each cost, a line a run; in detail its error and every setting a dot."""
    def dots(tables: list[np.ndarray], **look: object) -> None:
        points = np.vstack(tables).clip(min=(0, -np.inf))
        ax.plot(*points[points[:, 0] <= COSTS[-1]].T, linestyle="none", markersize=3.5, **look)
    for run in runs:
        if curves := run.frontiers():
            mean, stderr = mean_stderr(curves)
            draw_line(ax, run, COSTS, mean, stderr if detailed else math.nan * stderr)
            if detailed and (tables := run.settings()):
                dots(tables, marker=".", color=LOOKS[run.name]["color"], alpha=0.3)
    if detailed and (control := [part for run in runs for part in run.settings("control")]):
        dots(control, marker="x", color=INK, label="random features of\nequal frequency")
    for name, part in yardstick(runs).items():
        if (rises := frontier(part)) is not None:
            ax.plot(COSTS, rises, linestyle=DASHES[name], **REFERENCE,
                    label=f"labels alone:\n{DIRECTIONS[name]}")
    if finish(ax, title, "cost: CE rise on other text (nats)", "CE rise on forget text (nats)", 0):
        ax.set_xlim(0, COSTS[-1])
        ax.plot(COSTS, COSTS, color=INK, linestyle=":", label="y = x, no separation")


def kappa_panel(ax: Axes, runs: list[Run], title: str) -> None:
    """Share of sets of features that fire together whose condition number is at most x."""
    finite = [k[np.isfinite(k)].max(initial=10) for run in runs for k in run.kappas()]
    grid = np.geomspace(1, min(max(finite, default=10), 1000), 300)
    for run in runs:
        if kappas := run.kappas():
            draw_line(ax, run, grid, *mean_stderr([(k[:, None] <= grid).mean(0) for k in kappas]))
    ax.set_xscale("log")
    if finish(ax, title, "κ of features that fire together (log scale)", "share with κ ≤ x"):
        ax.set_xticks(ticks := (1, 2, 3, 5, 10, 30, 100, 300, 1000), map(str, ticks))
        ax.minorticks_off()
        ax.set(xlim=(0.9, grid[-1]), ylim=(0, 1.02))
        random = np.mean([run.metric("kappa_random")[0] for run in runs])
        ax.axvline(random, linestyle="-.", label="κ of random vectors", **REFERENCE)


def probing_panel(ax: Axes, runs: list[Run], title: str) -> None:
    """Probe accuracy over the number of features a probe may use; the bare model as reference."""
    for i, run in enumerate(runs):  # side by side, or error bars hide each other
        x = np.arange(len(PROBES)) + min(0.05, 0.25 / len(runs)) * (i - (len(runs) - 1) / 2)
        mean, stderr = np.transpose([run.metric("sae" + key) for key in PROBES.values()])
        draw_points(ax, run, x, mean, yerr=stderr, linestyle=LOOKS[run.name]["linestyle"], lw=1)
    model = [runs[0].metric("llm" + key)[0] for key in PROBES.values()]  # the same in every run
    ax.plot(model, "k--", linewidth=1.8, label="language model")
    ax.set_xticks(range(len(PROBES)), PROBES)
    finish(ax, title, "features a probe may use, k", "probe accuracy, chance 0.5", 0.5)


# --- Figures -------------------------------------------------------------------------------------
def new_figure(title: str, width: float, height: float) -> Figure:
    fig = Figure(figsize=(width, height))
    fig.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
    return fig


def explain(fig: Figure, runs: list[Run]) -> Figure:
    """Below a figure, what a reader must know of its terms and to compare the runs."""
    panels = " ".join(ax.get_title(loc="left") + ax.get_ylabel() for ax in fig.axes)
    terms = " ".join(text for term, text in TERMS.items() if re.search(term, panels))
    if yardstick(runs) and re.search("vanilla's|on forget text", panels):  # which show it
        terms += " Labels alone: a direction from labels, no SAE; dashed line: a classifier's."
    (substrate, budget), counts = runs[0].study, [len(run.by_seed("seed")) for run in runs]
    seeds = "-".join(map(str, sorted({min(counts), max(counts)})))
    note = "SMOKE BUDGET: shows that the code runs, is no result. " * (budget == "smoke")
    note += f"Substrate {substrate}, budget {budget}, seeds a run: {seeds}; mean ± standard error."
    if any(run.info["config"].get("orthogonality") == "adaptive" and run.config("eta") != 0
           for run in runs):
        note += (" Adaptive runs with η > 0 are told in training which domain a text is from; "
                 "the other runs are not.")
    lines = [textwrap.fill(line, int(18 * fig.get_figwidth()))
             for line in (terms, note, *incomparable(runs)) if line]
    fig.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color=INK)
    return fig


def add_legend(fig: Figure | SubFigure, runs: list[Run]) -> Figure:
    """Name the runs and, once each, the references drawn on any panel."""
    handles = [matplotlib.lines.Line2D([], [], **LOOKS[run.name], label=run.label) for run in runs]
    lines = {line.get_label(): line for ax in fig.axes for line in ax.lines}
    handles += [line for label, line in lines.items() if label and not label.startswith("_")]
    fig.legend(handles=handles, loc="outside right upper")
    return fig


def unlearning_frontier(runs: list[Run]) -> Figure:
    """A panel a question, each with the vanilla and the fixed SAE."""
    fig = new_figure("Unlearning frontier (higher is better)", 14.5, 5.5)
    groups = {"strength α": SWEEPS["alpha"], "how often to regroup": SWEEPS["regroup_every"]}
    groups["other losses, best setting"] = LOOKS.keys() - set().union(*groups.values())
    for ax, (title, names) in zip(fig.subplots(1, 3, sharey=True), groups.items()):
        frontier_panel(ax, [run for run in runs if run.name in {*names, OFF, FIXED}], title, True)
        ax.label_outer()
    return add_legend(fig, runs)


def metric_rows(runs: list[Run], title: str, keys: tuple[str, ...],
                panel: Callable | None = None) -> Figure:
    """Metrics side by side in rows, and beside them the curves that they are taken from."""
    widths = [1] * len(keys) + [2.5] * bool(panel)
    height = 2.2 + (0.31 if panel else 0.27) * max(len(runs), 4)
    fig = new_figure(title, 2 + 2 * bool(panel) + 2.2 * sum(widths), height)
    axes = fig.subplots(1, len(widths), width_ratios=widths)
    for ax, key in zip(axes, keys):
        metric_panel(ax, runs, key)
    if panel:
        panel(axes[-1], runs, "")
        add_legend(fig, runs)
    return fig


def sweep(runs: list[Run], setting: str, name: str) -> Figure:
    """What a setting buys and costs, between bands of the vanilla and the fixed SAE."""
    fig = new_figure(f"The effect of the {name}", 10, 6.5)
    swept = {run.config(setting): run for run in runs if run.name in SWEEPS[setting]}
    swept = {x: swept[x] for x in sorted(swept) if x > 0}
    bands = [run for run in runs if swept and run.name in (OFF, FIXED)
             and comparable(run, *swept.values())]
    metrics = ("unlearning_area", "kappa_median", "explained_variance", "sae_top_5_test_accuracy")
    for ax, key in zip(fig.subplots(2, 2).flat, metrics):
        for run in bands:
            (mean, stderr), colour = run.metric(key), LOOKS[run.name]["color"]
            ax.axhspan(mean - stderr, mean + stderr, alpha=0.2, linewidth=0, color=colour)
            ax.axhline(mean, color=colour, linewidth=1.3, linestyle="--")
        if comparable(*swept.values()):
            ax.plot(list(swept), [run.metric(key)[0] for run in swept.values()], color=INK, lw=1)
        for x, run in swept.items():
            mean, stderr = run.metric(key)
            draw_points(ax, run, x, mean, yerr=stderr, markersize=8, zorder=3)
        if swept:
            ax.set(xscale="log", xlim=(min(swept) / 1.6, max(swept) * 1.6))
            ax.set_xticks(list(swept), [f"{x:g}" for x in swept])
            ax.minorticks_off()
        floor = 0.5 if "accuracy" in key else METRICS[key][2]
        finish(ax, METRICS[key][0], f"{name} (log scale)", "", floor)
    return add_legend(fig, [*swept.values(), *bands])


def training_curves(runs: list[Run]) -> Figure:
    fig = new_figure("Training curves", 13, 7)
    names = {"loss": "training loss (terms differ between runs)",
             "l0": "L0, features a token (log scale)", "fit": "fit: mean ‖z - ẑ‖ of normalised z",
             "l_dir": "L_dir as in the run's loss", "l_use": "L_use as in the run's loss",
             "lambda": "sparsity penalty λ"}
    for ax, (key, name) in zip(fig.subplots(2, 3).flat, names.items()):
        for run in runs:
            tokens, mean, stderr = curve(run, key)
            if np.any(mean):  # a term that is 0 throughout is not in the run's loss, nor measured
                draw_line(ax, run, tokens, mean, stderr)
        ax.set(xlim=(0, None), yscale="log" if key == "l0" else "linear")
        drawn = finish(ax, name, "training tokens (millions)", "", math.nan if key == "l0" else 0)
        if drawn and key == "l0":
            locator = matplotlib.ticker.LogLocator(subs=(1, 2, 3, 4, 6))
            ax.yaxis.set(major_locator=locator, major_formatter="{x:g}", minor_formatter="")
            ax.axhline(runs[0].config("target_l0"), linestyle=":", label="target L0", **REFERENCE)
    return add_legend(fig, runs)


def overview(runs: list[Run]) -> Figure:
    """One page: what is bought against its price, and below it the metrics in rows."""
    height = 0.6 + 0.25 * max(len(runs), 4)
    fig = new_figure("Overview: what each loss buys and costs", 14, 5 + height)
    top, bottom = fig.subfigures(2, 1, height_ratios=(3.9, height))
    left, middle, right = top.subplots(1, 3)
    frontier_panel(left, runs, "A  unlearning: more forgetting at equal cost ↑", False)
    prices = {"unlearning_area": (middle, "B  forgetting"), TPP: (right, "C  separation")}
    for key, (ax, name) in prices.items():
        for run in runs:
            (x, spread), (y, stderr) = map(run.metric, ("explained_variance", key))
            draw_points(ax, run, x, y, xerr=spread, yerr=stderr, markersize=8)
        finish(ax, f"{name} against its price ↗", "explained variance", METRICS[key][0], 0)
    add_legend(top, runs)
    keys = ("unlearning_area", "area_gain", TPP, "kappa_median", "explained_variance")
    for ax, key in zip(bottom.subplots(1, len(keys)), keys):
        metric_panel(ax, runs, key)
    return fig


FIGURES = {
    "unlearning_frontier": unlearning_frontier,
    "unlearning_summary": partial(metric_rows, title="Unlearning", keys=tuple(METRICS)[:4]),
    "alpha_sweep": partial(sweep, setting="alpha", name="strength α"),
    "grouping_interval": partial(sweep, setting="regroup_every", name="steps between regroupings"),
    "condition_numbers": partial(metric_rows, title="κ of features that fire together",
                                 keys=("kappa_median", "kappa_p90"), panel=kappa_panel),
    "sparse_probing": partial(metric_rows, title="How few features hold a concept",
                              keys=tuple(METRICS)[5:7], panel=probing_panel),
    "reconstruction": partial(metric_rows, title="Reconstruction at equal sparsity",
                              keys=("l0", "explained_variance", "ce_score")),
    "training_curves": training_curves,
    "overview": overview,
}


# --- Writing -------------------------------------------------------------------------------------
def save(fig: Figure, name: str) -> None:
    """Write PNG and PDF whole or not at all, with the same bytes whenever the data are the same."""
    for kind, dates in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        temporary = FOLDER / f".{name}.{kind}.{os.getpid()}"
        try:
            fig.savefig(temporary, format=kind, metadata=dates)
            fig.set_layout_engine("none")  # laid out once: the PDF is the PNG
            os.replace(temporary, FOLDER / f"{name}.{kind}")
        finally:
            temporary.unlink(missing_ok=True)


def report(*lines: str) -> None:
    """Print; a closed pipe or a full disk behind it does not stop the figures."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    """Draw everything; 0 also when no run is finished yet, 1 when there is no run folder."""
    if hasattr(sys.stdout, "reconfigure"):  # it may be closed, or a notebook's
        sys.stdout.reconfigure(errors="replace")  # κ on an ASCII terminal
    folders = sorted((path for path in Path().glob("run_*") if path.is_dir()),
                     key=lambda path: (len(path.name), path.name))
    if [folder.name for folder in folders] in ([], ["run_0"]):
        report(("only the given baseline, run_0, is here, which is not drawn" if folders else
              "no run folder ./run_* here") + ": begin with python experiment.py --out_dir=run_1")
        return 0 if folders else 1
    runs, notes = read_study(folders)
    report(*notes, *(incomparable(runs) if runs else ["nothing to draw: no finished run yet"]))
    if not runs:
        return 0
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    try:
        FOLDER.mkdir(exist_ok=True)
        for name, draw in FIGURES.items():
            save(explain(draw(runs), runs), name)
    except OSError as error:
        print(f"cannot write {FOLDER}/: {error.strerror}", file=sys.stderr)
        return 1
    table = [TABLE_HEAD, *table_rows(runs)]
    widths = [max(map(len, column)) for column in zip_longest(*table, fillvalue="")]
    report(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in table), TABLE_NOTE,
         f"{len(FIGURES)} figures in {FOLDER}/, as PNG and PDF")
    return 0


if __name__ == "__main__":
    sys.exit(main())
