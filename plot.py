"""Draw the study: every finished run folder ./run_* in one visual language, into ./figures/.

    python plot.py

Each figure is written as PNG (for looking) and PDF (for papers). A folder that cannot be drawn,
wholly or in part, is named in one line with the reason. Runs of different substrates or budgets
are not comparable: the pair with the most finished runs is drawn, the others are left out.
"""

import hashlib
import io
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

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
OFF, FIXED = "run_8", "run_7"  # what the sweeps and the summary table compare with
# One colour, marker and dash a run, everywhere. Any two colours differ by more than 25 in CIELAB,
# seen with protanopia, deuteranopia or tritanopia as well; markers and dashes say it once more.
COLOURS = dict(zip(labels, ("#4D00A1", "#1141FE", "#03B5FF", "#8BB587", "#4B253D",
                            "#A07932", "#EF9700", "#777777", "#AE32A0", "#700000")))
MARKERS = dict(zip(labels, "os^DvPXh<*"))
DASHES = dict(zip(labels, ("-", "-", "-", "-", "-", "--", "--", "--", "--", "-")))
INK = "#444444"  # references and remarks
STYLE = {
    "figure.facecolor": "white", "figure.constrained_layout.use": True, "savefig.dpi": 150,
    "font.size": 9, "axes.titlelocation": "left", "axes.titlesize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "pdf.fonttype": 42,
    "axes.axisbelow": True, "grid.color": "#E6E6E6", "lines.markersize": 5.5,
}
FOLDER = Path("figures")
STUDIES = [("pythia", "full"), ("standin", "full"), ("pythia", "smoke"), ("standin", "smoke")]
BUDGETS = np.linspace(0, 0.3, 301)  # cost, nats: the range that the area averages over
K_VALUES = ("1", "2", "5", "10", "20", "50", "all")
TOKENS = "training tokens (millions)"
TABLE_HEAD = ["run", "L0", "expl. var.", "CE score", "area ± se", "area - vanilla",
              "area - fixed", "κ med / p90", "top-5 probe", "duplicates"]
TABLE_NOTE = ("Area (nats) is the primary number. Differences are paired over seeds, with the 95 %"
              "\ninterval if the run has one, or ± standard error; † no seed in common.")


# --- Reading: whatever lies in a folder becomes clean numbers, NaN, or a reason ------------------

