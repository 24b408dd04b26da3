"""What a sweep shows while its runs execute: on a terminal the table of `highrank watch`, elsewhere a line per run that ends.

The time that is left is that of the sweep's own finished runs, or of finished runs like them in the output folder.
"""

import heapq
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from highrank.base.console import console, duration, say
from highrank.find.reading import Found, score_text
from highrank.find.watch import Runs, name_of
from highrank.sweep.grid import Cell
from highrank.sweep.jobs import Job
from highrank.sweep.launch import Launcher
from highrank.train.pace import Expected, Times, about, expected, kind_of, near_of

LOOKS_PER_S = 0.5
"""How often the runs are looked at."""


def makespan(running: Sequence[float], waiting: Sequence[float], at_once: int) -> float:
    """Returns when the last run ends, given what the running ones have left and the others take, in their order."""
    ends = [*running, *[0.0] * (at_once - len(running))]
    heapq.heapify(ends)
    for seconds in waiting:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


class Board:
    """The runs of a sweep, or of its search for learning rates."""

    def __init__(
        self,
        what: str,
        cells: Mapping[Path, Cell],
        steps: Mapping[Path, int],
        jobs: Sequence[Job],
        launcher: Launcher,
        times: Times,
        stopped: Sequence[int],
    ):
        """`cells` are all by their folders, `jobs` those to execute, each of so many `steps`; `stopped` is filled when a
        signal has come."""
        self.what, self.steps, self.launcher, self.stopped = what, steps, launcher, stopped
        self.kinds = {path: kind_of(cell.run) for path, cell in cells.items()}
        self.nears = {path: near_of(cell.run) for path, cell in cells.items()}
        self.elsewhere = {p: expected(times, cells[p].run, number, launcher.threads) for p, number in steps.items()}
        """What runs like them took that are not of this sweep, or of an earlier try of it."""
        self.names = {path: name_of(path, cell.axes | _rate(cell)) for path, cell in cells.items()}
        self.runs, self.own, self.near = Runs(), Times(), Times()
        self.drawn_live = console.is_interactive
        self.drawn, self.lock = Table(), threading.Lock()
        """The last table, and what guards the state below from the thread that draws it."""
        self.number = len(jobs)
        self.logs = {Path(job.run_dir): Path(job.log) for job in jobs}
        """Of the runs that have not ended."""
        self.earlier = {path: (_written(path / "config.yaml"), _written(log)) for path, log in self.logs.items()}
        """When an earlier try of them wrote what this one will write."""
        self.began = dict.fromkeys(list(self.logs)[: launcher.jobs], time.monotonic())
        """When those that have begun did: as many at once as the launcher starts, in order."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows, within it, the runs as they go."""
        if not self.drawn_live or not self.number:
            yield
            return
        with Live(console=console, get_renderable=self.table, refresh_per_second=LOOKS_PER_S, transient=True):
            yield

    def table(self) -> Table:
        """Returns the runs as they are; of a look at which a folder could not be read, as they were."""
        with self.lock, suppress(OSError):
            look = self.runs.look(self.names, self._before())
            said = [f"{len(look.rows)} {self.what}: {look.counts}", *filter(None, [self.left()])]
            self.drawn = look.table("; ".join(said))
        return self.drawn

    def ended(self, job: Job, results: Mapping[str, Any]) -> None:
        """Takes note of a run's end, and tells of it; on a terminal the table does, but for what went wrong."""
        path = Path(job.run_dir)
        with self.lock:
            self._note_end(path, results)
            number, left = self.number - len(self.logs), self.left()
        status = results["status"]
        reason = (
            f": {results.get('error')}; see {job.log}" if status in ("failed", "oom", "diverged", "damaged") else ""
        )
        if self.drawn_live:
            if reason:  # beyond the lock, since who draws the table holds the terminal and waits for it
                say(f"{path.name}: {status}{reason}")
            return
        run = Found(path, results, {})
        said = [score_text(run.score), duration(run.seconds)] if status == "done" else []
        line = ", ".join([f"{number}/{self.number} {path.name}: {status}{reason}", *filter(None, said)])
        say(f"{line}; {left}" if left else line)

    def _note_end(self, path: Path, results: Mapping[str, Any]) -> None:
        now = time.monotonic()
        lasted = now - self.began.get(path, now)
        del self.logs[path]
        waiting = [each for each in self.logs if each not in self.began]
        self.began |= dict.fromkeys(waiting[:1], now)
        self.take(path, results, lasted)

    def take(self, path: Path, results: Mapping[str, Any], lasted: float = 0) -> None:
        """Measures by a finished run how long the others will take."""
        self.own.add(results, self.kinds[path], lasted)
        self.near.add(results, self.nears[path], lasted)

    def left(self) -> str:
        """Returns in words how long the other runs will take; nothing where that is not measured."""
        if self.stopped or not self.logs:
            return ""
        lengths = {path: self._expected(path) for path in self.logs}
        now, ends = time.monotonic(), []
        for part in ("seconds", "least", "most"):
            running, waiting = [], []
            for path, length in lengths.items():
                if length is None:
                    return ""
                seconds = getattr(length[0], part)
                if path in self.began:
                    running.append(max(seconds - (now - self.began[path]), 0.0))
                else:
                    waiting.append(seconds)
            ends.append(makespan(running, waiting, self.launcher.jobs))
        if all(length and length[1] for length in lengths.values()):
            return f"{about(*ends)} left"
        least, most = map(duration, ends[1:])
        spread = least if least == most else f"{least} to {most}"
        return f"{spread} left if the others take as long as those that are done"

    def _expected(self, path: Path) -> tuple[Expected, bool] | None:
        """Returns how long a run will take, and whether that was measured on runs like it."""
        steps = self.steps[path]
        like = self.own.expect(self.kinds[path], steps) or self.elsewhere[path]
        if like:
            return like, True
        near = self.near.expect(self.nears[path], steps)
        return (near, False) if near else None

    def _before(self) -> dict[Path, str]:
        """Returns the runs that have written nothing of their own yet, and what they do."""
        states = {}
        for path, log in self.logs.items():
            config, said = self.earlier[path]
            if _written(path / "config.yaml") == config:
                states[path] = "waiting" if _written(log) == said else "setting up"
        return states


def _rate(cell: Cell) -> dict[str, Any]:
    """Returns the rate of a trial, which is no axis of the sweep."""
    given = any(word.startswith("lr=") for word in cell.words)
    return {"lr": f"{cell.run.core.lr:g}"} if given and "lr" not in cell.axes else {}


def _written(file: Path) -> int:
    """Returns when a file was last written, in nanoseconds; 0 if it is not there."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
