"""Writes what rate searches found: `python experiments/rates/table.py SWEEP [SWEEP]`, folders of `experiment=peft/rates_small`.

`results/rates.csv` has each trial, `results/runs.csv` each run with three seeds; the table is printed. A later sweep's arm takes
the place of an earlier one's, whose trials stay.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(folders: list[Path]) -> None:
    trials: dict[tuple[str, float], float] = {}
    best: dict[str, tuple[float, bool]] = {}
    runs: dict[str, list[tuple[int, float, float, int]]] = {}
    for folder in folders:
        for arm in json.loads((folder / "sweep.json").read_text())["lr_search"]["arms"]:
            method = arm["axes"]["method"]
            best[method], runs[method] = (arm["lr"], arm["at_edge"]), []
            trials |= {(method, trial["lr"]): trial["loss"] for trial in arm["trials"]}
        for row in csv.DictReader((folder / "table.csv").open()):
            values = int(row["seed"]), float(row["loss"]), float(row["accuracy"]), int(row["trainable"])
            runs[row["method"]].append(values)
    RESULTS.mkdir(exist_ok=True)
    _write("rates.csv", ("method", "lr", "held_out_loss"), [(*key, loss) for key, loss in sorted(trials.items())])
    of_runs = [(method, best[method][0], *run) for method in sorted(runs) for run in runs[method]]
    _write("runs.csv", ("method", "lr", "seed", "test_loss", "accuracy", "trainable"), of_runs)
    print(
        "| method | trainable | rates tried: held-out loss | best | test loss, three seeds | mean |\n| --- "
        + "| --- " * 5
        + "|"
    )
    for method in sorted(runs):
        losses = [run[1] for run in runs[method]]
        tried = ", ".join(f"{lr:g}: {loss:.3f}" for (name, lr), loss in sorted(trials.items()) if name == method)
        rate, at_edge = best[method]
        seeds = ", ".join(f"{loss:.3f}" for loss in losses)
        print(
            f"| `{method}` | {runs[method][0][3]:,} | {tried} | {rate:g}{' (edge)' if at_edge else ''} | {seeds} | "
            f"{statistics.mean(losses):.3f} |"
        )


def _write(name: str, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    with (RESULTS / name).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: table.py SWEEP [SWEEP]")
    main([Path(folder) for folder in sys.argv[1:]])