def number(value: object) -> float:
    """A finite float of sane size; NaN for anything else that JSON can hold."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and abs(value) <= 1e30 else math.nan


def dig(block: object, *path: str) -> object:
    """What lies at this path of nested dicts, None if nothing does."""
    for key in path:
        block = block.get(key) if isinstance(block, dict) else None
    return block


def dicts(block: object, *path: str) -> list[dict]:
    """The dicts in the list that lies at this path, none if there is no such list."""
    found = dig(block, *path)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


@dataclass
class Run:
    """A finished run: its final_info.json, its logged steps, and views of them in clean numbers.

    Views by seed are lists with one array a seed, empty where nothing was recorded.
    """

    name: str
    info: dict
    history: list[dict[str, float]]

    @property
    def label(self) -> str:
        return f"{self.name.removeprefix('run_')} · {labels[self.name]}"

    @property
    def study(self) -> tuple[str, str]:
        return self.info["substrate"], self.info["budget"]

    @property
    def precision(self) -> str:
        """What the language model computed in, which depends on the processor."""
        return str(dig(self.info, "environment", "language_model_dtype"))

    def config(self, key: str) -> float:
        return number(self.info["config"].get(key))

    def stat(self, key: str) -> tuple[float, float]:
        """Mean and standard error of a metric over seeds."""
        return number(self.info["means"].get(key)), abs(number(self.info["stderrs"].get(key)))

    def areas(self) -> dict[float, float]:
        """The primary number by seed."""
        return {number(row.get("seed")): number(row.get("unlearning_area"))
                for row in dicts(self.info, "seeds")}

    def settings(self, kind: str = "settings") -> list[np.ndarray]:
        """Interventions by seed, [n, (cost, forget CE rise, retain and forget accuracy)].

        A setting costs the larger CE rise of the retain text and of the text no label named.
        """
        keys = ("retain_ce_rise", "other_ce_rise", "forget_ce_rise", "retain_accuracy",
                "forget_accuracy")
        tables = [[[number(row.get(key)) for key in keys] for row in dicts(seed, kind)]
                  for seed in dicts(self.info, "unlearning", "per_seed")]
        tables = [np.array(table).reshape(-1, 5) for table in tables]
        tables = [np.column_stack([np.fmax(*table.T[:2]), table[:, 2:]]) for table in tables]
        tables = [table[np.isfinite(table[:, :2]).all(1)] for table in tables]
        return [table for table in tables if len(table)]

    def kappas(self) -> list[np.ndarray]:
        """Condition numbers of all groups by seed; null means singular, and counts as infinite."""
        found = [seed.get("kappa") for seed in dicts(self.info, "conditioning", "per_seed")]
        found = [np.array([number(k) for k in ks]) for ks in found if isinstance(ks, list) and ks]
        return [np.where(ks >= 1, ks, np.inf) for ks in found]

    def quartiles(self) -> list[np.ndarray]:
        """Median condition number by seed, [4], in quartiles of co-activation within the group."""
        found = [dicts(seed, "by_coactivation")
                 for seed in dicts(self.info, "conditioning", "per_seed")]
        return [np.array([number(row.get("kappa_median")) for row in four])
                for four in found if len(four) == 4]


def read_info(folder: Path) -> dict:
    """The run's final_info.json; ValueError says why the folder is left out."""
    if folder.name not in labels:
        raise ValueError("not in `labels` at the top of plot.py")
    try:
        info = json.loads((folder / "final_info.json").read_bytes())
    except FileNotFoundError:
        raise ValueError("unfinished (no final_info.json)") from None
    except (OSError, ValueError, RecursionError):
        raise ValueError("final_info.json is malformed") from None
    needed = {"substrate": str, "budget": str, "config": dict, "means": dict, "stderrs": dict}
    info = info if isinstance(info, dict) else {}
    if missing := [key for key, kind in needed.items() if not isinstance(info.get(key), kind)]:
        raise ValueError(f"final_info.json lacks {', '.join(missing)} (older version?)")
    if (info["substrate"], info["budget"]) not in STUDIES:
        raise ValueError("unknown substrate or budget")
    if info.get("run", folder.name) != folder.name:
        raise ValueError("final_info.json is of another run")
    times = ("timing", "datetime_epoch_millis", "sha256")
    text = json.dumps({key: info[key] for key in info if key not in times}, ensure_ascii=False)
    checksum = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    if info.get("sha256", checksum) != checksum:
        raise ValueError("final_info.json was altered since the run wrote it")
    return info


def read_history(path: Path) -> list[dict[str, float]]:
    """Logged steps; a line cut short or without its place in training is dropped."""
    history = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        row = {key: number(row[key]) for key in row} if isinstance(row, dict) else {}
        if all(math.isfinite(row.get(key, math.nan)) for key in ("seed", "step", "tokens")):
            history.append(row)
    return history


def lacks(run: Run) -> list[str]:
    """What a reader of the figures would miss of this run."""
    metrics = ("unlearning_area", "l0", "explained_variance", "ce_score", "kappa_median",
               "kappa_p90", "sae_top_5_test_accuracy")
    parts = {"unlearning settings": run.settings(), "group condition numbers": run.kappas(),
             "results by seed": run.areas(), "training history": run.history}
    return ([key for key in metrics if math.isnan(run.stat(key)[0])]
            + [name for name, part in parts.items() if not part])


def read_study(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs to draw together, and one line a folder on what is left out and why."""
    runs, notes = {}, {}
    for folder in folders:
        try:
            if folder.name == "run_0":
                raise ValueError("untrained baseline on gemma-2-2b, chance accuracies; not drawn")
            history = folder / "history.jsonl"
            run = runs[folder.name] = Run(folder.name, read_info(folder), read_history(history))
            if missing := lacks(run):
                notes[run.name] = f"drawn without {', '.join(missing)} (missing or malformed)"
        except (ValueError, OSError) as reason:
            notes[folder.name] = f"{reason}" if folder.name == "run_0" else f"left out, {reason}"
    drawn = max(STUDIES, key=[run.study for run in runs.values()].count)
    for run in runs.values():
        if run.study != drawn:
            notes[run.name] = f"left out, {'/'.join(run.study)} while {'/'.join(drawn)} is drawn"
    order = [runs[name] for name in labels if name in runs and runs[name].study == drawn]
    return order, [f"{name}: {notes[name]}" for folder in folders if (name := folder.name) in notes]


# --- Statistics ----------------------------------------------------------------------------------

def mean_stderr(values: list | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error (std/√n) over the first axis; a single value has none: NaN."""
    values = np.asarray(values, dtype=float)
    mean, n = values.mean(0), len(values)
    return mean, values.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, np.nan)


