"""How long training takes to an equal test loss: ours through Lightning against PEFT through the Hugging Face Trainer.

    python experiments/benchmarks/time_to_loss.py --json out.json
    python experiments/benchmarks/time_to_loss.py --methods lora --batches 20,4,1,1+packed task=commonsense170k

Sides, start, settings and turns are those of `train_throughput.py`; words are those of run.py. After every --every steps
a side's loss on the same test examples is taken, off the clock: a curve of test loss against seconds of training, for
each seed. For each count of --at the peer's loss after so many steps is looked up on our curve, straight lines between
its points; the table shows how many times sooner ours was there. Seconds are from the start of the loop; each side has
computed the test examples once before.

Ours may come several times, with other batches (--batches): of windows of so many steps, inside which examples are
sorted by length (20 is what a run does, 1 is a plain shuffle); with `+packed` several examples share a row
(`packing=true`). All sides run over the same frozen weights.
"""

import argparse
import copy
import dataclasses
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from common import (
    Gap,
    add_peft,
    arguments,
    environment,
    note,
    same_weights,
    show_environment,
    show_table,
    write_json,
)
from train_throughput import Relay, import_trainer, test_loss, test_rows, train_ours, train_peft, training_run

from highrank.config.words import compose_run
from highrank.data.batches import LengthBuckets, TrainingData
from highrank.data.encoding import num_targets
from highrank.train.build import build_model, load_plain

Point = tuple[int, float, float]
"""Steps, seconds of training and the test loss in nats after them."""


def batched(data: TrainingData, window: int, packing: bool) -> TrainingData:
    """Returns the same data in other batches."""
    other, own = copy.copy(data), data.buckets
    targets = [num_targets(row) for row in data.examples]
    other.buckets = LengthBuckets(
        own.lengths, own.batch_size, own.seed, accumulate=own.accumulate, targets=targets, window=window
    )
    other.packing = packing
    return other


def padding(data: TrainingData) -> float:
    """Returns tokens with padding over tokens, in the first epoch."""
    batches = list(data.train_dataloader())
    return sum(b["input_ids"].numel() for b in batches) / sum(int(b["attention_mask"].sum()) for b in batches)


def seconds_to(curve: Sequence[Point], loss: float) -> float | None:
    """Returns after how many seconds a curve is first at a loss or below it; None if it never is."""
    for (_, start, before), (_, end, after) in itertools.pairwise(curve):
        if after <= loss:  # `before` is not, except at the start
            return end if before <= loss else start + (end - start) * (before - loss) / (before - after)
    return None


def sooner(ours: Sequence[Point], theirs: Sequence[Point], at: int) -> float | None:
    """Returns the peer's seconds for `at` steps over ours to its loss there; None if ours never gets to that loss."""
    _, seconds, loss = next(point for point in theirs if point[0] == at)
    own = seconds_to(ours, loss)
    return None if own is None else seconds / own


def middle(values: Sequence[float | None]) -> float | None:
    """Returns the median, None counting as slower than any number."""
    return statistics.median_low([value or 0.0 for value in values]) or None


