"""What a sweep shows while its runs execute: the table of `watch` on a terminal, a line per run elsewhere, the time left."""

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from highrank.base.console import console
from highrank.cli import main
from highrank.find import watch
from highrank.find.watch import COLUMNS, EDGES, Look
from highrank.sweep import board as board_module
from highrank.sweep import sweep as sweep_module
from highrank.sweep.board import Board, makespan
from highrank.sweep.grid import expand
from highrank.sweep.jobs import Job
from highrank.sweep.lr_search import Search
from highrank.train.pace import Times, pace_of

WORDS = ["model=tiny_llama", "task.n_train=16", "task.n_test=2", "batch_size=4", "max_steps=20", "r=2"]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "is_interactive", True)
    monkeypatch.setattr(console, "_width", 200)
    monkeypatch.setattr(console, "_height", 60)
    monkeypatch.setattr(console, "no_color", True)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(board_module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


class Sample:
    """A board over the cells of a grid, whose runs are written here."""

    def __init__(self, folder, *words, at_once=1, times=None, threads=1):
        self.cells = {folder / cell.folder: cell for cell in expand([*WORDS, *words]).cells}
        self.jobs = [
            Job(cell.words, str(path), str(folder / "logs" / path.name), cell.run.hash, main)
            for path, cell in self.cells.items()
        ]
        launcher = SimpleNamespace(jobs=at_once, threads=threads)
        self.stopped = []
        steps = dict.fromkeys(self.cells, 20)
        self.board = Board("runs", self.cells, steps, self.jobs, launcher, times or Times(), self.stopped)

    def end(self, index, status="done", seconds=10.0, **values):
        job = self.jobs[index]
        results = {"config_hash": "", "status": status, "steps": 20, "time": {"train_s": seconds}, **values}
        write(Path(job.run_dir), results)
        self.board.ended(job, results)

    def rows(self):
        table = self.board.table()
        by_column = [list(map(str, column.cells)) for column in table.columns]
        return str(table.title), [dict(zip(COLUMNS, row, strict=True)) for row in zip(*by_column, strict=True)]


def write(folder, results, config="method: {name: hira}\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(config)


def touch(file, text=""):
    """Writes to a file later than whatever was written before."""
    before = file.stat().st_mtime_ns if file.exists() else 0
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    os.utime(file, ns=(before + 10**9,) * 2) if before else None


def test_a_run_that_is_tried_again_waits_until_it_writes(tmp_path, terminal):
    cells = expand([*WORDS, "method=hira", "seed=0,1"]).cells
    first = tmp_path / cells[0].folder
    log = tmp_path / "logs" / cells[0].folder
    write(first, {"config_hash": "", "status": "failed", "error": "it was so before"})
    touch(log, "as it was before")
    sample = Sample(tmp_path, "method=hira", "seed=0,1")
    title, rows = sample.rows()
    assert title == "2 runs: 2 waiting"
    assert [(row["run"], row["status"]) for row in rows] == [("seed=0", "waiting"), ("seed=1", "waiting")]
    touch(log, "hira on tiny_llama")
    title, rows = sample.rows()
    assert (title, rows[0]["status"]) == ("2 runs: 1 running, 1 waiting", "setting up")
    write(
        first, {"config_hash": "", "status": "running", "steps_planned": 20, "time": {"setup_s": 1, "eval_before_s": 1}}
    )
    touch(first / "config.yaml", "method: {name: hira}\n")
    title, rows = sample.rows()
    assert (title, rows[0]["status"]) == ("2 runs: 1 running, 1 waiting", "training")
    sample.end(0, "failed", error="it is so again")
    title, rows = sample.rows()
    assert (title, rows[0]["status"]) == ("2 runs: 1 failed, 1 waiting", "failed")


def test_elsewhere_a_line_per_run_with_what_is_left(tmp_path, capsys, clock):
    sample = Sample(tmp_path, "method=hira,lora", "seed=0,1,2")
    assert sample.board.left() == ""  # nothing has been measured
    names = [path.name for path in sample.cells]
    clock.seconds = 12.0  # two of them to start
    sample.end(0, validation={"loss": 1.5})
    clock.seconds = 32.0
    sample.end(1, seconds=20.0)
    clock.seconds = 33.0
    sample.end(2, "failed", error="no [q,v] here")
    clock.seconds = 53.0
    sample.end(3, seconds=20.0)
    sample.stopped.append(2)
    sample.end(4, "interrupted")
    assert capsys.readouterr().out.splitlines() == [
        f"1/6 {names[0]}: done, validation loss 1.5000, 10 s; 1 min 0 s left if the others take as long as those that are done",
        f"2/6 {names[1]}: done, 20 s; 48 s to 1 min 20 s left if the others take as long as those that are done",
        f"3/6 {names[2]}: failed: no [q,v] here; see {sample.jobs[2].log}; "
        "36 s to 1 min 0 s left if the others take as long as those that are done",
        f"4/6 {names[3]}: done, 20 s; about 40 s left",
        f"5/6 {names[4]}: interrupted",
    ]


def test_what_a_running_one_has_done_is_no_longer_left(tmp_path, clock):
    sample = Sample(tmp_path, "method=hira", "seed=0,1,2,3,4", at_once=2)
    clock.seconds = 10.0
    sample.end(0)
    clock.seconds = 14.0  # the second is late, the third is four seconds old
    assert sample.board.left() == "about 16 s left"  # one of the two that wait after the third, six seconds from now


def test_runs_of_before_and_elsewhere_measure_too(tmp_path, clock):
    cells = expand([*WORDS, "method=hira", "seed=0,1"]).cells
    times = Times()
    times.add({"status": "done", "steps": 40, "time": {"setup_s": 5, "train_s": 40}}, pace_of(cells[0].run, 1))
    assert Sample(tmp_path, "method=hira", "seed=0,1", times=times).board.left() == "about 50 s left"
    assert Sample(tmp_path, "method=hira", "seed=0,1", times=times, threads=None).board.left() == ""
    assert Sample(tmp_path, "method=lora", "seed=0,1", times=times).board.left() == ""


def test_no_run_of_another_model_or_batch_tells_the_time(tmp_path, clock):
    sample = Sample(tmp_path, "method=hira", "batch_size=2,4")
    clock.seconds = 10.0
    sample.end(0)
    assert sample.board.left() == ""


def test_when_the_last_run_ends():
    assert makespan([], [3, 3, 3], 1) == 9
    assert makespan([], [3, 3, 3], 2) == 6
    assert makespan([1, 5], [2, 2], 2) == 5
    assert makespan([4], [1], 2) == 4
    assert makespan([4], [], 1) == 4


def test_a_trial_is_named_by_its_rate_and_the_seed_it_has(tmp_path, terminal):
    cells = expand([*WORDS, "method=hira", "seed=1,2", "protocol.num_validation=2"]).cells
    asked = []
    Search((1e-3, 1e-2)).run(cells, tmp_path, asked.extend)
    trials = {tmp_path / cell.folder: cell for cell in asked}
    launcher = SimpleNamespace(jobs=1, threads=1)
    board = Board("trials of rates", trials, {}, [], launcher, Times(), [])
    assert list(board.names.values()) == ["seed=1 lr=0.001", "seed=1 lr=0.01"]
    assert board.table().title == "2 trials of rates: 2 waiting"


def test_a_low_terminal_has_those_that_run_and_failed(monkeypatch):
    statuses = [*["done"] * 20, "failed", "running", "running", *["waiting"] * 20]
    rows = [(f"run {i}", status, *[""] * (len(COLUMNS) - 2)) for i, status in enumerate(statuses)]
    monkeypatch.setattr(watch, "console", SimpleNamespace(height=EDGES + 8))
    table = Look(rows, statuses).table("all")
    shown = list(map(str, table.columns[1].cells))
    assert shown == ["failed", "running", "running", *["waiting"] * 4]
    assert table.caption == "and 20 done, 16 waiting"
    monkeypatch.setattr(watch, "console", SimpleNamespace(height=EDGES + len(rows)))
    assert Look(rows, statuses).table("all").row_count == len(rows)


class Dies:
    """A launcher whose processes die before they write anything."""

    jobs = threads = 1

    def run(self, jobs):
        for job in jobs:
            yield job, "killed by SIGKILL"

    def stop(self):
        """Nothing runs."""


def test_on_a_terminal_the_table_goes_and_what_went_wrong_stays(tmp_path, terminal, capsys, monkeypatch):
    words = [*WORDS, "max_steps=2", "method=hira", "seed=0,1"]
    cell, _ = expand(words).cells
    write(tmp_path / "sweep" / cell.folder, {"config_hash": cell.run.hash, "status": "done"})
    (tmp_path / "sweep" / "sweep.lock").touch()
    monkeypatch.setattr(sweep_module, "launcher", lambda *_: Dies())
    monkeypatch.setattr(sweep_module.dashboard, "write", lambda _: None)
    assert main(["run", "-m", *words, f"sweep_dir={tmp_path / 'sweep'}"]) == 1
    out = capsys.readouterr().out
    assert "2 runs, 1 done before" in out
    assert "2 runs: 1 done, 1 failed" in out
    assert out.count(": failed: killed by SIGKILL; see ") == 1
    assert "1/1" not in out
    assert "\x1b[2K" in out.rpartition("2 runs: ")[2]  # what the table stood on is cleared
    assert out.splitlines()[-1] == str(tmp_path / "sweep")


def test_a_table_can_be_drawn_while_runs_end(tmp_path, terminal, clock):
    """The table is drawn in a thread of its own, which must not meet half of a change."""
    sample = Sample(tmp_path, "method=hira", "seed=range(0,8)", at_once=4)
    problems, over = [], threading.Event()

    def draw():
        try:
            while not over.is_set():
                sample.board.table()
        except Exception as problem:
            problems.append(problem)

    thread = threading.Thread(target=draw)
    thread.start()
    for index in range(8):
        sample.end(index)
    over.set()
    thread.join()
    assert problems == []
    assert sample.rows()[0] == "8 runs: 8 done"