def envelope(points: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Largest forget rise at a retain rise within each budget, on the upper concave hull.

    Points are (retain, forget) rows. Doing nothing, (0, 0), is always possible, and a setting
    that lowers retain CE counts as free. Beyond its best point the envelope is flat.
    """
    points = np.vstack([(0.0, 0.0), np.column_stack([points[:, 0].clip(min=0), points[:, 1]])])
    hull: list[tuple[float, float]] = []
    for x, y in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if hull and hull[-1][0] == x:  # of points at one price only the best, the last, counts
            hull.pop()
        while len(hull) > 1:
            (ax, ay), (bx, by) = hull[-2:]
            if (by - ay) * (x - ax) > (y - ay) * (bx - ax):  # b is above the line from a to here
                break
            hull.pop()
        hull.append((x, y))
    best = max(range(len(hull)), key=lambda i: hull[i][1])
    return np.interp(budgets, *zip(*hull[:best + 1]))


def accuracies(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Retain and forget accuracy at the setting that forgets most with retain accuracy ≥ 0.95."""
    allowed = [table[(table[:, 2] >= 0.95) & np.isfinite(table[:, 3])] for table in run.settings()]
    picks = [t[t[:, 3].argmin(), 2:] if len(t) else [math.nan] * 2 for t in allowed]
    return mean_stderr(picks or [[math.nan] * 2])


def curve(run: Run, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (millions), mean and standard error of a logged quantity, where all seeds log it."""
    seeds: dict[float, dict[float, tuple[float, float]]] = {}
    for row in run.history:
        if math.isfinite(row.get(key, math.nan)):
            seeds.setdefault(row["seed"], {})[row["step"]] = (row["tokens"] / 1e6, row[key])
    steps = sorted(set.intersection(*map(set, seeds.values()))) if seeds else []
    table = np.array([[seed[step] for step in steps] for seed in seeds.values()])
    table = table.reshape(max(len(seeds), 1), len(steps), 2)
    return table[..., 0].mean(0), *mean_stderr(table[..., 1])


# --- Summary table -------------------------------------------------------------------------------

def show(value: float, form: str = ".2f") -> str:
    return "n/a" if math.isnan(value) else format(value, form)


def difference(run: Run, base: Run | None) -> str:
    """How much larger the unlearning area is than the reference's, paired over seeds."""
    if base is None or run is base:
        return "-"
    mine, theirs = run.areas(), base.areas()
    pairs = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if pairs:
        mean, stderr = mean_stderr(pairs)
    else:
        (mine, stderr), (theirs, other) = (r.stat("unlearning_area") for r in (run, base))
        mean, stderr = mine - theirs, math.hypot(stderr, other)
    stored, low, high = (number(dig(run.info, "comparisons", base.name, "unlearning_area", key))
                         for key in ("difference", "low", "high"))
    # A stored interval is shown only while it is about these two runs: either may be repeated.
    current = math.isclose(stored, mean, rel_tol=1e-3, abs_tol=1e-6) and low <= high
    spread = f"[{show(low)}, {show(high)}]" if current else f"± {show(stderr)}"
    return f"{show(mean, '+.2f')} {spread}" + ("" if pairs else " †")


def table_rows(runs: list[Run]) -> list[list[str]]:
    """One row a run, in the columns of TABLE_HEAD."""
    bases = [next((run for run in runs if run.name == name), None) for name in (OFF, FIXED)]
    rows = []
    for run in runs:
        l0, variance, score, median, p90, probe, duplicates = (
            show(run.stat(key)[0], form) for key, form in (
                ("l0", ".1f"), ("explained_variance", ".3f"), ("ce_score", ".3f"),
                ("kappa_median", "#.3g"), ("kappa_p90", "#.3g"),
                ("sae_top_5_test_accuracy", ".3f"), ("duplicates", ".1f")))
        area = " ± ".join(show(value) for value in run.stat("unlearning_area"))
        rows.append([run.label, l0, variance, score, area, *(difference(run, b) for b in bases),
                     f"{median} / {p90}", probe, duplicates])
    return rows


# --- Panels: each draws one thing on given axes --------------------------------------------------

def draw_line(ax: Axes, run: Run, x: np.ndarray, mean: np.ndarray, stderr: np.ndarray) -> None:
    """A run's line with its band of one standard error; markers are staggered to stay apart."""
    colour, place = COLOURS[run.name], list(labels).index(run.name) / len(labels)
    ax.plot(x, mean, color=colour, linestyle=DASHES[run.name], marker=MARKERS[run.name],
            markevery=(0.14 * place, 0.14))
    ax.fill_between(x, mean - stderr, mean + stderr, color=colour, alpha=0.15, linewidth=0)


def draw_points(ax: Axes, run: Run, x: object, y: object, **look: object) -> None:
    """A run's points with their standard errors, unconnected unless a linestyle is given."""
    ax.errorbar(x, y, **{"color": COLOURS[run.name], "marker": MARKERS[run.name],
                         "linestyle": "none", "capsize": 2.5, "elinewidth": 1.1, **look})


def reference(ax: Axes, where: float, label: str, axis: str = "y", dash: object = ":") -> None:
    """A reference line; the figure's legend names it."""
    if math.isfinite(where):
        draw = ax.axhline if axis == "y" else ax.axvline
        draw(where, color=INK, linestyle=dash, linewidth=1.3, label=label, zorder=1.5)


def random_kappa(ax: Axes, runs: list[Run], axis: str = "y") -> None:
    values = [value for run in runs if math.isfinite(value := run.stat("kappa_random")[0])]
    reference(ax, np.mean(values) if values else math.nan, "κ of random vectors", axis, "-.")


def finish(ax: Axes, xlabel: str, ylabel: str, floor: float = math.nan) -> bool:
    """Name the axes, start y at its floor if the data allow, and own up to axes cut above zero.

    Returns whether there is anything on the panel, so whether references make sense.
    """
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if not np.isfinite(ax.dataLim.get_points()).all():
        ax.text(0.5, 0.5, "no finished run records this", color=INK, ha="center",
                transform=ax.transAxes, bbox={"facecolor": "white", "edgecolor": "none"})
        ax.set(xticks=[], yticks=[])
        ax.minorticks_off()
        return False
    low, high = ax.get_ylim()
    if ax.dataLim.y0 >= floor:
        ax.set_ylim(floor, high + 0.04 * (high - floor))
    elif high - low < 0.02 * high:  # noise must not fill a panel
        ax.set_ylim((low + high) / 2 - 0.01 * high, (low + high) / 2 + 0.01 * high)
    starts = {"y": (0, 0.03), "x": (0.03, 0)}
    for axis, spot in list(starts.items()):
        low, scale = getattr(ax, f"get_{axis}lim")()[0], getattr(ax, f"get_{axis}scale")()
        starts[axis] = low if scale == "linear" and low > 0 else None
        if starts[axis]:
            ax.plot(*spot, marker="$//$", color=INK, markersize=9, clip_on=False,
                    transform=ax.transAxes)
    cut = ", ".join(f"{axis} axis from {low:.3g}" for axis, low in starts.items() if low)
    ax.set_title(cut, fontsize=7.5, color=INK, style="italic")
    return True


def frontier_panel(ax: Axes, runs: list[Run]) -> None:
    """Best forgetting at each price, a line a run; every affordable setting a dot."""
    def dots(tables: list[np.ndarray], **look: object) -> None:
        points = np.vstack(tables)[:, :2].clip(min=(0, -np.inf))
        points = points[points[:, 0] <= BUDGETS[-1]]
        ax.plot(*points.T, linestyle="none", markersize=3.5, **look)

    for run in runs:
        if tables := run.settings():
            dots(tables, marker=".", color=COLOURS[run.name], alpha=0.3)
            lines = [envelope(table[:, :2], BUDGETS) for table in tables]
            draw_line(ax, run, BUDGETS, *mean_stderr(lines))
    if control := [table for run in runs for table in run.settings("control")]:
        dots(control, marker="x", color=INK, label="random features of\nequal frequency")
    cost = "cost: larger cross-entropy rise of retain text and a third text (nats)"
    if finish(ax, cost, "rise of forget cross-entropy (nats)", 0):
        ax.set_xlim(0, BUDGETS[-1])
        ax.plot(BUDGETS, BUDGETS, color=INK, linestyle=":", label="y = x, no separation")


def bar_panel(ax: Axes, runs: list[Run], stats: list[tuple[float, float]], title: str,
              xlabel: str, offset: float = 0, **look: object) -> None:
    """One horizontal bar a run, from zero, with its standard error and value."""
    for row, (run, (mean, stderr)) in enumerate(zip(runs, stats)):
        ax.barh(row + offset, mean, xerr=stderr, capsize=2.5,
                **{"height": 0.72, "color": COLOURS[run.name], "ecolor": "black", **look})
        form = ".3f" if abs(mean) < 0.095 else ".2f"  # two digits that say something
        ax.annotate(show(mean, form), (max(np.nansum([mean, stderr]), 0), row + offset), (4, 0),
                    textcoords="offset points", va="center", fontsize=7.5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0})
        if run.name == OFF and not offset:
            reference(ax, mean, "vanilla SAE (in bar charts)", "x")
    ax.set(yticks=range(len(runs)), yticklabels=[run.label for run in runs], title=title,
           xlabel=xlabel, ylim=(max(len(runs), 4) - 0.5, -0.5))
    ax.margins(x=0.2)
    ax.grid(axis="y", visible=False)


def kappa_panel(ax: Axes, runs: list[Run]) -> None:
    """Share of feature groups whose condition number is at most x."""
    finite = [k[np.isfinite(k)].max(initial=10) for run in runs for k in run.kappas()]
    limit = min(max(finite, default=10), 1000)
    grid = np.geomspace(1, limit, 300)
    for run in runs:
        if kappas := run.kappas():
            draw_line(ax, run, grid, *mean_stderr([(k[:, None] <= grid).mean(0) for k in kappas]))
    ax.set_xscale("log")
    if finish(ax, "condition number κ of a group (log scale)", "share of groups with κ ≤ x"):
        ticks = [tick for tick in (1, 2, 3, 5, 10, 30, 100, 300, 1000) if tick <= limit]
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set_ylim(0, 1.02)
        random_kappa(ax, runs, "x")


def probing_panel(ax: Axes, runs: list[Run]) -> None:
    """Probe accuracy over the number of features a probe may use; the bare model as reference."""
    keys = [f"_top_{k}_test_accuracy" for k in K_VALUES[:-1]] + ["_test_accuracy"]
    x = np.arange(len(keys))
    apart = min(0.05, 0.25 / len(runs))  # side by side, or error bars hide each other
    for i, run in enumerate(runs):
        mean, stderr = np.transpose([run.stat("sae" + key) for key in keys])
        shift = apart * (i - (len(runs) - 1) / 2)
        draw_points(ax, run, x + shift, mean, yerr=stderr, linestyle=DASHES[run.name], linewidth=1)
    model = np.array([[run.stat("llm" + key)[0] for key in keys] for run in runs])
    for line in model[np.isfinite(model).any(1)][:1]:  # the model is the same in every run
        ax.plot(x, line, "k--", linewidth=1.8, label="language model")
    ax.set_xticks(x, K_VALUES)
    if finish(ax, "features a probe may use, k", "probe accuracy on test texts", 0.5):
        ax.axhline(0.5, color=INK, linestyle=":", linewidth=1.8, clip_on=False, label="chance, 0.5")
        ax.spines.bottom.set_visible(False)  # the line of chance takes its place


def fidelity_panel(ax: Axes, runs: list[Run], key: str, ylabel: str) -> None:
    """Fidelity against sparsity; only runs of equal sparsity are comparable."""
    for run in runs:
        (x, xerr), (y, yerr) = run.stat("l0"), run.stat(key)
        draw_points(ax, run, x, y, xerr=xerr, yerr=yerr, markersize=7)
    for target in {run.config("target_l0") for run in runs}:
        reference(ax, target, "target L0", "x", (0, (5, 1, 1, 1, 1, 1)))
        ax.axvspan(0.95 * target, 1.05 * target, color="#F3F3F3", zorder=0)
    finish(ax, "L0 (features a token; target ± 5 % shaded)", ylabel)


def sweep_panel(ax: Axes, runs: list[Run], swept: dict[float, Run], key: str, fill: str) -> None:
    """A metric over a setting, between horizontal bands of the vanilla and the fixed SAE."""
    for run in runs:
        mean, stderr = run.stat(key)
        if swept and run.name in (OFF, FIXED) and math.isfinite(mean):
            band = np.nan_to_num(stderr)
            ax.axhspan(mean - band, mean + band, alpha=0.2, lw=0, color=COLOURS[run.name])
            ax.axhline(mean, color=COLOURS[run.name], linewidth=1.3,
                       linestyle="--" if fill == "full" else ":")
    ax.plot(list(swept), [run.stat(key)[0] for run in swept.values()], color=INK, lw=1, zorder=1)
    for x, run in swept.items():
        draw_points(ax, run, x, run.stat(key)[0], yerr=run.stat(key)[1], markersize=8,
                    fillstyle=fill)
    if swept:
        ax.set(xscale="log", xlim=(min(swept) / 1.6, max(swept) * 1.6))
        ax.set_xticks(list(swept), [f"{x:g}" for x in swept])
        ax.minorticks_off()


# --- Figures -------------------------------------------------------------------------------------

def new_figure(runs: list[Run], title: str, layout: str, size: tuple[float, float] = (10, 6),
               **grid: object) -> tuple[Figure, list[Axes]]:
    """An empty page with its title, and below it what a reader must know to compare the runs."""
    (substrate, budget), counts = runs[0].study, {len(run.areas()) for run in runs}
    seeds = "-".join(str(n) for n in sorted({min(counts), max(counts)}))
    note = f"Substrate {substrate}, budget {budget}, seeds a run: {seeds}; mean ± standard error."
    if budget == "smoke":
        note = f"SMOKE BUDGET: shows that the code runs, is no result. {note}"
    if any(run.info["config"].get("orthogonality") == "adaptive" and run.config("eta") != 0
           for run in runs):
        note += ("\nAdaptive runs with η > 0 are told in training which domain a text is from; "
                 "the other runs are not.")
    if len(precisions := {run.precision for run in runs} - {"None"}) > 1:
        note += (f"\nThe language model ran in {' or '.join(sorted(precisions))}: activations and "
                 "questions differ a little between the runs.")
    fig = Figure(figsize=size)
    fig.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
    fig.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color=INK)
    return fig, list(fig.subplot_mosaic(layout, **grid).values())


