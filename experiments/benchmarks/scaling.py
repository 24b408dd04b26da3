"""How a method's step grows: against rank, hidden size, tokens per row, layers, and BOFT's number of factors.

    python experiments/benchmarks/scaling.py --axes r,factor --json out.json

One axis moves, everything else stays at the values that the options give. At each point a round is the frozen step and
every method's step (see step_cost.py for what a step is), once each in shuffled order; cells are medians of the ratios
to the frozen step of the same round, for time and for tensors saved for backward. The last row has the exponents of the
seconds themselves: the slope of log seconds against log value.
"""

import argparse
import gc
from collections.abc import Sequence
from typing import Any

from common import (
    FROZEN,
    Case,
    Step,
    add_ours,
    arguments,
    cases,
    environment,
    exponent,
    interleave,
    model_arguments,
    note,
    over,
    random_batch,
    random_model,
    same_weights,
    saved_bytes,
    show_environment,
    show_table,
    summary,
    write_json,
)

from highrank.base.registry import load

AXES = ("r", "hidden", "tokens", "layers", "factor")
NO_RANK = ("hyperadapt", "boft1", "boft4", "ia3", "diablo", "c3a", "svft", "fourierft", "oft")
PAPERS = "hyperadapt,lora,dora,hira,hilora,vera,boft1,boft4"
"""The rows measured unless others are named."""


def points(args: argparse.Namespace, axis: str) -> list[tuple[int, argparse.Namespace, list[Case]]]:
    """Returns the axis' values, each with the options and the methods to measure."""
    found = []
    for value in map(int, str(getattr(args, f"{axis}_values")).split(",")):
        at, chosen = argparse.Namespace(**vars(args)), cases(args.methods or PAPERS)
        match axis:
            case "r":
                chosen = [c for c in cases(args.methods or PAPERS, r=value, vera_r=value) if c.key not in NO_RANK]
            case "hidden":  # the proportions of SmolLM2: heads of 64, three query heads per key, 8/3 in between
                heads = max(1, value // 64)
                at.hidden, at.inter = value, max(32, 8 * value // 3 // 32 * 32)
                at.heads, at.kv_heads = heads, heads // 3 if heads % 3 == 0 else heads
            case "tokens":
                at.sequence = value
            case "layers":
                at.layers = value
            case "factor":
                chosen = [c for c in cases("boft4", factor=value) if args.methods is None or "boft" in args.methods]
        if chosen:
            found.append((value, at, chosen))
    return found


def measure(args: argparse.Namespace, chosen: Sequence[Case]) -> dict[str, Any]:
    base = random_model(args)
    batch = random_batch(args, base.config.vocab_size)
    sides = {FROZEN: Step(same_weights(base), batch)}
    for case in chosen:
        model = same_weights(base)
        add_ours(model, load("methods", case.method), case.fields)
        sides[case.key] = Step(model, batch)
    saved = {name: saved_bytes(step)[0] for name, step in sides.items()}
    times = interleave(sides, args.rounds, args.warmups, args.device)
    return {
        name: {
            "time": over(times, name, FROZEN),
            "saved": saved[name] / saved[FROZEN],
            "seconds": summary(times[name]),
            "saved_bytes": saved[name],
        }
        for name in sides
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=7)
    model_arguments(parser)
    parser.add_argument("--axes", default=",".join(AXES), help="which, joined by commas (default all)")
    parser.add_argument("--methods", help="as for step_cost.py (default all)")
    parser.add_argument("--r-values", default="4,16,64,256")
    parser.add_argument("--hidden-values", default="192,576,1152")
    parser.add_argument("--tokens-values", default="64,256,1024,4096")
    parser.add_argument("--layers-values", default="2,4,8")
    parser.add_argument("--factor-values", default="1,2,3,4,5")
    args = parser.parse_args(words)
    env = {"dtype": args.dtype, **environment(args.device)}
    show_environment("scaling", env)
    results = []
    for axis in args.axes.split(","):
        if axis not in AXES:
            parser.error(f"unknown axis, got {axis}; known: {', '.join(AXES)}")
        keys: list[str] = []
        rows: list[list[Any]] = []
        measured: list[tuple[int, dict[str, Any]]] = []
        for value, at, chosen in points(args, axis):
            found = measure(at, chosen)
            gc.collect()
            keys = [case.key for case in chosen]
            results.append({"axis": axis, "value": value, "methods": found})
            measured.append((value, found))
            cells = [f"{found[key]['time']['median']:.2f}, {found[key]['saved']:.2f}" for key in keys]
            rows.append([value, f"{1000 * found[FROZEN]['seconds']['median']:.0f} ms", *cells])
            note(f"{axis} = {value}")
        if measured:  # not every method has every axis
            values = [value for value, _ in measured]
            slopes = {k: exponent(values, [f[k]["seconds"]["median"] for _, f in measured]) for k in (FROZEN, *keys)}
            results.append({"axis": axis, "exponents": slopes})
            rows.append(["exponent", *(f"{slope:.2f}" for slope in slopes.values())])
        labels = ["boft" if axis == "factor" else key for key in keys]
        show_table([axis, "frozen step", *(f"{label}: step, saved" for label in labels)], rows)
    write_json(args, "scaling", env, results)


if __name__ == "__main__":
    main()
