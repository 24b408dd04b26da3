"""A sweep: many runs of one grid, each in a process of its own, recorded in one folder that can be started again.

<output>/<name>_<hash>/sweep.json      the command, the axes, the cells, the learning-rate search
<output>/<name>_<hash>/<run>/          a run directory per cell
<output>/<name>_<hash>/search/<run>/   the runs of a learning-rate search
<output>/<name>_<hash>/table.csv       one row per cell: its axes, status and metrics
<output>/<name>_<hash>/logs/<run>.txt  what a run printed
"""

import csv
import fcntl
import io
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.table import Table
from rich.text import Text

from highrank.base.console import console, duration, say
from highrank.base.errors import UserError
from highrank.base.files import digest, shown, write_atomic
from highrank.base.saved import SWEEP, state_of
from highrank.base.shapes import read_json
from highrank.config.words import given_text, key_of, scaled
from highrank.report import dashboard
from highrank.sweep import lr_search
from highrank.sweep.board import Board, makespan
from highrank.sweep.grid import Cell, Grid, expand, preset_of, refuse
from highrank.sweep.jobs import Job, together
from highrank.sweep.launch import launcher
from highrank.train.pace import Expected, Times, about, expected, kind_of, source
from highrank.train.plan import Plan, make_plan, optimizer_steps
from highrank.train.ready import shared_by

SWEEP_KEYS = ("sweep_dir", "lr_search", "lr_search_most", "launcher", "jobs")
"""Keys of a sweep as a whole: its folder, the rates or number of rates to try per arm and to how many they may grow, local, ray
or slurm, how many runs at once."""
SETTLED = ("done", "diverged")
"""How a cell has ended whose result stands: that its rate makes it diverge is one too."""
LEFT = (*SETTLED, "damaged")
"""What is not started again: a damaged results.json may still be mended, so that nothing is written over it."""


