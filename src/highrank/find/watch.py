"""Where runs are, live, from the files that they write: `highrank watch RUN|SWEEP`, and a sweep's own table."""

import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from rich.live import Live
from rich.table import Table
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from highrank.base.console import console, duration
from highrank.base.files import run_folders, shown
from highrank.base.options import Words
from highrank.base.saved import sweep_cells
from highrank.find.reading import Found, one_run, read, score_text, since, weigh
from highrank.find.runs import status_text
from highrank.find.table import drawn, show

STEPS = 50
"""Over how many of the last steps their time is averaged."""
PHASES = (
    ("setup_s", "setting up"),
    ("eval_before_s", "evaluating the untrained model"),
    ("train_s", "training"),
    ("eval_final_s", "evaluating"),
)
"""A running run's phases: each is over when its time has been written down."""
COLUMNS = ["run", "status", "step", "loss", "left", "score", "last written"]
EDGES = 6
"""Lines of a terminal that a table needs beside its rows, and the prompt's."""


def command(words: list[str]) -> int:
    parser = Words("watch", "RUN|SWEEP [--every SECONDS] [--once]")
    parser.add_argument("--every", type=float, default=2)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(words)
    if not options.every > 0:
        parser.error(f"--every takes seconds > 0, got --every {options.every:g}")
    watched = Watched(options.folder)
    if options.once or not console.is_terminal:
        look = watched.look()
        show(COLUMNS, look.rows, watched.title)
        for problem in look.problems:
            print(problem, file=sys.stderr)
        return 0
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            look = watched.look()
            live.update(look.table(watched.title), refresh=True)
            if watched.over:
                break
            time.sleep(options.every)
    return 0


class Step(NamedTuple):
    """The end of a training step, as logged into one of a run's files."""

    done: int
    ended: float
    file: Path


class Steps:
    """The training steps that a run has logged; each look reads on where the last one ended."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.loaders: dict[Path, Any] = {}
        self.done, self.loss = 0, float("nan")
        self.times: deque[Step] = deque(maxlen=STEPS)

    def look(self) -> None:
        for file in self._files():
            if file not in self.loaders:
                self.loaders[file] = RawEventFileLoader(str(file))
            for event in _events(self.loaders[file]):
                for value in event.summary.value:
                    if value.tag == "train/loss":
                        self.done, self.loss = event.step + 1, value.simple_value
                        self.times.append(Step(self.done, event.wall_time, file))

    def _files(self) -> list[Path]:
        """Returns the event files of the run's tries, the one written last behind the others."""
        tries = []
        for file in self.folder.glob("events.out.tfevents.*"):
            with suppress(OSError):  # gone since
                if file.suffix[1:].isdigit() and file.is_file():  # others are for TensorBoard's tables
                    tries.append((file.stat().st_mtime_ns, file))
        return [file for _, file in sorted(tries)]

    def left(self, planned: float) -> float | None:
        """Returns the seconds that the other steps will take, at the pace of the last ones; the time between two tries of
        a run, each of which has a file, is no step's."""
        pairs = [
            (last, next) for last, next in pairwise(self.times) if last.file == next.file and next.done > last.done
        ]
        if not pairs:
            return None
        pace = sum(next.ended - last.ended for last, next in pairs) / sum(next.done - last.done for last, next in pairs)
        return pace * max(planned - self.done, 0)


def _events(loader: Any) -> Iterator[Event]:
    """Yields what has been written since the last time, as far as it is whole."""
    with suppress(DecodeError):
        yield from map(Event.FromString, loader.Load())


@dataclass(frozen=True)
class Look:
    """Runs as they were at one moment."""

    rows: list[tuple[Any, ...]]
    """A row of COLUMNS for each."""
    statuses: list[str]
    problems: Sequence[str] = ()
    """What is damaged, a line each."""

    @property
    def counts(self) -> str:
        """How many runs there are in each status: 3 done, 1 running."""
        return ", ".join(f"{number} {status}" for status, number in Counter(self.statuses).items())

    def table(self, title: str) -> Table:
        """Returns the rows as a table that fits the terminal: where it is too low, with those that wait and are done left
        out, the farthest first."""
        room = max(console.height - EDGES, 1)
        rows, left_out = self.rows, ""
        if len(rows) > room:
            first = self.statuses.index("waiting") if "waiting" in self.statuses else len(rows)

            def rank(index: int) -> tuple[int, int]:
                status = self.statuses[index]
                return (status != "running") + (status in ("waiting", "done")), abs(index - first)

            kept = sorted(sorted(range(len(rows)), key=rank)[: room - 1])
            others = Counter(status for index, status in enumerate(self.statuses) if index not in kept)
            left_out = "and " + ", ".join(f"{number} {status}" for status, number in others.items())
            rows = [rows[index] for index in kept]
        table = drawn(COLUMNS, rows, title)
        table.caption, table.caption_justify = "\n".join([*filter(None, [left_out]), *self.problems]) or None, "left"
        return table


