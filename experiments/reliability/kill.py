"""SIGKILL at random points, then the same command again, until the run is done: is it the unbroken run, bit for bit?

    python experiments/reliability/kill.py --kills 20 --json kill.json

A run is killed `--per-run` times, each time after a random number of micro-batches and then within a random part of one
step, so that kills fall inside forward and backward passes, between micro-batches, into validations and into saving
(a checkpoint is written every second step). Compared with a run that nothing disturbed: the adapter file, optimizer,
schedule and random generators of the last checkpoint, every micro-batch by its place, predictions and metrics.
"""

import argparse
import json
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recorded import WORDS, finish, start

from highrank.train.checkpoint import read

STEP_SECONDS = 0.06
"""About what one micro-batch of the tiny model takes with its save."""


def kill(folder: Path, words: Sequence[str], batches: int, within: float) -> bool:
    """Starts the run and kills it `within` seconds after its `batches`-th micro-batch; returns whether it still ran."""
    file = Path(f"{folder}.batches")
    enough = len(lines(file)) + batches
    process = start(folder, words)
    while process.is_alive() and len(lines(file)) < enough:
        time.sleep(0.002)
    time.sleep(within)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def state(value: Any, name: str = "") -> dict[str, Any]:
    """Returns a checkpoint as {path: tensor or plain value}, without the time it took."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, own in items:
        if isinstance(own, dict | list | tuple):
            found |= state(own, f"{name}/{key}")
        elif key != "seconds":
            found[f"{name}/{key}"] = own
    return found


def differences(whole: Path, broken: Path) -> list[str]:
    """Returns what of a killed run is not as in the unbroken one."""
    found = []
    if (whole / "adapter/adapter.safetensors").read_bytes() != (broken / "adapter/adapter.safetensors").read_bytes():
        found.append("adapter")
    states = [state(read(folder / "checkpoints/last.ckpt")) for folder in (whole, broken)]
    for name in states[0].keys() | states[1].keys():
        values = [own.get(name) for own in states]
        tensors = all(isinstance(value, torch.Tensor) for value in values)
        if not (torch.equal(*values) if tensors else values[0] == values[1]):
            found.append(name)
    order = [line.rsplit(" ", 1) for line in lines(Path(f"{whole}.batches"))]
    places, again = dict(order), [line.rsplit(" ", 1) for line in lines(Path(f"{broken}.batches"))]
    if {place for place, _ in again} != set(places) or any(places.get(place) != digest for place, digest in again):
        found.append("batches")
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, broken)]
    for key in ("metrics", "tokens", "steps", "selected", "validation", "status"):
        if results[0].get(key) != results[1].get(key):
            found.append(key)
    for file in sorted((whole / "predictions").iterdir()):
        if file.read_bytes() != (broken / "predictions" / file.name).read_bytes():
            found.append(file.name)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    words, draw = [*WORDS, "checkpoint_every=2"], random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        finish(whole, words)
        total = len(lines(Path(f"{whole}.batches")))
        runs: list[dict[str, Any]] = []
        left = options.kills
        while left:
            broken, kills = Path(folder) / f"run{len(runs)}", []
            for _ in range(min(left, options.per_run)):
                batches = draw.randint(1, total // options.per_run)
                if kill(broken, words, batches, draw.uniform(0, STEP_SECONDS)):
                    kills.append(len(lines(Path(f"{broken}.batches"))))
            if finish(broken, words):
                raise SystemExit(f"the run does not end well: {Path(f'{broken}.err').read_text()}")
            left -= max(1, len(kills))
            runs.append({"killed_after_batches": kills, "differences": differences(whole, broken)})
            print(
                f"run {len(runs)}: killed {len(kills)} times, differences: {runs[-1]['differences'] or 'none'}",
                flush=True,
            )
    tried = sum(len(run["killed_after_batches"]) for run in runs)
    survived = sum(len(run["killed_after_batches"]) for run in runs if not run["differences"])
    print(f"kills: tried {tried}, survived {survived}")
    if options.json:
        options.json.write_text(json.dumps({"tried": tried, "survived": survived, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
