"""Figures of a report, each drawn only where the sweep's axes give it a meaning, as SVG that takes the page's colours.

Drawn on `Figure` objects, without pyplot and its global state. Colours are Okabe and Ito's; arms also differ in marker.
"""

import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from highrank.base.shapes import amount, read_json
from highrank.report.published import ROWS
from highrank.report.retention import OWN, TEXT, means
from highrank.report.runs import Record, flat
from highrank.report.scores import AVERAGE, Arm, Results, Score, label, shown
from highrank.report.statistics import LOSS
from highrank.report.tables import peak_gib, train_seconds

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#123456"
"""Stands for the page's text colour."""
DARK = "#1b1f24"
"""The text colour of a figure's own file."""
STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "highrank",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
MOST_LINES, MOST_BARS, MOST_PANELS, MOST_NAMED = 8, 40, 8, 12
SPECTRUM = 50
"""Singular values shown."""


@dataclass(frozen=True)
class Drawing:
    """One figure of the page."""

    name: str
    title: str
    caption: str
    svg: str

    def image(self) -> str:
        """Returns it as an SVG file of its own: dark on white paper, whatever the colours of the page that shows it."""
        start, rest = self.svg.replace("currentColor", DARK).split(">", 1)
        return f'{start}><rect width="100%" height="100%" fill="white"/>{rest}'


def draw(results: Results) -> list[Drawing]:
    """Returns the figures that these results call for."""
    figures: list[tuple[str, str, str, Figure] | None] = []
    with matplotlib.rc_context(STYLE):
        if "task" in results.keys:
            figures.append(transfer(results))
        else:
            figures.append(pareto(results))
            figures.append(retained(results))
            figures += [curve(results, key) for key in results.keys if key not in ("r1", "r2")]
            figures.append(split(results))
            figures += [bars(results, key) for key in results.keys]
        figures += [lengths(results), searches(results), heat_maps(results), spectra(results)]
        return [
            Drawing(name, title, caption, svg(figure, title)) for name, title, caption, figure in filter(None, figures)
        ]