class Runs:
    """The runs in some folders; each look reads what has been written since the last one."""

    def __init__(self) -> None:
        self.steps: dict[Path, Steps] = {}
        self.found: dict[Path, tuple[int, Found]] = {}
        """What was read of a run, and when its results.json was written."""

    def look(self, names: Mapping[Path, str], before: Mapping[Path, str] | None = None) -> Look:
        """Returns how far the run in each folder is, by its name; `before` says of those whose files are of an earlier try
        what this one does."""
        rows, statuses, problems = [], [], []
        for path, name in names.items():
            told = (before or {}).get(path) or ("" if (path / "results.json").is_file() else "waiting")
            run = None if told else self._read(path)
            rows.append(self._row(path, run, name, len(names) == 1) if run else (name, told, "", "", "", "", ""))
            statuses.append(run.status if run else "waiting" if told == "waiting" else "running")
            problems += [f"{name}: {run.problem}"] if run and run.problem else []
        return Look(rows, statuses, problems)

    def _read(self, path: Path) -> Found:
        written = (path / "results.json").stat().st_mtime_ns
        known, run = self.found.get(path, (0, None))
        if run is None or known != written or not run.config:
            self.found[path] = written, read(path)
        return self.found[path][1]

    def _row(self, path: Path, run: Found, name: str, alone: bool) -> tuple[Any, ...]:
        steps = self.steps.setdefault(path, Steps(path))
        if alone or run.status != "done" or steps.done:
            steps.look()
        planned = run.results.get("steps_planned") or run.config.get("max_steps")
        left = steps.left(planned) if planned and run.status == "running" else None
        _, written = weigh(path)
        return (
            name,
            _phase(run) if run.status == "running" else status_text(run.status),
            f"{made} of {planned or '?'}" if (made := steps.done or run.results.get("steps")) else "",
            f"{steps.loss:.4f}" if steps.done else "",
            duration(left) if left else "",
            score_text(run.score),
            f"{since(written)} ago",
        )


def name_of(path: Path, axes: Mapping[str, Any]) -> str:
    """Returns what tells a sweep's run from the others for a person, or its folder where nobody looks."""
    return " ".join(f"{key}={value}" for key, value in axes.items()) if axes and console.is_terminal else path.name


class Watched:
    """A run, or the runs of a sweep.

    Raises:
        UserError: for a folder that is neither, or a damaged sweep.json.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.sweep = any((folder / name).exists() for name in ("sweep.json", "sweep.lock"))
        if not self.sweep:
            one_run("watch", folder)
        self.runs = Runs()
        self.title = ""
        self.over = False
        self._names()

    def look(self) -> Look:
        """Returns the runs as they are now, and notes the title and whether all is over."""
        look = self.runs.look(self._names())
        self.over = not self.searches and not {"waiting", "running"} & set(look.statuses)
        runs = f"{len(look.rows)} runs: {look.counts}" if look.rows else "no run has begun yet"
        what = runs if self.sweep else look.statuses[0]
        self.title = f"{shown(self.folder)}: {what}"
        return look

    @property
    def searches(self) -> bool:
        """Whether it is a sweep whose runs are not settled yet: learning rates are being searched for them."""
        return self.sweep and not (self.folder / "sweep.json").is_file()

    def _names(self) -> dict[Path, str]:
        if not self.sweep:
            return {self.folder: shown(self.folder)}
        if self.searches:
            return {path: path.name for part in (self.folder, self.folder / "search") for path in run_folders(part)}
        return {path: name_of(path, axes) for path, axes in sweep_cells("watch", self.folder).items()}


def _phase(run: Found) -> str:
    """Returns what a running run is doing."""
    times = run.results.get("time", {})
    evaluates = run.config.get("eval_before", True) and run.config.get("eval_test", True)
    phases = [name for key, name in PHASES if key not in times and (key != "eval_before_s" or evaluates)]
    return phases[0] if phases else "running"