def add_legend(fig: Figure, runs: list[Run], loc: str = "outside right upper", ncols: int = 1,
               host: Axes | None = None) -> Figure:
    """Name the runs and, once each, the references drawn on any panel."""
    handles = [Line2D([], [], color=COLOURS[run.name], linestyle=DASHES[run.name],
                      marker=MARKERS[run.name], label=run.label) for run in runs]
    lines = {line.get_label(): line for ax in fig.axes for line in ax.lines}
    handles += [line for label, line in lines.items() if not label.startswith("_")]
    (host or fig).legend(handles=handles, loc=loc, ncols=ncols)
    return fig


def unlearning_frontier(runs: list[Run]) -> Figure:
    fig, (ax,) = new_figure(runs, "Unlearning frontier: what forgetting costs elsewhere", "A")
    frontier_panel(ax, runs)
    ax.set_title("upper concave envelope of all settings (dots), mean over seeds")
    return add_legend(fig, runs)


def unlearning_summary(runs: list[Run]) -> Figure:
    fig, axes = new_figure(runs, "Unlearning summary", "ABC;DEF", (12, 7.5))
    titles = {"unlearning_area": "area under the frontier: the primary number",
              **{f"forget_rise_at_{price}": f"forget CE rise at a cost ≤ {price} nats"
                 for price in ("0.01", "0.05", "0.1")},
              "unlearning_score": "unlearning score (SAEBench), retain ≥ 0.99"}
    for ax, (key, title) in zip(axes, titles.items()):
        unit = "1 - forget accuracy" if key == "unlearning_score" else "nats"
        bar_panel(ax, runs, [run.stat(key) for run in runs], title, unit)
    stats = [np.transpose(accuracies(run)) for run in runs]
    for kind, look in enumerate(({}, {"hatch": "////", "alpha": 0.6, "edgecolor": "white"})):
        bar_panel(axes[5], runs, [pair[kind] for pair in stats],
                  "retain (plain) and forget (hatched) questions",
                  "accuracy, best setting with retain ≥ 0.95",
                  offset=0.4 * kind - 0.2, height=0.36, **look)
    reference(axes[5], 0.25, "chance of four options", "x", "--")
    axes[5].set(xlim=(0, 1.2), xticks=(0, 0.25, 0.5, 0.75, 1))
    for i in (1, 2, 4, 5):
        axes[i].set_yticklabels([])
    return add_legend(fig, [], "outside upper right", 2)


