"""From run directories to statistics of their weight updates: tables, statistics.json, figures.

highrank analyze RUN... [--full RUN] [--out DIR] [--sketch COLUMNS] [--tiny SIZE]
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from highrank.adapters import Adapters, read_card, write_atomic
from highrank.analysis import spectra as store
from highrank.analysis import statistics
from highrank.analysis.spectra import EXACT, Settings, Spectra
from highrank.analysis.statistics import Values
from highrank.backbones import sha256
from highrank.config import UNHASHED, Run
from highrank.errors import UserError
from highrank.results import read_results
from highrank.words import Words

console = Console()
FOLDER = "analysis"
PLAIN: dict[str, Any] = {"box": box.SIMPLE_HEAD, "title_justify": "left"}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""r at which the two errors of HiRA's theorem 1 are tabulated."""
MEANS = {
    "rank": "rank",
    "normalized_rank": "norm. rank",
    "normalized_rank_relative": "relative",
    "count_above": "σ>.005",
    "energy": "energy",
    "effective_rank": "eff. rank",
    "largest": "σ₁",
    "error": "error",
}
"""Statistics that are averaged over weights, with their column heads."""


@dataclass(frozen=True)
class Analysis:
    """One analysed run."""

    folder: Path
    run: Run
    spectra: Spectra
    rows: list[dict[str, Any]]
    """One per adapted weight, by layer and part: where it is, and its statistics."""

    def values(self, kind: str, row: dict[str, Any]) -> Values:
        """Returns the singular values of one weight: of `delta`, `base` or `ratio`."""
        return self.spectra.values[f"{kind}/{row['name']}"]

    @property
    def base(self) -> tuple[Any, ...]:
        """What two runs share whose updates can be compared."""
        model = read_results(self.folder)["model"]
        return (model["name"] if model["kind"] == "random" else "", model["sha"], self.run.model["shuffled"])

    @property
    def summary(self) -> dict[str, Any]:
        """What statistics.json holds."""
        found = {
            "key": self.spectra.key,
            "method": {"name": self.run.method.name, **asdict(self.run.method_cfg)},
            "thresholds": {
                "normalized_rank": statistics.NORMALIZED_RANK_THRESHOLD,
                "count_above": statistics.COUNT_THRESHOLD,
                "rank": "max(n, k) eps(fp32) sigma_1",
            },
            "mean": means(self.rows),
            "parts": by(self.rows, "part"),
            "layers": by(self.rows, "layer"),
            "views": self.rows,
        }
        return {**found, "expressive": expressive(self)} if self.run.method.replaces_base else found


def describe(view: dict[str, Any], spectra: Spectra) -> dict[str, Any]:
    """Returns the statistics of one adapted weight, whose view is given as in adapter.json."""
    name, shape = view["name"], (view["out_features"], view["in_features"])
    delta, base = spectra.values[f"delta/{name}"], spectra.values[f"base/{name}"]
    base_rank = statistics.numerical_rank(base, shape)
    row = {
        **{key: view[key] for key in ("name", "part", "layer", "out_features", "in_features")},
        "rank": statistics.numerical_rank(delta, shape),
        "normalized_rank": statistics.normalized_rank(delta, base_rank),
        "normalized_rank_relative": statistics.normalized_rank(delta, base_rank, relative=True),
        "count_above": statistics.count_above(delta),
        "energy": statistics.energy(delta),
        "effective_rank": statistics.effective_rank(delta),
        "largest": float(delta[0]),
        "error": spectra.notes[f"delta/{name}"]["error"],
        "base_rank": base_rank,
        "base_largest": float(base[0]),
        "base_effective_rank": statistics.effective_rank(base),
    }
    if f"ratio/{name}" in spectra.values:
        quotient, notes = spectra.values[f"ratio/{name}"], spectra.notes[f"ratio/{name}"]
        row |= {
            "ratio_rank": statistics.numerical_rank(quotient, shape),
            "ratio_effective_rank": statistics.effective_rank(quotient),
            "ratio_error": notes["error"],
            "masked": int(notes["masked"]),
            "left_out": notes["left_out"],
        }
    return row


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean of every statistic over weights, and their number; of `error` the largest."""
    found = {key: sum(row[key] for row in rows) / len(rows) for key in (*MEANS, "base_rank")}
    return {**found, "error": max(row["error"] for row in rows), "weights": len(rows)}


def by(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Returns the means over the weights of each part, or layer."""
    groups = dict.fromkeys(row[key] for row in rows)
    return {str(group): means([row for row in rows if row[key] == group]) for group in groups}


