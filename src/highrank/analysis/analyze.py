"""From run directories to statistics of their weight updates: tables, statistics.json, figures.

highrank analyze RUN... [--full RUN] [--out DIR] [--sketch COLUMNS] [--tiny SIZE]
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from highrank.analysis import figures
from highrank.analysis import spectra as store
from highrank.analysis.spectra import EXACT, Settings
from highrank.analysis.summary import MEANS, Analysis, by, describe, expressive, means
from highrank.base.console import console
from highrank.base.errors import UserError
from highrank.base.files import sha256, write_atomic
from highrank.base.options import Words
from highrank.base.saved import read_results
from highrank.config.run_config import SAME_RUN
from highrank.model.adapter_folder import read_card
from highrank.model.adapters import Adapters
from highrank.report import dashboard
from highrank.report.runs import read_sweep
from highrank.train.saved import load_run, read_run

FOLDER = "analysis"
PLAIN: dict[str, Any] = {"box": box.SIMPLE_HEAD, "title_justify": "left"}


def analyze_run(folder: Path, settings: Settings = EXACT, adapters: Adapters | None = None) -> Analysis:
    """Returns the analysis of one run and writes its arrays, statistics.json and figures into RUN/analysis.

    The singular values on disk are used if they were computed from this adapter with these settings. `adapters` are the
    run's, where they are in memory already.

    Raises:
        UserError: if the folder holds no trained run, its method has no ΔW, or its weights are not finite.
    """

    run = read_run(folder)
    if not run.method.family.changes_weights:
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
    runs = dict.fromkeys(run for folder in folders for run in runs_in(folder))
    named = {*folders, full}
    analyses = [
        a for run in {**runs, **({full: None} if full else {})} if (a := _analysis(run, run in named, settings))
    ]
    if not analyses:
        raise UserError(f"analyze: a run that can be analysed is needed, got none in {', '.join(map(str, folders))}")
    if full and analyses[-1].run.method.family.keeps_base:
        raise UserError(
            f"analyze: --full is a run of full fine-tuning, got method={analyses[-1].run.method.name} in {full}"
        )
    if len(analyses) > 1:
        return compare(analyses, out or Path(os.path.commonpath([a.folder.resolve() for a in analyses])) / FOLDER)
    show(analyses[0])
    if out:
        draw(out, analyses)
    return out or analyses[0].folder / FOLDER


def _analysis(run: Path, named: bool, settings: Settings) -> Analysis | None:
    """Returns a run's analysis; of a damaged one that was not named, but is of a sweep, nothing, and says why."""
    try:
        return analyze_run(run, settings)
    except UserError as error:
        if named:
            raise
        _left_out(run, str(error))
        return None


def _left_out(run: Path, reason: str) -> None:
    print(f"not analysed: {run.name}: {reason}", file=sys.stderr)


def runs_in(folder: Path) -> list[Path]:
    """Returns a run directory itself; of a sweep folder, the finished runs whose method has a ΔW, and says which are damaged."""
    if not (folder / "sweep.json").is_file():
        return [folder]
    sweep = read_sweep(folder)
    for run, reason in sweep.skipped:
        _left_out(run, reason)
    done = [record.path for record in sweep.records if record.status == "done"]
    runs = []
    for run in done:
        try:
            runs += [run] if read_card(run / "adapter")["views"] else []
        except UserError as error:
            _left_out(run, str(error))
    if not runs:
        raise UserError(
            f"analyze: a sweep holds finished runs with a ΔW, got {len(done)} finished and none with a ΔW in {folder}"
        )
    return runs


def compare(analyses: Sequence[Analysis], out: Path) -> Path:
    """Prints one row per run over the weights they share; writes comparison.json and figures into `out`.

    comparison.json names the runs as seen from its folder, so that both can be moved together.
    """
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
        {"run": os.path.relpath(a.folder, out), "label": name, "mean": means(a.rows), "parts": by(a.rows, "part")}
        for name, a in zip(labels(analyses), analyses, strict=True)
    ]
    draw(out, analyses)
    write_json(out / "comparison.json", {"weights": sorted(shared), "runs": runs})
    return out


def labels(analyses: Sequence[Analysis]) -> list[str]:
    """Returns a name per run: its method, and the values in which runs of that method differ."""
    values = [{**asdict(a.run.method_cfg), **vars(a.run.core)} for a in analyses]
    names = []
    for config, a in zip(values, analyses, strict=True):
        peers = [v for v, other in zip(values, analyses, strict=True) if other.run.method is a.run.method]
        places = (*SAME_RUN, "start_hash")
        differing = [k for k in config if k not in places and any(peer[k] != config[k] for peer in peers)]
        names.append(" ".join([a.run.method.name, *(f"{key}={config[key]}" for key in differing)]))
    return names


def show(analysis: Analysis) -> None:
    """Prints the means by placement part and by layer."""
    columns = columns_of([analysis])
    for key in ("part", "layer"):
        title = f"ΔW of {analysis.run.name}: mean by {key}"
        table = Table(key, "n", *(MEANS[column] for column in columns), title=title, **PLAIN)
        for name, averages in by(analysis.rows, key).items():
            table.add_row(name, str(averages["weights"]), *shown(averages, columns))
        console.print(table)
    if "error" in columns:
        console.print(
            "randomised SVD: each σ lies within `error` above its value, so ranks and counts are lower bounds"
        )
    show_expressive(analysis)


def show_expressive(analysis: Analysis) -> None:
    """Prints, for full fine-tuning, the two errors of HiRA's theorem 1."""
    if analysis.run.method.family.keeps_base:
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


def shown(averages: dict[str, float], columns: Sequence[str]) -> list[str]:
    styles = {"rank": ".1f", "count_above": ".1f", "effective_rank": ".1f", "error": ".0e"}
    return [format(averages[key], styles.get(key, ".3g")) for key in columns]


def draw(folder: Path, analyses: Sequence[Analysis]) -> None:
    """Writes the figures that these runs call for, as PNG and SVG."""

    figures.write(folder, figures.draw(analyses, labels(analyses)))


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(content, indent=1, allow_nan=False).encode())


def command(words: list[str]) -> int:
    """`highrank analyze`: prints the tables, and last the folder of the figures."""

    parser = Words("analyze", "RUN... [--full RUN] [--out DIR] [--sketch COLUMNS] [--tiny SIZE]")
    parser.add_argument("--full", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sketch", type=int)
    parser.add_argument("--tiny", type=float, default=Settings.tiny)
    given = parser.options(words, "runs")
    folder = analyze(given.runs, given.full, given.out, Settings(given.tiny, given.sketch))
    for run in given.runs:
        dashboard.refresh(run)
    print(folder)
    return 0