def sweep(runs: list[Run], title: str, names: tuple[str, ...], key: str, xlabel: str) -> Figure:
    """What a setting buys and costs: unlearning, conditioning, reconstruction, probing."""
    fig, axes = new_figure(runs, title, "AB;CD", (10, 6.5))
    swept = {run.config(key): run for run in runs if run.name in names and run.config(key) > 0}
    swept = dict(sorted(swept.items()))
    sweep_panel(axes[0], runs, swept, "unlearning_area", "full")
    finish(axes[0], xlabel, "unlearning area (nats)", 0)
    sweep_panel(axes[1], runs, swept, "kappa_median", "full")
    sweep_panel(axes[1], runs, swept, "kappa_p90", "none")
    if axes[1].dataLim.y1 > 100:  # singular groups
        axes[1].set_yscale("log")
    if finish(axes[1], xlabel, "κ: median (full, --), p90 (open, ··)", 1):
        random_kappa(axes[1], runs)
    sweep_panel(axes[2], runs, swept, "explained_variance", "full")
    finish(axes[2], xlabel, "explained variance")
    sweep_panel(axes[3], runs, swept, "sae_top_5_test_accuracy", "full")
    finish(axes[3], xlabel, "top-5 probe accuracy (chance 0.5)", 0.5)
    bands = [run for run in runs if swept and run.name in (OFF, FIXED)]
    return add_legend(fig, [*swept.values(), *bands])