def errors_at(full: Analysis, row: dict[str, Any], r: int) -> tuple[float, float]:
    """Returns HiRA's bound and LoRA's error at rank r for one weight of a full fine-tuning run (HiRA, theorem 1)."""
    bound = statistics.expressive_bound(full.values("ratio", row), full.values("base", row), r, row["left_out"])
    return bound, statistics.low_rank_error(full.values("delta", row), r)


def expressive(full: Analysis) -> list[dict[str, float]]:
    """Returns, per r, the means over weights of HiRA's bound and LoRA's error, and the share of weights with the former
    below the latter."""
    limit = min(min(row["out_features"], row["in_features"]) for row in full.rows)
    found = []
    for r in (r for r in RANKS if r < limit):
        pairs = [errors_at(full, row, r) for row in full.rows]
        found.append(
            {
                "r": r,
                "hira_bound": sum(bound for bound, _ in pairs) / len(pairs),
                "lora_error": sum(error for _, error in pairs) / len(pairs),
                "share_below": sum(bound < error for bound, error in pairs) / len(pairs),
            }
        )
    return found


def analyze_run(folder: Path, settings: Settings = EXACT, adapters: Adapters | None = None) -> Analysis:
    """Returns the analysis of one run and writes its arrays, statistics.json and figures into RUN/analysis.

    The singular values on disk are used if they were computed from this adapter with these settings. `adapters` are the
    run's, where they are in memory already.

    Raises:
        UserError: if the folder holds no trained run, its method has no ΔW, or its weights are not finite.
    """
    from highrank.saved import load_run, read_run

    run = read_run(folder)
    if run.method.site != "weight":
        raise UserError(
            f"analyze: {run.method.name} changes no weight, so there is no ΔW, got {folder}; "
            "analyze runs of methods that act on weights (highrank methods)"
        )
    views = read_card(folder / "adapter")["views"]
    weights = folder / "adapter" / "adapter.safetensors"
    model = read_results(folder)["model"]
    key = store.cache_key(sha256(weights) if weights.is_file() else "", model["sha"], settings)
    spectra = store.read(folder / FOLDER, key)
    drawn = spectra is not None and (folder / FOLDER / "heat_map.svg").is_file()  # the last one written
    if spectra is None:
        if adapters is None:
            _, _, adapters = load_run(folder)
        spectra = store.measure(adapters, key, settings)
        store.write(folder / FOLDER, spectra)
    analysis = Analysis(folder, run, spectra, [describe(view, spectra) for view in views])
    write_json(folder / FOLDER / "statistics.json", analysis.summary)
    if not drawn:
        draw(folder / FOLDER, [analysis])
    return analysis


def at_end_of(folder: Path, adapters: Adapters | None = None) -> dict[str, Any]:
    """Analyses a run that has trained; returns its mean statistics, or why there are none, for results.json."""
    try:
        return means(analyze_run(folder, adapters=adapters).rows)
    except UserError as error:
        return {"error": str(error)}


def analyze(
    folders: Sequence[Path], full: Path | None = None, out: Path | None = None, settings: Settings = EXACT
) -> Path:
    """Analyses runs (or the finished ones of sweeps), prints their tables, and compares them if they are several.

    Comparisons cover the weights that all of them adapt. Returns the folder of the figures.

    Raises:
        UserError: if the runs have no base or no adapted weight in common, or `full` is no full fine-tuning.
    """
    folders = [run for folder in folders for run in runs_in(folder)]
    analyses = [analyze_run(folder, settings) for folder in dict.fromkeys([*folders, *([full] if full else [])])]
    if full and not analyses[-1].run.method.replaces_base:
        raise UserError(
            f"analyze: --full is a run of full fine-tuning, got method={analyses[-1].run.method.name} in {full}"
        )
    if len(analyses) > 1:
        return compare(analyses, out or Path(os.path.commonpath([a.folder.resolve() for a in analyses])) / FOLDER)
    show(analyses[0])
    if out:
        draw(out, analyses)
    return out or folders[0] / FOLDER


def runs_in(folder: Path) -> list[Path]:
    """Returns a run directory itself; of a sweep folder, the finished runs whose method has a ΔW."""
    if not (folder / "sweep.json").is_file():
        return [folder]
    from highrank.lab.runs import read_sweep

    done = [record.path for record in read_sweep(folder).records if record.status == "done"]
    found = [run for run in done if read_card(run / "adapter")["views"]]
    if not found:
        raise UserError(
            f"analyze: a sweep holds finished runs with a ΔW, got {len(done)} finished and none with a ΔW in {folder}"
        )
    return found


