"""`highrank watch RUN|SWEEP`: how far it is, live, from the files that it writes."""

import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.live import Live
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from highrank.base.console import console, duration
from highrank.base.files import shown
from highrank.base.options import Words
from highrank.base.saved import sweep_cells
from highrank.find.places import run_folders
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
        rows = watched.look()
        show(COLUMNS, rows, watched.title)
        return 0
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            rows = watched.look()
            live.update(drawn(COLUMNS, rows, watched.title), refresh=True)
            if watched.over:
                break
            time.sleep(options.every)
    return 0


class Steps:
    """The training steps that a run has logged; each look reads on where the last one ended."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.loaders: dict[Path, Any] = {}
        self.done, self.loss = 0, float("nan")
        self.times: deque[tuple[int, float]] = deque(maxlen=STEPS)

    def look(self) -> None:
        for file in sorted(self.folder.glob("events.out.tfevents.*")):
            if not file.suffix[1:].isdigit():  # what a finished run says for TensorBoard's tables
                continue
            if file not in self.loaders:
                self.loaders[file] = RawEventFileLoader(str(file))
            for raw in self.loaders[file].Load():
                event = Event.FromString(raw)
                for value in event.summary.value:
                    if value.tag == "train/loss":
                        self.done, self.loss = event.step + 1, value.simple_value
                        self.times.append((self.done, event.wall_time))

    def left(self, planned: int) -> float | None:
        """Returns the seconds that the other steps will take, at the pace of the last ones."""
        if len(self.times) < 2 or self.times[-1][0] <= self.times[0][0]:
            return None
        (first, began), (last, ended) = self.times[0], self.times[-1]
        return (ended - began) / (last - first) * max(planned - last, 0)


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
        self.steps: dict[Path, Steps] = {}
        self.title = ""
        self.over = False
        self._cells()

    def look(self) -> list[tuple[Any, ...]]:
        """Returns a row for each run as it is now, and notes the title and whether all is over."""
        cells = self._cells()
        found = [read(path) if (path / "results.json").is_file() else None for path in cells]
        statuses = ["waiting" if run is None else run.status for run in found]
        counts = Counter(statuses)
        self.over = not {"waiting", "running"} & counts.keys()
        what = f"{len(cells)} runs: " if self.sweep else ""
        what += ", ".join(f"{number} {status}" for status, number in counts.items()) if self.sweep else statuses[0]
        self.title = f"{shown(self.folder)}: {what}"
        return [self._row(path, run) for path, run in zip(cells, found, strict=True)]

    def _cells(self) -> list[Path]:
        if not self.sweep:
            return [self.folder]
        if not (self.folder / "sweep.json").is_file():  # as long as learning rates are searched
            return [*run_folders(self.folder), *run_folders(self.folder / "search")]
        return sweep_cells("watch", self.folder)

    def _row(self, path: Path, run: Found | None) -> tuple[Any, ...]:
        name = path.name if self.sweep else shown(path)
        if run is None:
            return name, "waiting", "", "", "", "", ""
        steps = self.steps.setdefault(path, Steps(path))
        steps.look()
        planned = run.results.get("steps_planned") or run.config.get("max_steps")
        left = steps.left(planned) if planned and run.status == "running" else None
        _, written = weigh(path)
        return (
            name,
            _phase(run) if run.status == "running" else status_text(run.status),
            f"{steps.done} of {planned or '?'}" if steps.done else "",
            f"{steps.loss:.4f}" if steps.done else "",
            duration(left) if left else "",
            score_text(run.score),
            f"{since(written)} ago",
        )


def _phase(run: Found) -> str:
    """Returns what a running run is doing."""
    times = run.results.get("time", {})
    evaluates = run.config.get("eval_before", True) and run.config.get("eval_test", True)
    phases = [name for key, name in PHASES if key not in times and (key != "eval_before_s" or evaluates)]
    return phases[0] if phases else "running"
