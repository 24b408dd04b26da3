"""The papers' figures of weight updates, for one run or several.

Drawn on `Figure` objects, without pyplot and its global state. Colours are Okabe and Ito's, told apart by colour-blind
readers; after seven runs the line style changes.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from highrank.analysis import statistics
from highrank.analysis.summary import Analysis, errors_at, means
from highrank.base.files import write_atomic
from highrank.model.placement import PARTS

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY: dict[str, Any] = {"color": "grey", "linewidth": 0.8, "linestyle": "--"}
DASHES = ("-", "--", ":", "-.")
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "highrank"}
BY_LAYER = {
    "count_above": ("singular values of ΔW above 0.005", "linear"),
    "energy": ("energy ‖ΔW‖² (Frobenius)", "log"),
    "effective_rank": ("effective rank of ΔW", "linear"),
}


def draw(analyses: Sequence[Analysis], names: Sequence[str]) -> dict[str, Figure]:
    """Returns file name -> figure, of those that these runs call for; `names` label the runs."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "spectra": spectra(analyses, names),
            **{key: by_layer(analyses, names, key) for key in BY_LAYER},
            "rank_per_layer": rank_per_layer(analyses, names),
        }
        if sum(hasattr(a.run.method_cfg, "r") for a in analyses) > 1:
            figures["rank_by_r"] = rank_by_r(analyses)
        for full in (a for a in analyses if not a.run.method.family.keeps_base):
            figures |= {"normalized": normalized(full), "expressive": expressive(full)}
        figures["heat_map"] = heat_map(analyses, names)
    return figures


def write(folder: Path, figures: dict[str, Figure]) -> None:
    """Writes every figure as <name>.png and <name>.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            for suffix, extra in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                image = io.BytesIO()
                figure.savefig(image, format=suffix, **extra)
                write_atomic(folder / f"{name}.{suffix}", image.getvalue())


def heat_map(analyses: Sequence[Analysis], names: Sequence[str]) -> Figure:
    """Normalised rank, parts by layers, one panel per run on one scale (HyperAdapt, figure 3)."""
    parts, layers = _parts(analyses), _layers(analyses)
    columns = 1 + (len(analyses) - 1) // 4
    lines = -(-len(analyses) // columns)
    width, height = 1.2 + 0.25 * len(layers), 0.7 + 0.25 * len(parts)
    figure = Figure(figsize=(1.2 + columns * width, 0.3 + lines * height), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    highest = max(1.0, *(row["normalized_rank"] for a in analyses for row in a.rows))
    for axis, a, name in zip(axes, analyses, names, strict=False):
        grid = np.full((len(parts), len(layers)), np.nan)
        for row in a.rows:
            grid[parts.index(row["part"]), layers.index(row["layer"])] = row["normalized_rank"]
        image = axis.imshow(grid, vmin=0, vmax=highest, cmap="cividis", aspect="auto", interpolation="nearest")
        axis.set_yticks(range(len(parts)), parts)
        step = 1 + (len(layers) - 1) // 15
        axis.set_xticks(range(0, len(layers), step), layers[::step])
        axis.set_title(name, loc="left")
        axis.spines[:].set_visible(False)
        axis.set_xlabel("layer")
    for axis in axes[len(analyses) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, label="#{σ ≥ 0.01} / rank(W)")
    return figure


def spectra(analyses: Sequence[Analysis], names: Sequence[str]) -> Figure:
    """First 50 singular values in the middle layer, with the threshold 0.01 and, upright, r of updates of rank r
    (HyperAdapt, figure 4)."""
    layer = _middle(analyses)

    def curve(axis: Axes, part: str) -> None:
        for i, a in enumerate(analyses):
            for row in _rows(a, part, layer):
                head = a.values("delta", row)[: statistics.HEAD]
                axis.plot(np.arange(1, len(head) + 1), _above_noise(head), **_line(i, names[i]))
                r = getattr(a.run.method_cfg, "r", None)
                if r is not None and row["rank"] <= r < len(head):
                    axis.axvline(r, color=_line(i)["color"], linestyle="--", linewidth=0.8)
        axis.axhline(statistics.NORMALIZED_RANK_THRESHOLD, **GREY)
        axis.set_yscale("log")

    return _panels(analyses, curve, f"singular values of ΔW, layer {layer}; grey: 0.01", "index", names)


def by_layer(analyses: Sequence[Analysis], names: Sequence[str], key: str) -> Figure:
    """One statistic over layers, one panel per part (HiRA, figures 4, 5 and 8)."""
    title, scale = BY_LAYER[key]

    def curve(axis: Axes, part: str) -> None:
        for i, a in enumerate(analyses):
            rows = [row for row in a.rows if row["part"] == part]
            heights = [row[key] if row[key] > 0 or scale == "linear" else np.nan for row in rows]
            axis.plot([row["layer"] for row in rows], heights, marker=".", **_line(i, names[i]))
        axis.set_yscale(scale)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _panels(analyses, curve, title, "layer", names)


def rank_per_layer(analyses: Sequence[Analysis], names: Sequence[str]) -> Figure:
    """Mean rank over the parts of each layer (HiRA, figure 7); grey: the mean rank of W."""
    figure, axis = _single("layer", "rank of ΔW, mean over parts")
    for i, a in enumerate(analyses):
        layers = _layers([a])
        axis.plot(layers, [_mean(a, "rank", layer) for layer in layers], marker=".", **_line(i, names[i]))
    layers = _layers(analyses[:1])
    base = [_mean(analyses[0], "base_rank", layer) for layer in layers]
    axis.plot(layers, base, label="W", **GREY)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return figure


def rank_by_r(analyses: Sequence[Analysis]) -> Figure:
    """Mean rank over all weights against r, a line per method (HiRA, figure 1); runs of one r are averaged."""
    figure, axis = _single("r", "rank of ΔW, mean over weights")
    points: dict[str, dict[int, list[float]]] = {}
    for a in analyses:
        if hasattr(a.run.method_cfg, "r"):
            points.setdefault(a.run.method.name, {}).setdefault(a.run.method_cfg.r, []).append(means(a.rows)["rank"])
    for i, (method, by_r) in enumerate(points.items()):
        ranks = sorted(by_r)
        axis.plot(ranks, [np.mean(by_r[r]) for r in ranks], marker="o", **_line(i, method))
    axis.axhline(means(analyses[0].rows)["base_rank"], label="W", **GREY)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return figure


def normalized(full: Analysis) -> Figure:
    """σ / ‖σ‖₂ of full fine-tuning's E and of E ⊘ W in the middle layer (HiRA, figure 10)."""
    layer = _middle([full])

    def curve(axis: Axes, part: str) -> None:
        for row in _rows(full, part, layer):
            for i, (kind, name) in enumerate((("delta", "E"), ("ratio", "E ⊘ W"))):
                values = statistics.normalized(full.values(kind, row))
                axis.plot(np.arange(1, len(values) + 1), _above_noise(values), **_line(i, name))
        axis.set_yscale("log")

    return _panels([full], curve, f"σ / ‖σ‖, full fine-tuning, layer {layer}", "index", ("E", "E ⊘ W"))