def measure(method: str, seed: int, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Returns each side's curve and how much sooner it was than the peer, or the peer's gap; padding of ours."""
    choices = {f"ours {text}": text.partition("+") for text in args.batches.split(",")}
    runs = {
        name: training_run(method, args, f"{folder}/{name}", [f"seed={seed}", f"packing={str(bool(packed)).lower()}"])
        for name, (_, _, packed) in choices.items()
    }
    run = next(iter(runs.values()))
    task, core = run.make_task(), run.core
    base = load_plain(run, task)
    base.model.requires_grad_(False).to(args.device)
    data = TrainingData(task, run.protocol, base.tokenizer, core.batch_size, core.eval_batch_size, seed)
    models: dict[str, Any] = {}
    datas: dict[str, TrainingData] = {}
    curves: dict[str, list[Point]] = {}
    loops: dict[str, Callable[[], None]] = {}
    rows = test_rows(run, data, args.test_examples)

    def add_point(name: str) -> None:
        steps = len(relay.times[name]) * args.block
        if steps % args.every == 0:
            loss = test_loss(models[name], rows, data.tokenizer.pad_token_id)
            curves.setdefault(name, []).append((steps, sum(relay.times[name]), loss))
            note(f"{method}, seed {seed}, {name}: test loss {loss:.4f} after {steps} steps")

    names, gap = [*choices, "PEFT"], None
    relay = Relay(names, args.block, args.device, add_point)
    for name, (window, _, packed) in choices.items():
        _, adapters = build_model(runs[name], task, dataclasses.replace(base, model=same_weights(base.model)))
        models[name], datas[name] = adapters.model.to(args.device), batched(data, int(window), bool(packed))
        loops[name] = partial(train_ours, runs[name], datas[name], adapters, relay, name)
    try:
        import_trainer()
        models["PEFT"] = add_peft(same_weights(base.model), method, adapters).to(args.device).train()
        loops["PEFT"] = partial(train_peft, run, data, models["PEFT"], relay, f"{folder}/peft", args.device)
    except Gap as reason:
        gap = str(reason)
        relay.queue.remove("PEFT")
    for name in models:
        add_point(name)
    relay.run(loops)
    found: dict[str, Any] = {"model": run.model["name"], "task": run.task.name, "batch_size": core.batch_size}
    for name, curve in curves.items():
        found[name] = {"curve": curve}
        if name in datas:
            found[name]["padding"] = padding(datas[name])
            if not gap:
                found[name]["sooner"] = {at: sooner(curve, curves["PEFT"], at) for at in args.at}
    if gap:
        found["PEFT"] = {"gap": gap}
    return found


def times(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.2f}"


def table(results: dict[str, dict[int, Any]], at: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows: each side and seed, and the median over seeds."""
    columns = ["method", "side", "seed", "padding", "s per step", *(f"loss after {n}" for n in at)]
    columns += [f"times sooner at the peer's loss after {n}" for n in at]
    rows = []
    for method, seeds in results.items():
        sides = [name for name in next(iter(seeds.values())) if name.startswith(("ours", "PEFT"))]
        for side in sides:
            for seed, found in seeds.items():
                one = found[side]
                if "gap" in one:
                    rows.append([method, side, str(seed), "–", f"– ({one['gap']})", *["–"] * (2 * len(at))])
                    continue
                losses = {steps: loss for steps, _, loss in one["curve"]}
                steps, seconds, _ = one["curve"][-1]
                cells = [f"{one['padding']:.2f}" if "padding" in one else "–", f"{seconds / steps:.2f}"]
                faster = [times(one["sooner"][n]) if "sooner" in one else "" for n in at]
                rows.append([method, side, str(seed), *cells, *(f"{losses[n]:.4f}" for n in at), *faster])
            if all("sooner" in found[side] for found in seeds.values()) and len(seeds) > 1:
                medians = [times(middle([found[side]["sooner"][n] for found in seeds.values()])) for n in at]
                rows.append([method, side, "median", "", "", *[""] * len(at), *medians])
    return columns, rows


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=None)
    parser.add_argument("words", nargs="*", help="words of run.py: model=, task=, batch_size=, lr=, ...; not seed=")
    parser.add_argument("--methods", default="lora,hira")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--batches", default="20", help="windows of ours, in steps, each perhaps with +packed (default 20)"
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--block", type=int, default=4, help="steps per turn (default 4)")
    parser.add_argument("--every", type=int, default=20, help="steps between two test losses (default 20)")
    parser.add_argument("--at", default="40,120", help="steps of the peer whose loss is to be reached (default 40,120)")
    parser.add_argument("--test-examples", type=int, default=64, help="for the test loss (default 64)")
    args = parser.parse_intermixed_args(words)
    args.at = [int(n) for n in args.at.split(",")]
    if args.steps % args.every or args.every % args.block or any(n % args.every or n > args.steps for n in args.at):
        sys.exit(
            "--every must be a multiple of --block, --steps and --at multiples of --every, --at at most --steps, "
            f"got --block {args.block} --every {args.every} --steps {args.steps} --at {','.join(map(str, args.at))}"
        )
    env = {"dtype": compose_run(args.words).model["dtype"], **environment(args.device)}
    show_environment("time_to_loss", env)
    results: dict[str, dict[int, Any]] = {}
    for method in args.methods.split(","):
        for seed in map(int, args.seeds.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                found = results.setdefault(method, {})[seed] = measure(method, seed, args, folder)
            write_json(args, "time_to_loss", env, results)  # what is measured stays if the rest is stopped
    print(f"{found['model']}, {found['task']}, batch {found['batch_size']}, {args.steps} steps")
    show_table(*table(results, args.at))


if __name__ == "__main__":
    main()
