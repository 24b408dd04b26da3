"""How a whole run grows: against training rows, tokens per row, cells of a sweep, and processes that share a run.

    python experiments/benchmarks/run_scaling.py --axes rows,cells --json out.json method=hira task.n_test=8

Words of `run.py` are handed on to every run. A point is a fresh process each time, from the command to its end; in a round
every point of an axis runs once, in shuffled order. An exponent is the slope of log seconds against log value: 1 is
proportional, 0 is no growth, -1 would be half the time with two processes. Processes are gloo's on one machine and share
one batch, so that every point does the same work.
"""

import argparse
import random
from collections.abc import Sequence
from typing import Any

from common import arguments, environment, exponent, note, run_py, show_environment, show_table, summary, write_json

AXES = {"rows": "128,256,512", "length": "512,1024,2048,4096", "cells": "1,2,4", "processes": "1,2"}
"""Each axis with its values unless others are given."""


def words(axis: str, value: int, batch_size: int) -> list[str]:
    """Returns what `run.py` is told for a point, beside what all points are told."""
    match axis:
        case "rows":
            return [f"task.n_train={value}", "epochs=1", f"batch_size={batch_size}"]
        case "length":
            lengths = [f"task.{part}_lengths=[{value}]" for part in ("train", "test")]
            return ["task=ruler", *lengths, "batch_size=1", "eval_batch_size=1"]
        case "cells":
            return ["-m", f"seed=range(0,{value})", f"batch_size={batch_size}"]
        case _:
            shared = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={value}"]
            return [*shared, f"batch_size={batch_size // value}"]


def measure(axis: str, values: Sequence[int], args: argparse.Namespace, given: Sequence[str]) -> list[dict[str, Any]]:
    times: dict[int, list[dict[str, float]]] = {value: [] for value in values}
    for number in range(args.rounds):
        for value in random.Random(number).sample(values, len(values)):
            wall, runs = run_py([*given, *words(axis, value, args.batch_size)])
            times[value].append({"wall": wall, "train": sum(run["time"]["train_s"] for run in runs)})
            note(f"{axis} = {value}: {wall:.1f} s")
    return [
        {"axis": axis, "value": value, **{part: summary([t[part] for t in of]) for part in ("wall", "train")}}
        for value, of in times.items()
    ]


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3, device=False)
    parser.add_argument("--axes", default=",".join(AXES), help="which, joined by commas (default all)")
    parser.add_argument("--batch-size", type=int, default=4, help="of a step, over all processes (default 4)")
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}-values", default=values, help=f"joined by commas (default {values})")
    args, run_words = parser.parse_known_args(given)
    env = environment("cpu")
    show_environment("run scaling", env)
    results = []
    for axis in args.axes.split(","):
        if axis not in AXES:
            parser.error(f"unknown axis, got {axis}; known: {', '.join(AXES)}")
        values = list(map(int, getattr(args, f"{axis}_values").split(",")))
        if axis == "processes" and (odd := [value for value in values if args.batch_size % value]):
            parser.error(f"processes share a batch, got --batch-size {args.batch_size} with {odd[0]} processes")
        found = measure(axis, values, args, run_words)
        slopes = {part: exponent(values, [row[part]["median"] for row in found]) for part in ("wall", "train")}
        results.append({"axis": axis, "points": found, "exponents": slopes})
        rows = [[row["value"], *(f"{row[part]['median']:.1f} s" for part in slopes)] for row in found]
        show_table([axis, "in all", "training"], [*rows, ["exponent", *(f"{slope:.2f}" for slope in slopes.values())]])
    write_json(args, "run_scaling", env, results)


if __name__ == "__main__":
    main()