def alpha_sweep(runs: list[Run]) -> Figure:
    return sweep(runs, "What α buys and costs", ("run_1", "run_2", "run_3"), "alpha",
                 "strength α (log scale)")


def grouping_interval(runs: list[Run]) -> Figure:
    return sweep(runs, "How often to regroup", ("run_4", "run_2", "run_5"), "regroup_every",
                 "steps between regroupings (log scale)")


def condition_numbers(runs: list[Run]) -> Figure:
    fig, axes = new_figure(runs, "Condition numbers of feature groups", "ABC", (13, 5))
    kappa_panel(axes[0], runs)
    for i, run in enumerate(runs):
        draw_line(axes[1], run, *curve(run, "kappa_median"))
        if found := run.quartiles():
            mean, stderr = mean_stderr(found)
            draw_points(axes[2], run, np.arange(4) + 0.03 * (i - (len(runs) - 1) / 2), mean,
                        yerr=stderr, linestyle=DASHES[run.name], linewidth=1)
    axes[2].set_xticks(range(4), ["least", "2nd", "3rd", "most"])
    axes[1].set_xlim(left=0)
    quartiles = "groups by co-activation (quartiles)"
    for ax, xlabel, groups in ((axes[1], TOKENS, "formed in training"),
                               (axes[2], quartiles, "of held-out text")):
        if finish(ax, xlabel, f"median κ, groups {groups}", 1):
            random_kappa(ax, runs)
    return add_legend(fig, runs)