def svg(figure: Figure, title: str) -> str:
    """Returns a figure as an SVG element, not enlarged, whose text and axes have the colour of the text around it."""
    image = io.StringIO()
    figure.savefig(image, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = image.getvalue()
    widest = f"max-width: {110 * figure.get_figwidth():.0f}px"
    element = text[text.index("<svg") :].replace(INK, "currentColor")
    return element.replace("<svg", f'<svg role="img" aria-label="{title}" style="{widest}"', 1)


def _said(results: Results) -> str:
    """Says in a caption what a score is."""
    metric = " and ".join(dict.fromkeys(results.metrics.values()))
    ns = sum({arm.scores[s].n: None for arm in results.arms for s in results.sets if s in arm.scores} or [0])
    what = f"unweighted mean of {metric} over {len(results.sets)} test sets" if len(results.sets) > 1 else metric
    if len(results.sets) > 1:
        ns = max((arm.scores[AVERAGE].n for arm in results.arms if AVERAGE in arm.scores), default=0)
    seeds = sorted({len(arm.scores[results.headline].seeds) for arm in _scored(results)})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    note = (
        "Error bars: 95 % bootstrap intervals over seeds and examples." if seeds[-1] > 1 else "One seed: no intervals."
    )
    return (
        f"Score: {what}, in percent, over {span} seed{'s' if seeds != [1] else ''} and n = {ns:,} test examples. {note}"
    )


def _scored(results: Results) -> list[Arm]:
    return [arm for arm in results.arms if results.headline in arm.scores]


def _errors(scores: Sequence[Score]) -> NDArray[np.float64]:
    """Returns the lengths of the error bars, (2, n); 0 without an interval."""
    ends = [(s.mean - s.low, s.high - s.mean) if s.low is not None and s.high is not None else (0, 0) for s in scores]
    return np.maximum(np.array(ends, dtype=float).T, 0)


def _point(axis: Axes, x: Any, scores: Sequence[Score], i: int, name: str | None, line: str = "none") -> None:
    errors = _errors(scores)
    axis.errorbar(
        x,
        [score.mean for score in scores],
        yerr=errors if errors.any() else None,
        color=PALETTE[i % len(PALETTE)],
        marker=_marker(i),
        linestyle=line,
        label=name,
        capsize=2,
        elinewidth=1,
        markersize=5,
        linewidth=1.4,
    )


def _legend(figure: Figure, axis: Axes) -> None:
    handles, names = axis.get_legend_handles_labels()
    if len(handles) > 1:
        fitting = int(11 * figure.get_figwidth() / (6 + max(map(len, names))))
        figure.legend(handles, names, loc="outside lower center", ncols=max(1, min(4, fitting, len(handles))))


def _single(width: float = 6.4, height: float = 3.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.set_ylabel("score, %")
    axis.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
    return figure, axis


def pareto(results: Results) -> tuple[str, str, str, Figure] | None:
    """Accuracy against what it costs: trainable parameters, training time, peak memory."""
    arms = _scored(results)
    costs: list[tuple[str, Callable[[Record], Any], bool]] = [
        ("trainable parameters", lambda r: r.results["params"].get("trainable"), True),
        ("training time, s", train_seconds, False),
        ("peak memory, GiB", peak_gib, False),
    ]
    panels = [(name, [arm.mean(of) for arm in arms], log) for name, of, log in costs]
    panels = [(name, x, log) for name, x, log in panels if None not in x and len(set(x)) > 1]
    if len(arms) < 2 or not panels:
        return None
    figure = Figure(figsize=(max(5.5, 3.7 * len(panels)), 4.1), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    kinds = list(dict.fromkeys(_kind(arm) for arm in arms))
    named = len(kinds) > MOST_LINES  # more than colours tell apart: each point has its name beside it
    for axis, (name, x, log) in zip(axes, panels, strict=True):
        for i, kind in enumerate(kinds):
            indices = [j for j, arm in enumerate(arms) if _kind(arm) == kind]
            scores = [arms[j].scores[results.headline] for j in indices]
            _point(axis, [x[j] for j in indices], scores, 0 if named else i, kind)
        for arm, at in zip(arms, x, strict=True) if named or len(arms) <= MOST_NAMED else ():
            rest = {key: value for key, value in arm.axes.items() if key != "method"}
            text = arm.label if named else label(rest) if len(arm.axes) > 1 else ""
            point: Any = (at, arm.scores[results.headline].mean)
            axis.annotate(text, point, xytext=(4, 4), textcoords="offset points", fontsize=7)
        values: list[Any] = list(x)
        front = _front(values, [arm.scores[results.headline].mean for arm in arms])
        axis.plot(
            *zip(*front, strict=True), drawstyle="steps-post", color="#888888", linewidth=1, linestyle=":", zorder=0
        )
        if log and min(values) > 0 and max(values) / min(values) > 4:
            axis.set_xscale("log")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlabel(name)
        axis.grid(color="#888888", alpha=0.25, linewidth=0.6)
    axes[0].set_ylabel("score, %")
    if not named:
        _legend(figure, axes[0])
    caption = f"What a score costs; up and to the left is better. Dotted: the best score at no more than that cost. {_said(results)}"
    return "pareto", "Score against cost", caption, figure


def retained(results: Results) -> tuple[str, str, str, Figure] | None:
    """What was gained on the trained task against what was lost on others and on general text, in scores and in losses."""
    by_arm = [(arm, changes) for arm, changes in zip(results.arms, map(means, results.arms), strict=True) if changes]
    panels: list[tuple[str, str, list[tuple[Arm, float, float]]]] = []
    for kind, sign, unit in (("score", 1, "points"), (LOSS, -1, results.unit)):
        names = {
            name: None for _, changes in by_arm for name, of in changes if name != OWN and (of == kind or name == TEXT)
        }
        for name in names:
            loss = LOSS if name == TEXT else kind
            points = [
                (arm, _fall(changes[name, loss], -1 if loss == LOSS else 1), -_fall(changes[OWN, kind], sign))
                for arm, changes in by_arm
                if (name, loss) in changes and (OWN, kind) in changes
            ]
            if len(points) > 1:
                lost = f"lost on {name}, {('nats per token' if name == TEXT else results.unit) if loss == LOSS else 'points'}"
                panels.append((lost, f"gained on the trained task, {unit}", points))
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(max(5.5, 3.9 * across), 3.9 * down + 0.3), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    kinds = list(dict.fromkeys(_kind(arm) for _, _, points in panels for arm, _, _ in points))
    for axis, (xlabel, ylabel, points) in zip(axes, panels, strict=False):
        for i, name in enumerate(kinds):
            x, y = ([point[j] for point in points if _kind(point[0]) == name] for j in (1, 2))
            axis.plot(x, y, **(_style(i) | {"linestyle": "none"}), label=name)
        front = _front([x for _, x, _ in points], [y for _, _, y in points])
        axis.plot(
            *zip(*front, strict=True), drawstyle="steps-post", color="#888888", linewidth=1, linestyle=":", zorder=0
        )
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        axis.grid(color="#888888", alpha=0.25, linewidth=0.6)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _legend(figure, axes[0])
    caption = "Each point an arm, the mean over its runs; up and to the left is better, left of 0 something was gained there too. Dotted: the most gained at no more than that loss."
    return "retention", "Gain against forgetting", caption, figure


def _fall(values: tuple[float, float], sign: int) -> float:
    return sign * (values[0] - values[1])


def _kind(arm: Arm) -> str:
    """Returns what colours an arm: its method where methods are compared, else its name."""
    return shown(arm.axes["method"]) if "method" in arm.axes else arm.label


def _front(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    front: list[tuple[float, float]] = []
    for at, score in sorted(zip(x, y, strict=True), key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((at, score))
    return [*front, (max(x), front[-1][1])]


def _lines(results: Results, keys: Sequence[str]) -> dict[str, list[Arm]]:
    """Returns the arms that differ in `keys` alone, by the name of the rest."""
    lines: dict[str, list[Arm]] = {}
    for arm in _scored(results):
        if all(arm.axes.get(key) is not None for key in keys):
            rest = {key: value for key, value in arm.axes.items() if key not in keys}
            lines.setdefault(label(rest), []).append(arm)
    return {name: arms for name, arms in lines.items() if len(arms) > 1}


def curve(results: Results, key: str) -> tuple[str, str, str, Figure] | None:
    """Score against a number: r, R_rank, lr, examples, layers."""
    lines = _lines(results, [key])
    values = sorted({arm.axes[key] for arms in lines.values() for arm in arms if _number(arm.axes[key])})
    if len(values) < 2 or len(lines) > MOST_LINES:
        return None
    figure, axis = _single()
    for i, (name, arms) in enumerate(lines.items()):
        arms = sorted((arm for arm in arms if _number(arm.axes[key])), key=lambda arm: arm.axes[key])
        _point(axis, [arm.axes[key] for arm in arms], [arm.scores[results.headline] for arm in arms], i, name, "-")
    printed = _printed(lines, key)
    if printed:
        axis.plot(*zip(*printed, strict=True), color="#888888", linestyle="--", marker="x", label="published")
    if values[0] > 0 and values[-1] / values[0] >= 4:
        axis.set_xscale("log", base=10 if key == "lr" else 2)
    if len(values) <= 10:
        axis.xaxis.set_major_locator(FixedLocator(values))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel(key)
    _legend(figure, axis)
    title = "Learning-rate sensitivity" if key == "lr" else f"Score against {key}"
    grey = " Grey: the papers' values for the same experiment." if printed else ""
    return (
        f"curve-{key.replace('.', '-')}",
        title,
        f"{title}, other keys fixed along a line.{grey} {_said(results)}",
        figure,
    )


def lengths(results: Results) -> tuple[str, str, str, Figure] | None:
    """Score and test loss against the length of the tested examples, where a task groups its test sets by it."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for arm, (title, key) in itertools.product(results.arms, (("score, %", ""), (f"test loss, {results.unit}", LOSS))):
        pattern = re.compile(rf"{re.escape(key or arm.records[0].metric)}_(\d+)")
        finals = [record.results["metrics"]["final"] for record in arm.records]
        sizes = {name: int(match[1]) for name in finals[0] if (match := pattern.fullmatch(name))}
        shared = {name: length for name, length in sizes.items() if all(name in final for final in finals)}
        line = {length: sum(final[name] for final in finals) / len(finals) for name, length in shared.items()}
        if len(line) > 1:
            panels.setdefault(title, {})[arm.label] = dict(sorted(line.items()))
    if not panels or len(results.arms) > MOST_LINES:
        return None
    trained = {n for arm in results.arms for n in flat(arm.records[0].config).get("task.train_lengths") or ()}
    figure = Figure(figsize=(max(5.5, 4.6 * len(panels)), 4.1), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for i, (name, line) in enumerate(lines.items()):
            axis.plot(list(line), list(line.values()), **_style(i), label=name)
        for length in sorted(trained):
            axis.axvline(length, color="#888888", linewidth=1, linestyle="--", zorder=0)
        ticks = sorted({length for line in lines.values() for length in line} | trained)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("tokens of a tested example")
        axis.set_ylabel(title)
        axis.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
    _legend(figure, axes[0])
    caption = "Unweighted mean over the test sets of a length, and over seeds. Dashed: lengths trained on; what lies beyond them is extrapolation."
    return "lengths", "Score by length", caption, figure


def _style(i: int) -> dict[str, Any]:
    return {"color": PALETTE[i % len(PALETTE)], "marker": _marker(i), "markersize": 5, "linewidth": 1.4}


def _marker(i: int) -> str:
    """Returns the marker of the i-th arm; those that share a colour have different ones."""
    return MARKERS[(i + i // len(PALETTE)) % len(MARKERS)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _printed(lines: dict[str, list[Arm]], key: str) -> list[tuple[Any, float]]:
    """Returns the printed averages of the arms on a single line."""
    if len(lines) != 1:
        return []
    (arms,) = lines.values()
    averages = {arm.axes[key]: row.average for arm in arms for row in arm.published if row.average is not None}
    return sorted(averages.items()) if len(averages) > 1 else []


def split(results: Results) -> tuple[str, str, str, Figure] | None:
    """HiLoRA: the score against how r is split over the Hadamard and the additive part."""
    lines = _lines(results, ["r1", "r2"])
    if not lines or len(lines) > MOST_LINES:
        return None
    figure, axis = _single()
    ticks: dict[int, str] = {}
    for i, (name, arms) in enumerate(lines.items()):
        arms = sorted(arms, key=lambda arm: (arm.axes["r1"], -arm.axes["r2"]))
        ticks |= {arm.axes["r1"]: f"{arm.axes['r1']}+{arm.axes['r2']}" for arm in arms}
        _point(axis, [arm.axes["r1"] for arm in arms], [arm.scores[results.headline] for arm in arms], i, name, "-")
    models = {flat(record.config).get("model") for arm in results.arms for record in arm.records}
    printed = [(r.variant["r1"], r.average) for r in ROWS if {"r1", "r2"} <= r.variant.keys() and r.model in models]
    if printed:
        axis.plot(*zip(*printed, strict=True), color="#888888", linestyle="--", marker="x", label="published")
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_xlabel("r1 + r2: Hadamard part, additive part")
    _legend(figure, axis)
    return "split", "HiLoRA: how to split r", f"r1 = 0 is LoRA, r2 = 0 is HiRA. {_said(results)}", figure


def bars(results: Results, key: str) -> tuple[str, str, str, Figure] | None:
    """Score by the values of a key that is no number: method, placement, R."""
    arms = [arm for arm in _scored(results) if key in arm.axes]
    values = list(dict.fromkeys(shown(arm.axes[key]) for arm in arms))
    groups: dict[str, dict[str, Score]] = {}
    for arm in arms:
        rest = label({k: v for k, v in arm.axes.items() if k != key}) if len(arm.axes) > 1 else ""
        groups.setdefault(rest, {})[shown(arm.axes[key])] = arm.scores[results.headline]
    numeric = all(_number(arm.axes[key]) for arm in arms)
    if numeric or len(values) < 2 or len(groups) > MOST_LINES or len(arms) > MOST_BARS:
        return None
    figure, axis = _single(width=min(11, max(6.4, 1.5 + 0.42 * (len(arms) + len(values)))))
    wide = 0.8 / len(groups)
    for i, (name, scores) in enumerate(groups.items()):
        at = [(values.index(value) - 0.4 + wide * (i + 0.5), score) for value, score in scores.items()]
        x, bar_scores = [place for place, _ in at], [score for _, score in at]
        errors = _errors(bar_scores)
        axis.bar(
            x,
            [score.mean for score in bar_scores],
            wide * 0.92,
            color=PALETTE[i % len(PALETTE)],
            yerr=errors if errors.any() else None,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
            label=name or None,
        )
    axis.set_xticks(range(len(values)), values)
    axis.set_xlabel(key)
    _legend(figure, axis)
    return f"bars-{key.replace('.', '-')}", f"Score by {key}", _said(results), figure


def searches(results: Results) -> tuple[str, str, str, Figure] | None:
    """Validation loss against learning rate, as the search saw it."""
    by_arm = {arm.label: next((r.search for r in arm.records if r.search), None) for arm in results.arms}
    lines = {
        name: sorted((float(t["lr"]), t["loss"]) for t in search["trials"] if t.get("loss") is not None)
        for name, search in by_arm.items()
        if search
    }
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines or len(lines) > MOST_LINES:
        return None
    figure, axis = _single()
    for i, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        axis.plot(x, y, **_style(i), label=name)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("validation loss")
    _legend(figure, axis)
    seeds = {str(search["seed"]) for search in by_arm.values() if search and "seed" in search}
    caption = f"Loss on held-out training examples, one trial per rate, seed {', '.join(sorted(seeds)) or 'not recorded'}; no test example was seen."
    return "lr-search", "Learning-rate search", caption, figure


def transfer(results: Results) -> tuple[str, str, str, Figure] | None:
    """Trained on one set, tested on all: one matrix per other key."""
    panels: dict[str, dict[str, Arm]] = {}
    for arm in results.arms:
        rest = {key: value for key, value in arm.axes.items() if key != "task"}
        panels.setdefault(label(rest) if rest else "", {})[shown(arm.axes.get("task"))] = arm
    tasks = list(dict.fromkeys(task for arms in panels.values() for task in arms))
    if len(tasks) < 2 or len(panels) > MOST_PANELS:
        return None
    figure = Figure(
        figsize=(max(5, (1.6 + 0.62 * len(results.sets)) * len(panels)), 1.6 + 0.42 * len(tasks)), layout="constrained"
    )
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    said = []
    means = [score.mean for arm in results.arms for score in arm.scores.values()]
    for axis, (name, arms) in zip(axes, panels.items(), strict=True):
        grid = np.full((len(tasks), len(results.sets)), np.nan)
        for task, arm in arms.items():
            for j, test_set in enumerate(results.sets):
                if test_set in arm.scores:
                    grid[tasks.index(task), j] = arm.scores[test_set].mean
        same = np.array([[task.split("/")[-1] == test_set for test_set in results.sets] for task in tasks])
        _matrix(axis, grid, [task.split("/")[-1] for task in tasks], results.sets, "{:.0f}", min(means), max(means))
        axis.set_title(name, loc="left")
        axis.set_xlabel("tested on")
        if same.any() and (~same).any():
            said.append(
                f"{name + ': ' if name else ''}own set {np.nanmean(grid[same]):.1f}, other sets {np.nanmean(grid[~same]):.1f}"
            )
    axes[0].set_ylabel("trained on")
    summary = f" Means: {'; '.join(said)}." if said else ""
    seeds = sorted({len(score.seeds) for arm in results.arms for score in arm.scores.values()})
    caption = f"Score in percent of the model trained on one set and tested on each, mean over {seeds[0]}{f' to {seeds[-1]}' if len(seeds) > 1 else ''} seeds.{summary}"
    return "transfer", "Transfer between sets", caption, figure


def _matrix(
    axis: Axes,
    grid: NDArray[np.float64],
    rows: Sequence[Any],
    columns: Sequence[Any],
    form: str,
    low: float,
    high: float,
) -> Any:
    image = axis.imshow(grid, cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(
        range(len(columns)),
        columns,
        rotation=45 if max(map(len, map(str, columns))) > 3 else 0,
        ha="right" if max(map(len, map(str, columns))) > 3 else "center",
    )
    axis.spines[:].set_visible(False)
    if form and grid.size <= 400:
        for i, j in itertools.product(range(len(rows)), range(len(columns))):
            if np.isfinite(grid[i, j]):
                dark = grid[i, j] < (low + high) / 2
                axis.text(
                    j,
                    i,
                    form.format(grid[i, j]),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
    return image


# --- what was learned: RUN/analysis -----------------------------------------------


STATISTICS = {"views": [{"name": str, "part": str, "layer": int, "normalized_rank": amount}]}
"""What is drawn of an analysis's statistics.json."""


def _analysed(results: Results) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """Returns, per arm, the analysis folder of its first analysed run and the statistics per weight."""
    analyses: dict[str, tuple[Path, list[dict[str, Any]]]] = {}
    for arm in results.arms:
        for record in arm.records:
            folder = record.path / "analysis"
            try:
                views = read_json(folder / "statistics.json", STATISTICS)["views"]
            except (OSError, ValueError):  # not analysed, or damaged since: the other figures do without
                continue
            if views:
                analyses[arm.label] = (folder, views)
                break
    return dict(itertools.islice(analyses.items(), MOST_PANELS))


def heat_maps(results: Results) -> tuple[str, str, str, Figure] | None:
    """Normalised rank of ΔW, parts by layers, a panel per arm (HyperAdapt, figure 3)."""
    analyses = _analysed(results)
    if not analyses:
        return None
    parts = list(dict.fromkeys(view["part"] for _, views in analyses.values() for view in views))
    layers = sorted({view["layer"] for _, views in analyses.values() for view in views})
    across = min(len(analyses), max(1, 24 // len(layers)), 3)
    down = -(-len(analyses) // across)
    size = (1 + across * max(2.2, 0.5 + 0.3 * len(layers)), down * (0.8 + 0.26 * len(parts)) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    highest = max(view["normalized_rank"] for _, views in analyses.values() for view in views) or 1.0
    for axis, (name, (_, views)) in zip(axes, analyses.items(), strict=False):
        grid = np.full((len(parts), len(layers)), np.nan)
        for view in views:
            grid[parts.index(view["part"]), layers.index(view["layer"])] = view["normalized_rank"]
        image = _matrix(axis, grid, parts, layers, "", 0, highest)
        step = 1 + (len(layers) - 1) // 15
        axis.set_xticks(range(0, len(layers), step), layers[::step], rotation=0, ha="center")
        axis.set_title(name, loc="left", fontsize=10)
    for axis in axes[len(analyses) :]:
        axis.set_visible(False)
    axes[0].set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="#{σ ≥ 0.01} / rank(W)")
    caption = "Normalised rank of the update ΔW: singular values of at least 0.01, over the rank of W; first analysed seed of each arm."
    return "rank-maps", "Rank of the updates", caption, figure


def spectra(results: Results) -> tuple[str, str, str, Figure] | None:
    """The largest singular values of ΔW in the middle layer, a panel per part (HyperAdapt, figure 4)."""
    analyses = _analysed(results)
    layers = sorted({view["layer"] for _, views in analyses.values() for view in views})
    if not layers:
        return None
    layer = layers[(len(layers) - 1) // 2]
    curves: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, (folder, views) in analyses.items():
        try:
            arrays = load_file(folder / "singular_values.safetensors")
        except (OSError, SafetensorError):
            continue
        for view in views:
            values = arrays.get(f"delta/{view['name']}")
            if view["layer"] == layer and values is not None:
                curves.setdefault(view["part"], {})[name] = values[:SPECTRUM]
    if not curves:
        return None
    across = min(3, len(curves))
    down = -(-len(curves) // across)
    figure = Figure(figsize=(max(5, 3.2 * across), 2.4 * down + 0.8), layout="constrained")
    axes = list(figure.subplots(down, across, sharex=True, squeeze=False).flat)
    for axis, (part, by_arm) in zip(axes, curves.items(), strict=False):
        for i, name in enumerate(analyses):
            if name in by_arm:
                values = np.where(by_arm[name] > 1e-7 * by_arm[name].max(initial=0), by_arm[name], np.nan)
                axis.plot(np.arange(1, len(values) + 1), values, color=PALETTE[i], label=name, linewidth=1.4)
        axis.axhline(0.01, color="#888888", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_title(part, loc="left")
        axis.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    _legend(figure, axes[0])
    caption = f"The {SPECTRUM} largest singular values of ΔW in layer {layer} by index, values at rounding level left out; grey: 0.01. First analysed seed of each arm."
    return "spectra", "Spectra of the updates", caption, figure