def compare(analyses: Sequence[Analysis], out: Path) -> Path:
    """Prints one row per run over the weights they share; writes comparison.json and figures into `out`."""
    if len({a.base for a in analyses}) > 1:
        given = ", ".join(f"{a.run.model['name']} in {a.folder}" for a in analyses)
        raise UserError(f"analyze: compared runs share one base, got {given}; analyze them one at a time")
    shared = set.intersection(*({row["name"] for row in a.rows} for a in analyses))
    if not shared:
        given = ", ".join(f"{a.folder} with {a.rows[0]['name']}" for a in analyses)
        raise UserError(
            f"analyze: compared runs share adapted weights, got {given}; use one placement and fused policy"
        )
    analyses = [replace(a, rows=[row for row in a.rows if row["name"] in shared]) for a in analyses]
    columns = columns_of(analyses)
    title = f"mean over the {len(shared)} weights that all runs adapt"
    table = Table("run", *(MEANS[key] for key in columns), title=title, **PLAIN)
    for name, a in zip(labels(analyses), analyses, strict=True):
        table.add_row(name, *shown(means(a.rows), columns))
    console.print(table)
    for a in analyses:
        show_expressive(a)
    runs = [
        {"run": str(a.folder), "label": name, "mean": means(a.rows), "parts": by(a.rows, "part")}
        for name, a in zip(labels(analyses), analyses, strict=True)
    ]
    draw(out, analyses)
    write_json(out / "comparison.json", {"weights": sorted(shared), "runs": runs})
    return out


def labels(analyses: Sequence[Analysis]) -> list[str]:
    """Returns a name per run: its method, and the values in which runs of that method differ."""
    values = [{**asdict(a.run.method_cfg), **vars(a.run.core)} for a in analyses]
    names = []
    for own, a in zip(values, analyses, strict=True):
        peers = [v for v, other in zip(values, analyses, strict=True) if other.run.method is a.run.method]
        differing = [k for k in own if k not in UNHASHED and any(peer[k] != own[k] for peer in peers)]
        names.append(" ".join([a.run.method.name, *(f"{key}={own[key]}" for key in differing)]))
    return names


def show(analysis: Analysis) -> None:
    """Prints the means by placement part and by layer."""
    columns = columns_of([analysis])
    for key in ("part", "layer"):
        title = f"ΔW of {analysis.run.name}: mean by {key}"
        table = Table(key, "n", *(MEANS[column] for column in columns), title=title, **PLAIN)
        for name, found in by(analysis.rows, key).items():
            table.add_row(name, str(found["weights"]), *shown(found, columns))
        console.print(table)
    if "error" in columns:
        console.print(
            "randomised SVD: each σ lies within `error` above its value, so ranks and counts are lower bounds"
        )
    show_expressive(analysis)


def show_expressive(analysis: Analysis) -> None:
    """Prints, for full fine-tuning, the two errors of HiRA's theorem 1."""
    if not analysis.run.method.replaces_base:
        return
    masked = sum(row["masked"] for row in analysis.rows)
    entries = sum(row["out_features"] * row["in_features"] for row in analysis.rows)
    title = f"rank r against full fine-tuning's E; {masked:,} of {entries:,} entries of E ⊘ W masked"
    table = Table("r", "HiRA: σᵣ₊₁(E ⊘ W) ‖W‖", "LoRA: σᵣ₊₁(E)", "HiRA's below, of weights", title=title, **PLAIN)
    for row in expressive(analysis):
        table.add_row(
            str(row["r"]), f"{row['hira_bound']:.4g}", f"{row['lora_error']:.4g}", f"{100 * row['share_below']:.0f} %"
        )
    console.print(table)


def columns_of(analyses: Sequence[Analysis]) -> list[str]:
    """Returns the statistics to print: the error only of a randomised SVD, for otherwise it is rounding."""
    return [key for key in MEANS if key != "error" or any(a.spectra.key["sketch"] for a in analyses)]


def shown(found: dict[str, float], columns: Sequence[str]) -> list[str]:
    styles = {"rank": ".1f", "count_above": ".1f", "effective_rank": ".1f", "error": ".0e"}
    return [format(found[key], styles.get(key, ".3g")) for key in columns]


def draw(folder: Path, analyses: Sequence[Analysis]) -> None:
    """Writes the figures that these runs call for, as PNG and SVG."""
    from highrank.analysis import figures

    figures.write(folder, figures.draw(analyses, labels(analyses)))


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(content, indent=1, allow_nan=False).encode())


def command(words: list[str]) -> int:
    """`highrank analyze`: prints the tables, and last the folder of the figures."""
    from highrank.lab import dashboard

    parser = Words("analyze", "RUN... [--full RUN] [--out DIR] [--sketch COLUMNS] [--tiny SIZE]")
    parser.add_argument("--full", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sketch", type=int)
    parser.add_argument("--tiny", type=float, default=Settings.tiny)
    given = parser.options(words, "runs")
    figures = analyze(given.runs, given.full, given.out, Settings(given.tiny, given.sketch))
    for run in given.runs:
        dashboard.refresh(run)
    print(figures)
    return 0