def sparse_probing(runs: list[Run]) -> Figure:
    fig, (ax,) = new_figure(runs, "Sparse probing: how few features hold a concept", "A")
    probing_panel(ax, runs)
    return add_legend(fig, runs)


def reconstruction(runs: list[Run]) -> Figure:
    fig, axes = new_figure(runs, "Reconstruction at equal sparsity", "AB", (11, 5))
    fidelity_panel(axes[0], runs, "explained_variance", "explained variance")
    fidelity_panel(axes[1], runs, "ce_score", "CE score (0: layer ablated, 1: model intact)")
    return add_legend(fig, runs)


def training_curves(runs: list[Run]) -> Figure:
    fig, axes = new_figure(runs, "Training curves", "ABC;DEF", (13, 7))
    logged = {key for run in runs for row in run.history for key in row}
    fit = "explained_variance" if "explained_variance" in logged else "fit"
    names = {"loss": "training loss (terms differ between runs)",
             "l0": "L0 (active features a token, log scale)",
             fit: "explained variance" if fit != "fit" else "fit: mean ‖z - ẑ‖ of normalised z",
             "l_dir": "L_dir, weighted as in the run's loss",
             "l_use": "L_use, weighted as in the run's loss", "lambda": "sparsity penalty λ"}
    for ax, (key, name) in zip(axes, names.items()):
        for run in runs:
            tokens, mean, stderr = curve(run, key)
            if np.any(mean):  # a term that is 0 throughout is not in the run's loss, nor measured
                draw_line(ax, run, tokens, mean, stderr)
        if key == "l0":
            ax.set_yscale("log")
            ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 4, 5, 7)), major_formatter="{x:g}")
            ax.minorticks_off()
        ax.set_xlim(left=0)
        drawn = finish(ax, TOKENS, name, math.nan if key in ("l0", "l_dir") else 0)
        for target in {run.config("target_l0") for run in runs if drawn and key == "l0"}:
            reference(ax, target, "target L0", dash=(0, (5, 1, 1, 1, 1, 1)))
        for d_in, d_sae in {(run.config("d_in"), run.config("d_sae")) for run in runs
                            if drawn and key == "l_dir"}:
            reference(ax, 1 - d_in / (d_sae or math.nan),
                      "Welch floor, 1 - D/F\n(of equal weights)", dash="--")
    return add_legend(fig, runs)