class Sweep:
    """One sweep and its folder."""

    def __init__(self, words: Sequence[str], main: Callable[[Sequence[str]], int]):
        """Checks every cell. `main` is the command line, which executes one run.

        Raises:
            UserError: naming everything that is wrong, before anything starts.
        """
        options, words = _take(scaled(words), (*SWEEP_KEYS, "output", "dry_run"))
        if any(key_of(word) == "run_dir" for word in words):
            raise UserError("sweep: every run has a folder of its own in the sweep's, got run_dir; use sweep_dir")
        self.words, self.main = words, main
        self.grid: Grid = expand(words)
        self.search = lr_search.parse(options.get("lr_search"), self.grid, options.get("lr_search_most"))
        self.launcher = launcher(options.get("launcher", "local"), options.get("jobs", "1"))
        self.dry_run = options.get("dry_run", "false").lower() == "true"
        preset = preset_of(words)
        self.name = preset.replace("/", "-") if preset else "sweep"
        key = digest([sorted(cell.run.hash for cell in self.grid.cells), options.get("lr_search")])
        sweep_dir, output = (given_text(f"{name}={options.get(name, 'null')}") for name in ("sweep_dir", "output"))
        self.output = Path(output or "outputs")
        self.folder = Path(sweep_dir or self.output / f"{self.name}_{key[:8]}")
        self.plans: dict[str, Plan] = {}
        """By arm: its seeds cost the same."""

    @property
    def folders(self) -> list[Path]:
        """Where runs like its own may have finished: in the output folder, and in its own that may lie elsewhere."""
        inside = self.folder.resolve().is_relative_to(self.output.resolve())
        return [self.output] if inside else [self.output, self.folder]

    def plan(self) -> tuple[list[Cell], list[Plan], int]:
        """Returns the cells that are to be started, their plans, and how many cells cannot be read.

        Raises:
            UserError: naming every cell that cannot run.
        """
        states = [state_of(self.folder / cell.folder).get("status") for cell in self.grid.cells]
        todo = [cell for cell, state in zip(self.grid.cells, states, strict=True) if state not in LEFT]
        plans = self.plans = {}
        problems = []
        for cell in todo:
            try:
                if digest(cell.arm) not in plans:
                    plans[digest(cell.arm)] = make_plan(cell.run, cell.run.make_task())
            except UserError as error:
                problems.append((cell.axes, error))
        refuse(problems)
        return todo, [plans[digest(cell.arm)] for cell in todo], states.count("damaged")

    def execute(self) -> int:
        """Runs what is not done yet; returns 0, 1 if a run neither ended nor diverged, or 128 + the signal that stopped the sweep."""
        todo, plans, damaged = self.plan()
        times = Times(self.folders)
        show_grid(self, todo, plans, damaged, times)
        if self.dry_run:
            return 0
        self._check_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self.folder), interruptible(self.launcher) as stopped:
            asked, search = self.grid.cells, None
            cells: list[Cell | None] = list(asked)
            if self.search:
                trials = self.folder / "search"
                search = self.search.run(
                    asked, trials, lambda trial_cells: self._run(trial_cells, trials, "trials of rates", times, stopped)
                )
                cells = search.cells
                for arm in search.arms:
                    if arm["at_edge"]:
                        tried = ", ".join(f"{trial['lr']:g}" for trial in arm["trials"])
                        say(
                            f"warning: the best rate found is at the edge, got lr={arm['lr']:g} of {tried} for "
                            f"{arm['axes']}: a better one may lie beyond"
                        )
            known = [
                (cell, asked_cell.run.hash) for cell, asked_cell in zip(cells, asked, strict=True) if cell is not None
            ]
            if not stopped:
                self._write(known, search)
                self._run([cell for cell, _ in known], self.folder, "runs", times, stopped)
            rows = [(cell, state_of(self.folder / cell.folder)) for cell, _ in known]
            write_atomic(self.folder / "table.csv", table(self.grid, rows).encode())
            if (self.folder / "sweep.json").is_file():  # not before the learning-rate search is over
                dashboard.write(self.folder)
        show_rows(self.grid, rows)
        unfinished = len(self.grid.cells) - sum(results.get("status") in SETTLED for _, results in rows)
        return 128 + stopped[0] if stopped else int(unfinished > 0)

    def _run(self, cells: Sequence[Cell], folder: Path, what: str, times: Times, stopped: Sequence[int]) -> None:
        """Runs the cells that are not done; a run that fails is recorded, a damaged one is left, and the rest goes on."""
        earlier = {folder / cell.folder: state_of(folder / cell.folder) for cell in cells}
        jobs = [
            Job(
                cell.settled_words,
                str(folder / cell.folder),
                str(self.folder / "logs" / f"{cell.folder}.txt"),
                cell.run.hash,
                self.main,
                shared_by(cell.run),
            )
            for cell in cells
            if earlier[folder / cell.folder].get("status") not in LEFT
        ]
        jobs = together(jobs)
        by_folder = {folder / cell.folder: cell for cell in cells}
        steps = {Path(job.run_dir): self._steps(by_folder[Path(job.run_dir)]) for job in jobs}
        board = Board(what, by_folder, steps, jobs, self.launcher, times, stopped)
        for path, results in earlier.items():
            board.take(path, results)
            if results.get("status") == "damaged":
                say(f"warning: {path.name} is left as it is: {results['error']}")
        with board.shown():
            for job, note in self.launcher.run(jobs):
                results = state_of(Path(job.run_dir))
                if results.get("status") not in (*LEFT, "failed", "oom", "interrupted"):
                    results = {**results, "status": "failed", "error": note, "config_hash": job.config_hash}
                    Path(job.run_dir).mkdir(parents=True, exist_ok=True)
                    write_atomic(Path(job.run_dir) / "results.json", json.dumps(results, indent=1).encode())
                board.ended(job, results)

    def _steps(self, cell: Cell) -> int:
        """Returns how many steps a cell makes, or a trial of its arm, which holds other examples out."""
        plan = self.plans[digest(cell.arm)]
        asked = next(each for each in self.grid.cells if each.arm == cell.arm).run.protocol.num_validation
        return optimizer_steps(cell.run, plan.num_train + asked - cell.run.protocol.num_validation)

    def _check_folder(self) -> None:
        """Refuses the folder of another sweep; a grid that holds all of the old one's cells extends it."""
        file = self.folder / "sweep.json"
        if not file.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "sweep.lock").exists():
                raise UserError(
                    f"sweep: a sweep folder is empty or holds a sweep, got sweep_dir={self.folder}; choose another"
                )
            return
        try:
            old = read_json(file, SWEEP)
            rates = (old["lr_search"] or {}).get("values")
            asked = {cell["asked"]: cell["axes"] for cell in old["cells"]}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"sweep: sweep.json must be whole, as a sweep wrote it, got {type(error).__name__} {error} in {file}; bring "
                "it back, or choose another sweep_dir"
            ) from error
        if rates != (self.search and json.loads(json.dumps(self.search.given))):
            raise UserError(
                f"sweep: a folder keeps its learning-rate search, got sweep_dir={self.folder}; choose another"
            )
        known = {cell.run.hash for cell in self.grid.cells}
        lost = [axes for config_hash, axes in asked.items() if config_hash not in known]
        if lost:
            raise UserError(
                f"sweep: a sweep folder keeps its cells, got sweep_dir={self.folder} with a grid that lacks {lost[0]}; "
                "choose another sweep_dir, or extend the grid"
            )

    def _write(self, cells: Sequence[tuple[Cell, str]], search: lr_search.SearchRecord | None) -> None:
        listed = [
            {"run": c.folder, "config_hash": c.run.hash, "asked": asked, "words": list(c.words), "axes": c.axes}
            for c, asked in cells
        ]
        content = {
            "name": self.name,
            "words": self.words,
            "axes": self.grid.axes,
            "cells": listed,
            "lr_search": search.as_dict() if search else None,
        }
        write_atomic(self.folder / "sweep.json", json.dumps(content, indent=1).encode())