def expressive(full: Analysis) -> Figure:
    """The two errors of HiRA's theorem 1 against r, in the middle layer."""
    layer = _middle([full])

    def curve(axis: Axes, part: str) -> None:
        for row in _rows(full, part, layer):
            ranks = np.arange(min(row["out_features"], row["in_features"]))
            pairs = np.array([errors_at(full, row, r) for r in ranks])
            for i, name in enumerate(("HiRA (bound)", "LoRA")):
                axis.plot(ranks, _above_noise(pairs[:, i]), **_line(i, name))
        axis.set_yscale("log")

    return _panels([full], curve, f"spectral error of rank r, layer {layer}", "r", ("HiRA (bound)", "LoRA"))


def _panels(
    analyses: Sequence[Analysis], curve: Callable[[Axes, str], None], title: str, xlabel: str, names: Sequence[str]
) -> Figure:
    """One panel per part, and one legend below."""
    parts = _parts(analyses)
    lines = 1 + (len(parts) > 4)
    columns = -(-len(parts) // lines)
    figure = Figure(figsize=(0.6 + 2.6 * columns, 0.6 + 2.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axis, part in zip(axes, parts, strict=False):
        curve(axis, part)
        axis.minorticks_off()
        axis.set_title(part, loc="left")
        axis.set_xlabel(xlabel)
    for axis in axes[len(parts) :]:
        axis.set_visible(False)
    handles = [matplotlib.lines.Line2D([], [], **_line(i, name)) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _single(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    return figure, axis


def _line(i: int, label: str | None = None) -> dict[str, Any]:
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i // len(PALETTE) % len(DASHES)], "label": label}


def _above_noise(values: Any) -> Any:
    """Leaves out what a logarithmic axis cannot show: zeros, and values below fp32's rounding of the largest."""
    return np.where(values > statistics.EPSILON * max(values, default=0.0), values, np.nan)


def _parts(analyses: Sequence[Analysis]) -> list[str]:
    parts = dict.fromkeys(row["part"] for a in analyses for row in a.rows)
    return sorted(parts, key=lambda part: PARTS.index(part.split("+")[0]))


def _layers(analyses: Sequence[Analysis]) -> list[int]:
    return sorted({row["layer"] for a in analyses for row in a.rows})


def _middle(analyses: Sequence[Analysis]) -> int:
    layers = _layers(analyses)
    return layers[(len(layers) - 1) // 2]


def _rows(analysis: Analysis, part: str, layer: int) -> list[dict[str, Any]]:
    return [row for row in analysis.rows if row["part"] == part and row["layer"] == layer]


def _mean(analysis: Analysis, key: str, layer: int) -> float:
    return float(np.mean([row[key] for row in analysis.rows if row["layer"] == layer]))
