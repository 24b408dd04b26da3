"""What the plan says of a run's memory beside what the run took.

    python run.py -m method=hira,lora,dora max_steps=8          # each run is a process of its own
    python experiments/benchmarks/memory_estimate.py FOLDER...  # runs, or sweeps

Runs of the same method, model, task and batch are one row, by the mean of what they took. The estimate is made anew, from the run's
config alone, as `dry_run=true` makes it: no weight loads.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import arguments, environment, show_environment, show_table, write_json

from highrank.config.run_config import Run
from highrank.train.plan import make_plan
from highrank.train.saved import read_run

KEYS = ("method", "model", "task", "batch", "recomputed")
"""What tells rows apart; recomputed is `checkpoint_activations`."""


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=None, device=False)
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args(words)
    env = environment("cpu")
    show_environment("memory", env)
    peaks: dict[tuple[Any, ...], list[int]] = {}
    runs: dict[tuple[Any, ...], Run] = {}
    files = [file for folder in args.folders for at in ("", "*/") for file in folder.glob(f"{at}results.json")]
    for file in sorted(files):  # of a sweep its runs, no trials
        results = json.loads(file.read_text(encoding="utf-8"))
        if results.get("status") == "done":
            run = read_run(file.parent)
            batch, recomputed = run.core.batch_size, run.core.checkpoint_activations
            key = (run.method.name, run.model["name"], run.task.name, batch, recomputed)
            peaks.setdefault(key, []).append(results["memory"]["peak_resident_bytes"])
            runs.setdefault(key, run)
    found = [_row(key, runs[key], measured) for key, measured in sorted(peaks.items())]
    columns = [*KEYS, "runs", "estimated GiB", "measured GiB", "ratio"]
    show_table(columns, [_cells(row) for row in found])
    args.folders = [folder.name for folder in args.folders]
    write_json(args, "memory_estimate", env, found)


def _row(key: Sequence[Any], run: Run, measured: Sequence[int]) -> dict[str, Any]:
    estimated = make_plan(run, run.make_task()).memory_bytes
    mean = sum(measured) / len(measured)
    row = {**dict(zip(KEYS, key, strict=True)), "runs": len(measured), "measured": mean}
    return {**row, "estimated": estimated["peak"], "ratio": estimated["peak"] / mean, "parts": estimated}


def _cells(row: Mapping[str, Any]) -> list[Any]:
    gib = [f"{row[part] / 2**30:.2f}" for part in ("estimated", "measured")]
    return [*(row[key] for key in (*KEYS, "runs")), *gib, f"{row['ratio']:.2f}"]


if __name__ == "__main__":
    main()
