"""The board: every method under one protocol, with one search of rates and one budget, on two tasks.

    python experiments/board/board.py FOLDER                      # runs what is missing of both sweeps in FOLDER
    python experiments/board/board.py FOLDER --methods my_method  # a method from outside joins the others
    python experiments/board/board.py FOLDER --only stsb --jobs 2 # one half, two runs at a time
    python experiments/board/board.py FOLDER --read               # runs nothing: what has been trained so far
    python experiments/board/board.py                             # writes README.md anew from results/

What the runs say goes into `results/` (`--results` moves it): `runs.csv` has a row per run with the fields of PEFT's method
comparison (github.com/huggingface/peft, method_comparison/processing.py) under their names where they are the same
quantity, and ours and hashes after them; `stsb.csv` and `wordmath.csv` have a row per method, `absent.csv` what did not
finish. README.md and the figures are made from these files alone.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from scipy.stats import spearmanr

from highrank.base.errors import UserError
from highrank.config.run_config import flat
from highrank.report import figures, page
from highrank.report.published import ROWS
from highrank.report.runs import Record
from highrank.report.scores import Arm, collect, compare, items, losses, pivot
from highrank.report.statistics import LOSS
from highrank.report.tables import peak_gib

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
HALVES = {"stsb": (), "wordmath": ("general_text=experiments/board/general_text.txt",)}
"""The presets below `board/`, and what else their runs are given."""
SEARCH = ("lr_search=3", "lr_search_most=7")
"""Three rates per method, a factor 10^0.5 apart around its default, and on past the best one while it is at an edge."""
DRAWS = 4000
START, END = "<!-- from results/: python experiments/board/board.py -->", "<!-- end -->"
TITLES = {"wordmath": "Word problems, SmolLM2-135M", "stsb": "STS-B, MiniLM-L6"}
ARM = ["method", "trainable", "score", "sd", "low", "high", "mark", "accuracy", "forgetting", "step_s", "peak_gib"]
ARM += ["adapter_mb", "lr", "at_edge", "seeds"]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--only", choices=HALVES)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--read", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(words)
    if not given.folder and (given.methods or given.only or given.read or given.jobs != 1):
        parser.error("--methods, --only, --jobs and --read are about a FOLDER; name it")
    halves = [given.only] if given.only else list(HALVES)
    try:
        if given.folder:
            if given.read:
                halves = [half for half in halves if (given.folder / half).is_dir()] or halves
            else:
                for half in halves:
                    execute(half, given.folder / half, given.methods, given.jobs)
            collect_results({half: given.folder / half for half in halves}, given.results)
        write(given.results, given.results.parent / "README.md")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def execute(half: str, folder: Path, more: Sequence[str], jobs: int) -> None:
    """Runs what is missing of a half's sweep, with the methods that joined it before.

    Raises:
        UserError: if it could not begin, or was stopped; a run that fails is left to the page.
    """
    preset = OmegaConf.load(ROOT / "configs" / "experiment" / "board" / f"{half}.yaml")
    plan = folder / "sweep.json"
    joined = json.loads(plan.read_text(encoding="utf-8"))["axes"]["method"] if plan.is_file() else []
    methods = ",".join(dict.fromkeys([*preset.sweep.method, *joined, *more]))
    command = [sys.executable, "run.py", "-m", f"experiment=board/{half}", f"method={methods}", *HALVES[half]]
    command += [*SEARCH, f"jobs={jobs}", f"sweep_dir={folder.resolve()}"]
    with subprocess.Popen(command, cwd=ROOT) as sweep:
        status = None
        while status is None:
            with suppress(KeyboardInterrupt):  # the sweep has got it too: its runs save first
                status = sweep.wait()
    if status == 2:
        raise UserError(
            f"board: the sweep {half} must be able to begin, got the error above; a method that fits one half alone joins "
            "it with --only"
        )
    if status not in (0, 1):
        raise UserError(
            f"board: the sweep {half} must end, got exit status {status}; the same command goes on from there"
        )


# --- from runs to results/ --------------------------------------------------------


def collect_results(folders: Mapping[str, Path], out: Path) -> None:
    """Writes what the sweeps' finished runs say, and each sweep's report into its folder.

    Raises:
        UserError: for a folder that is no sweep, one without a finished run, or runs of different protocols or data.
    """
    kept = {
        name: [row for row in _read(out / f"{name}.csv") if row["half"] not in folders] for name in ("runs", "absent")
    }
    halves: dict[str, list[dict[str, Any]]] = {}
    for half, folder in folders.items():
        source = page.read([folder])
        print(page.report(source))
        results = collect(source.records)
        scored = losses(results) or results
        shape = pivot(scored)
        compare(items(scored, shape), shape, lower=scored.lower)
        halves[half] = sorted(map(_arm, scored.arms), key=lambda row: row["score"] * (1 if scored.lower else -1))
        kept["runs"] += [_run(half, record) for arm in results.arms for record in arm.records]
        kept["absent"] += [
            {"half": half, "run": run, "status": status, "reason": why} for run, status, why in source.absent
        ]
    for half, arms in halves.items():
        _write(out / f"{half}.csv", ARM, arms)
    for name, rows in kept.items():
        _write(out / f"{name}.csv", list(dict.fromkeys(key for row in rows for key in row)) or ["half"], rows)


def _arm(arm: Arm) -> dict[str, Any]:
    (score,) = arm.scores.values()
    return {
        "method": flat(arm.records[0].config)["method"],
        "trainable": arm.records[0].results["params"]["trainable"],
        "score": score.mean,
        "sd": score.sd,
        "low": score.low,
        "high": score.high,
        "mark": "best" if score.bold else "as good" if score.as_good else "",
        "accuracy": arm.mean(lambda record: record.results["metrics"]["final"].get("accuracy")),
        "forgetting": arm.mean(lambda record: record.results.get("forgetting", {}).get("forgetting")),
        "step_s": arm.mean(_step_seconds),
        "peak_gib": arm.mean(peak_gib),
        "adapter_mb": arm.mean(lambda record: _adapter_bytes(record) / 1e6),
        "lr": flat(arm.records[0].config)["lr"],
        "at_edge": bool((arm.records[0].search or {}).get("at_edge")),
        "seeds": len(score.seeds),
    }


def _run(half: str, record: Record) -> dict[str, Any]:
    """Returns a run's row: PEFT's fields under their names where the quantity is the same, ours after them."""
    results, config = record.results, flat(record.config)
    final = results["metrics"]["final"]
    return {
        "half": half,
        "task_name": config["task"],
        "experiment_name": record.name,
        "model_id": config["model"],
        "peft_type": config["method"],
        "peft_config": json.dumps({k: v for k, v in record.config["method"].items() if k != "name"}),
        "total_time": results["time"]["total_s"],
        "train_time": results["time"]["train_s"],
        "file_size": _adapter_bytes(record),
        "test_accuracy": final["accuracy"] / 100 if "accuracy" in final else None,
        "train_samples": results["steps"] * config["batch_size"],
        "train_total_tokens": results["tokens"]["train"],
        "num_trainable_params": results["params"]["trainable"],
        "num_total_params": results["params"]["total"],
        "forgetting": results.get("forgetting", {}).get("forgetting"),
        "transformers_version": results["versions"]["transformers"],
        "torch_version": results["versions"]["torch"],
        "score": final[record.metric],
        "test_loss": final.get(LOSS),
        "seed": record.seed,
        "lr": config["lr"],
        "peak_resident_bytes": results.get("memory", {}).get("peak_resident_bytes"),
        "highrank_version": results["versions"]["highrank"],
        "config_hash": results["config_hash"],
        "protocol_hash": results["protocol"]["hash"],
        "model_sha": results["model"]["sha"],
        "data_sha": " ".join(str(file["sha256"]) for file in results["data"]),
    }


def _step_seconds(record: Record) -> float:
    return float(record.results["time"]["train_s"]) / int(record.results["steps"])


def _adapter_bytes(record: Record) -> int:
    return sum(file.stat().st_size for file in (record.path / "adapter").glob("*.safetensors"))


# --- from results/ to README.md ---------------------------------------------------


def write(results: Path, readme: Path) -> None:
    """Writes the README's tables and the figures anew from `results/`.

    Raises:
        UserError: if there are no results, or the README has no place for them.
    """
    if not (results / "runs.csv").is_file():
        raise UserError(f"board: results are needed, got none in {results}; name a FOLDER to run the board in")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else START + END + "\n"
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"board: the tables stand between {START} and {END}, got {readme} without them")
    for half in HALVES:
        if rows := _read(results / f"{half}.csv"):
            (results / f"{half}.svg").write_text(figure(half, rows), encoding="utf-8")
    readme.write_text(before + start + tables(results) + end + after, encoding="utf-8")


def tables(results: Path) -> str:
    """Returns the board in Markdown."""
    rows = {half: _read(results / f"{half}.csv") for half in TITLES}
    absent = _read(results / "absent.csv")
    parts = [
        f"### {title}\n\n{_table(half, rows[half])}\n{_absent(half, absent)}"
        f"![{title}: what a score costs]({results.name}/{half}.svg)\n"
        for half, title in TITLES.items()
        if rows[half]
    ]
    agreement = _agreement(_read(results / "runs.csv"))
    return "\n\n" + "\n".join([*parts, f"### Do the boards agree?\n\n{agreement}", ""])


def _table(half: str, rows: Sequence[Mapping[str, str]]) -> str:
    text, peft = half == "wordmath", pefts_board()
    form = ".3f" if text else ".1f"
    heads = [
        "method",
        "trainable",
        "test loss" if text else "Pearson, %",
        *(["accuracy, %", "forgetting"] if text else []),
    ]
    heads += ["step, s", "peak GiB", "adapter, MB", "lr", *(["*PEFT's board*"] if text else [])]
    lines = [f"| {' | '.join(heads)} |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for row in rows:
        value = f"{float(row['score']):{form}}" + (f" ± {float(row['sd']):{form}}" if row["sd"] else " (one seed)")
        value += f" [{float(row['low']):{form}}, {float(row['high']):{form}}]" if row["low"] else ""
        value = f"**{value}**" if row["mark"] == "best" else value + (" ≈" if row["mark"] == "as good" else "")
        cells = [f"`{row['method']}`", _number(row["trainable"], ",.0f"), value]
        if text:
            cells += [_number(row["accuracy"], ".1f"), _number(row["forgetting"], "+.3f")]
        cells += [_number(row["step_s"], ".2f"), _number(row["peak_gib"], ".2f"), _number(row["adapter_mb"], ".2f")]
        cells.append(f"{float(row['lr']):g}{' (edge)' if row['at_edge'] == 'True' else ''}")
        if text:
            cells.append(f"*{peft[row['method']]:.1f}*" if row["method"] in peft else "–")
        lines.append(f"| {' | '.join(cells)} |")
    seeds = max(int(row["seeds"]) for row in rows)
    note = (
        f"± over {seeds} seeds; [95 % over seeds and examples]. "
        if seeds > 1
        else "One seed: no interval, no comparison. "
    )
    note += (
        "Bold: better than every other; ≈: the best, and what cannot be told from it (p < 0.05 after Holm)."
        if seeds > 1
        else ""
    )
    return "\n".join([*lines, "", note.strip(), ""])


def _number(text: str, form: str) -> str:
    return format(float(text), form) if text else "–"


def _absent(half: str, rows: Sequence[Mapping[str, str]]) -> str:
    names = [f"{row['run']} ({row['status']})" for row in rows if row["half"] == half]
    return f"Not here: {', '.join(names)}.\n\n" if names else ""


def figure(half: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Returns an SVG of the score, with its interval, against trainable parameters."""
    less = half == "wordmath"
    with rc_context(figures.STYLE):
        drawn = Figure(figsize=(9, 5.2), layout="constrained")
        axis = drawn.subplots()
        for row in rows:
            x, y = float(row["trainable"]), float(row["score"])
            ends = [[y - float(row["low"])], [float(row["high"]) - y]] if row["low"] else None
            axis.errorbar(x, y, yerr=ends, color=figures.PALETTE[0], marker="o", markersize=4, elinewidth=0.7)
            axis.annotate(row["method"], (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        axis.set_xscale("log")
        axis.set_xlabel("trainable parameters")
        axis.set_ylabel("test loss, nats per token" if less else "Pearson correlation, %")
        if less:
            axis.invert_yaxis()  # better is up
        axis.grid(color="#888888", alpha=0.25, linewidth=0.6)
        name = f"{TITLES[half]}: what a score costs"
        return figures.Drawing(half, name, "", figures.svg(drawn, name)).image()


def pefts_board() -> dict[str, float]:
    """Returns the best of each method's scores on PEFT's board."""
    rows = [row for row in ROWS if row.source.startswith("PEFT")]
    return {row.method: row.scores["gsm8k"] for row in sorted(rows, key=lambda row: row.scores["gsm8k"])}


def _agreement(runs: Iterable[Mapping[str, str]]) -> str:
    """Returns the rank correlations between the halves, and of each with PEFT's board."""
    scores: dict[str, dict[str, list[float]]] = {half: {} for half in TITLES}
    for run in runs:
        value = run["test_loss"] if run["half"] == "wordmath" else run["score"]
        if value:  # a loss may be no number
            goodness = -float(value) if run["half"] == "wordmath" else float(value)
            scores[run["half"]].setdefault(run["peft_type"], []).append(goodness)
    peft = {method: [score] for method, score in pefts_board().items()}
    names = {"wordmath": "word problems", "stsb": "STS-B"}
    pairs = [("word problems", "STS-B", scores["wordmath"], scores["stsb"])]
    pairs += [(name, "PEFT's board", scores[half], peft) for half, name in names.items()]
    lines = []
    for ours, other, a, b in pairs:
        shared = [method for method in a if method in b]
        if len(shared) < 4:
            lines.append(f"- {ours} and {other}: {len(shared)} methods in both, too few to rank.")
            continue
        value, low, high = rank_correlation([a[m] for m in shared], [b[m] for m in shared])
        verdict = (
            "an order in common" if low > 0 else "the opposite order" if high < 0 else "no order in common is shown"
        )
        lines.append(
            f"- {ours} and {other}: {value:+.2f} [{low:+.2f}, {high:+.2f}] over {len(shared)} methods: {verdict}."
        )
    return "Spearman's rank correlation, [95 % over methods and seeds].\n\n" + "\n".join(lines) + "\n"


def rank_correlation(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Returns Spearman's rank correlation of two boards, and its 95 % percentile interval over methods and seeds.

    `a` and `b` have the seeds' scores of each method. A draw takes methods with replacement, the same ones on both boards,
    and seeds with replacement for each.
    """
    rng = np.random.default_rng(0)

    def mean(scores: Sequence[float]) -> float:
        return float(np.mean(rng.choice(scores, len(scores))))

    value = float(spearmanr([np.mean(x) for x in a], [np.mean(x) for x in b]).statistic)
    draws = []
    for _ in range(DRAWS):
        at = rng.integers(len(a), size=len(a))
        x, y = [mean(a[i]) for i in at], [mean(b[i]) for i in at]
        if len(set(x)) > 1 and len(set(y)) > 1:  # else there is no rank
            draws.append(float(spearmanr(x, y).statistic))
    low, high = np.quantile(draws, [0.025, 0.975]) if draws else (math.nan, math.nan)
    return value, float(low), float(high)


def _read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _write(file: Path, header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: "" if v is None or (isinstance(v, float) and math.isnan(v)) else v for k, v in row.items()}
            for row in rows
        )


if __name__ == "__main__":
    sys.exit(main())
