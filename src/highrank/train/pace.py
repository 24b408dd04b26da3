"""How long a run will take, from the times that finished runs like it have written down; never from anything else.

A run is like another if nothing differs that its speed depends on: model, method and its fields, placement, data, protocol,
batch, threads, machine, version of PyTorch. Seed, rates and the number of steps may differ.
"""

import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from highrank.base.console import duration
from highrank.base.errors import UserError
from highrank.base.files import digest, shown
from highrank.base.saved import read_results
from highrank.config.run_config import Run, config_hash

SAME_PACE = (
    *("seed", "lr", "head_lr", "betas", "weight_decay", "schedule", "warmup_steps", "warmup_ratio"),
    *("epochs", "max_steps", "patience", "min_delta", "start_from", "start_as", "start_hash"),
    *("output", "run_dir", "logger", "resume", "checkpoint_every", "dry_run"),
)
"""Keys on which the time of a step and that of an evaluation do not depend."""
SETTLED = 10
"""Steps after which their time can be told: the first ones are slower."""
PLACES = ("*/results.json", "*/*/results.json", "*/search/*/results.json")
"""Where runs lie in an output folder: in it, in a day's folder or a sweep, in a sweep's search."""


def pace_of(run: Run, threads: int) -> str:
    """Returns what runs on one machine have in common that take equally long for a step and for all around it."""
    return digest([kind_of(run), threads, platform.node(), torch.__version__])[:16]


def kind_of(run: Run, left_out: Collection[str] = SAME_PACE) -> str:
    """Returns what such runs have in common wherever they run."""
    return config_hash({key: value for key, value in run.resolved.items() if key != "given"}, left_out)


def near_of(run: Run) -> str:
    """Returns what runs of other methods and placements have in common with such runs."""
    return kind_of(run, (*SAME_PACE, "method", "placement", "layers", "fused", "architecture"))


@dataclass(frozen=True)
class Measured:
    """What a finished run took."""

    steps: int
    step_s: float
    other_s: float
    """For all but the steps: loading, evaluating, analysing."""

    def seconds(self, steps: int) -> float:
        return self.other_s + steps * self.step_s


@dataclass(frozen=True)
class Expected:
    """How many seconds a run will take, by the finished runs that are like it: the middle, the least and the most."""

    seconds: float
    least: float
    most: float
    runs: int

    def __str__(self) -> str:
        return about(self.seconds, self.least, self.most)


def about(seconds: float, least: float, most: float) -> str:
    """Returns a time with its spread: about 3 min 20 s (2 min 50 s to 4 min 5 s)."""
    ends = [duration(least), duration(most)]
    return f"about {duration(seconds)}" + (f" ({' to '.join(ends)})" if ends[0] != ends[1] else "")


class Times:
    """What finished runs took, by what they have in common."""

    def __init__(self, folders: Iterable[Path] = ()):
        self.by_pace: defaultdict[str, list[Measured]] = defaultdict(list)
        files = {os.path.realpath(file) for folder in folders for place in PLACES for file in folder.glob(place)}
        for file in sorted(files):
            try:
                self.add(read_results(Path(file).parent))
            except UserError:  # a damaged run has measured nothing
                continue

    def add(self, results: Mapping[str, Any], pace: str | None = None, lasted: float = 0) -> None:
        """Takes what a run has measured, if it is done, and it is said here or by itself what it is like; `lasted` is how
        many seconds it took by the clock of who waited for it, who counts the start of its process too."""
        times, steps, pace = results.get("time", {}), results.get("steps"), pace or results.get("pace")
        if results.get("status") == "done" and pace and steps and "train_s" in times:
            seconds = max(sum(value for name, value in times.items() if name != "total_s"), lasted)
            self.by_pace[pace].append(Measured(steps, times["train_s"] / steps, seconds - times["train_s"]))

    def expect(self, pace: str, steps: int) -> Expected | None:
        """Returns how long a run will take; None where no run like it has finished that made enough steps."""
        each = [run.seconds(steps) for run in self.by_pace[pace] if run.steps >= SETTLED or run.steps == steps]
        return Expected(statistics.median(each), min(each), max(each), len(each)) if each else None


def expected(times: Times, run: Run, steps: int, threads: int | None) -> Expected | None:
    """Returns how long a run will take on this machine; None too where it is not known on how many threads."""
    return None if threads is None else times.expect(pace_of(run, threads), steps)


def expected_here(run: Run, steps: int) -> Expected | None:
    """Returns how long a run will take in this process, by the finished runs in its output folder."""
    return expected(Times([Path(run.core.output)]), run, steps, torch.get_num_threads())


def source(number: int, folder: Path | str) -> str:
    """Returns where an estimate comes from: from 6 runs like it in outputs."""
    return f"from {number} run{'s' if number != 1 else ''} like it in {shown(folder)}"