def overview(runs: list[Run]) -> Figure:
    """One page: the key panels under their legend, and the summary table below them."""
    rows = 0.3 * (len(runs) + 2)  # inches of table
    fig, (top, *axes, bottom) = new_figure(runs, "Overview", "LLL;ABC;DEF;TTT", (13, 9.5 + rows),
                                           height_ratios=(0.9, 3.8, 3.8, rows))
    frontier_panel(axes[0], runs)
    bar_panel(axes[1], runs, [run.stat("unlearning_area") for run in runs], "",
              "unlearning area (nats)")
    axes[1].set_yticklabels([run.name for run in runs])
    kappa_panel(axes[2], runs)
    probing_panel(axes[3], runs)
    fidelity_panel(axes[4], runs, "explained_variance", "explained variance")
    fidelity_panel(axes[5], runs, "ce_score", "CE score")
    top.axis("off")
    bottom.axis("off")
    bottom.set_title(TABLE_NOTE, fontsize=8, color=INK)
    table = bottom.table([["■", *row] for row in table_rows(runs)], loc="upper left",
                         colLabels=["", *TABLE_HEAD], cellLoc="center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    table.auto_set_column_width(range(len(TABLE_HEAD) + 1))
    table.scale(1, 1.3)
    for row, run in enumerate(runs, start=1):
        table[row, 0].get_text().set_color(COLOURS[run.name])
    return add_legend(fig, runs, "center", 6, top)


FIGURES = (unlearning_frontier, unlearning_summary, alpha_sweep, grouping_interval,
           condition_numbers, sparse_probing, reconstruction, training_curves, overview)


# --- Writing -------------------------------------------------------------------------------------

def save(fig: Figure, name: str) -> None:
    """Write PNG and PDF whole or not at all, with the same bytes whenever the data are the same."""
    for kind, dates in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        content = io.BytesIO()
        fig.savefig(content, format=kind, metadata=dates)
        fig.set_layout_engine("none")  # laid out once: the PDF is the PNG
        temporary = FOLDER / f".{name}.{kind}.{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                file.write(content.getvalue())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, FOLDER / f"{name}.{kind}")
        finally:
            temporary.unlink(missing_ok=True)


def main() -> int:
    """Draw everything; 0 also when no run is finished yet, 1 when there is no run folder."""
    sys.stdout.reconfigure(errors="replace")  # κ on an ASCII terminal
    folders = sorted((path for path in Path().glob("run*") if path.is_dir()),
                     key=lambda path: (len(path.name), path.name))
    if not folders:
        print("no run folder ./run* here: begin with python experiment.py --out_dir=run_1")
        return 1
    runs, notes = read_study(folders)
    for note in notes:
        print(note)
    if not runs:
        print("nothing to draw: no finished run yet")
        return 0
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    try:
        FOLDER.mkdir(exist_ok=True)
        for draw in FIGURES:
            save(draw(runs), draw.__name__)
    except OSError as error:
        print(f"cannot write {FOLDER}/: {error.strerror}", file=sys.stderr)
        return 1
    table = [TABLE_HEAD, *table_rows(runs)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(TABLE_NOTE)
    print(f"{len(FIGURES)} figures in {FOLDER}/, as PNG and PDF")
    return 0


if __name__ == "__main__":
    sys.exit(main())