def _take(words: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the words of `keys` as a mapping, and the other words."""
    options = {key_of(word): word.partition("=")[2] for word in words if key_of(word) in keys}
    return options, [word for word in words if key_of(word) not in keys]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder for this process.

    Raises:
        UserError: if another sweep runs in it.
    """
    with (folder / "sweep.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"sweep: one sweep at a time in a folder, got sweep_dir={folder}; wait for the other one"
            ) from error
        yield


@contextmanager
def interruptible(running: Any) -> Iterator[list[int]]:
    """Passes SIGINT and SIGTERM on to the runs, which save and stop; yields the list of signals received."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        running.stop()

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """Returns the final metrics of a run as {set/metric: value}, {metric: value} of the macro average, and the loss on
    held-out training examples as validation/loss."""
    final = results.get("metrics", {}).get("final", {})
    values = {key: value for key, value in final.items() if key != "sets"}
    if "validation" in results:
        values["validation/loss"] = results["validation"]["loss"]
    for name, set_metrics in final.get("sets", {}).items():
        values |= {f"{name}/{key}": value for key, value in set_metrics.items() if isinstance(value, int | float)}
    return values


def table(grid: Grid, rows: Sequence[tuple[Cell, dict[str, Any]]]) -> str:
    """Returns the sweep's table as CSV: one row per cell, in the grid's order."""
    columns = list(dict.fromkeys(key for _, results in rows for key in metrics(results)))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*grid.axes, "run", "status", "lr", "trainable", *columns])
    for cell, results in rows:
        values = metrics(results)
        writer.writerow(
            [
                *(cell.axes.get(key, "") for key in grid.axes),
                cell.folder,
                results.get("status", "missing"),
                cell.run.core.lr,
                results.get("params", {}).get("trainable", ""),
                *(values.get(column, "") for column in columns),
            ]
        )
    return out.getvalue()


def show_grid(sweep: Sweep, todo: Sequence[Cell], plans: Sequence[Plan], damaged: int, times: Times) -> None:
    """Prints the cells to run with their counts and cost, and how long they will take, where that has been measured."""
    grid = sweep.grid
    threads = sweep.launcher.threads
    lengths = [expected(times, cell.run, plan.steps, threads) for cell, plan in zip(todo, plans, strict=True)]
    columns = [*grid.axes, "trainable", "percent", "steps", "tokens", "memory", *(["time"] if any(lengths) else [])]
    table = Table(*columns, title=sweep.name, title_justify="left")
    for cell, plan, length in zip(todo, plans, lengths, strict=True):
        table.add_row(
            *(Text(str(cell.axes.get(key, ""))) for key in grid.axes),
            f"{plan.params.trainable:,}",
            f"{plan.params.percent:.4f}",
            f"{plan.steps:,}",
            f"{plan.tokens:,}",
            f"{plan.memory_bytes['peak'] / 2**30:.2f} GiB",
            *([duration(length.seconds) if length else ""] if any(lengths) else []),
        )
    console.print(table)
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        say(f"warning: {warning}")
    trials = sweep.search.trials * len({digest(cell.arm) for cell in grid.cells}) if sweep.search else 0
    tokens = sum(plan.tokens for plan in plans)
    searched = f", and at most {trials} runs to search the learning rate" if trials else ""
    before = f"{len(grid.cells) - len(todo) - damaged} done before"
    before += f", {damaged} damaged" if damaged else ""
    say(f"{len(grid.cells)} runs, {before}{searched}; about {tokens:,} training tokens")
    if todo:
        say(f"time: {told(sweep, todo, lengths)}")


def told(sweep: Sweep, todo: Sequence[Cell], lengths: Sequence[Expected | None]) -> str:
    """Returns how long the runs of a sweep will take together, as far as that has been measured."""
    by_kind = {kind_of(cell.run): length for cell, length in zip(todo, lengths, strict=True)}
    number = sum(length.runs for length in by_kind.values() if length)
    measured, places = [length for length in lengths if length], " and ".join(map(shown, sweep.folders))
    if not measured:
        return f"no runs like these have finished in {places}; what is left is told as soon as one has"
    ends = (
        makespan([], [getattr(length, part) for length in measured], sweep.launcher.jobs)
        for part in ("seconds", "least", "most")
    )
    others = len(lengths) - len(measured)
    scope = f" for {len(measured)} of {len(lengths)} runs" if others else ""
    scope += ", beside the search" if sweep.search else ""
    lacking = f"; none like the other{'s' if others > 1 else ''} has finished there" if others else ""
    return f"{about(*ends)}{scope}, {source(number, places)}{lacking}"


def show_rows(grid: Grid, rows: Sequence[tuple[Cell, dict[str, Any]]]) -> None:
    """Prints the sweep's final table: per cell its axes, status, learning rate, main metric and time."""
    table = Table(*grid.axes, "status", "lr", "metric", "time")
    for cell, results in rows:
        values = metrics(results)
        final = {key: value for key, value in values.items() if "/" not in key or len(values) == 1}
        seconds = results.get("time", {}).get("total_s")
        table.add_row(
            *(Text(str(cell.axes.get(key, ""))) for key in grid.axes),
            results.get("status", "missing"),
            f"{cell.run.core.lr:g}",
            ", ".join(f"{key} {value:.4f}" if key == "loss" else f"{key} {value:.2f}" for key, value in final.items()),
            f"{seconds:.0f} s" if seconds else "",
        )
    console.print(table)
