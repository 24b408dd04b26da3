"""`highrank watch`: steps, loss and time left from the files that a run writes; a sweep with all its cells."""

import contextlib
import json
import os
import shutil

import pytest
from tiny_run import WORDS, write
from torch.utils.tensorboard import SummaryWriter

from highrank import run as main_flow
from highrank.base.saved import read_results
from highrank.cli import main
from highrank.find import reading, watch
from highrank.find.watch import COLUMNS, Steps, Watched


@pytest.fixture
def training(outputs):
    """Returns a run of 40 steps that has logged ten, half a second each."""
    run = outputs / "2026-01-01/running"
    for file in run.glob("events*"):
        file.unlink()
    log(run, range(10))
    write(run, {**read_results(run), "steps_planned": 40})
    return run


def log(run, steps, began=1000):
    with SummaryWriter(run) as writer:
        for step in steps:
            writer.add_scalar("train/loss", 4 - step / 10, step, walltime=began + step / 2)
            writer.add_scalar("epoch", 0, step)


def rows(watched):
    return [dict(zip(COLUMNS, map(str, row), strict=True)) for row in watched.look().rows]


def test_a_run_in_training_tells_step_loss_and_time_left(training):
    watched = Watched(training)
    (row,) = rows(watched)
    assert (row["status"], row["step"], row["loss"]) == ("training", "10 of 40", "3.1000")
    assert row["left"] == "15 s"  # 30 steps of half a second
    assert watched.title == "outputs/2026-01-01/running: running"
    assert not watched.over


def test_a_look_reads_on_where_the_last_one_ended(training):
    steps = Steps(training)
    steps.look()
    log(training, range(10, 14))  # as a run that goes on does, into a new file
    steps.look()
    assert (steps.done, len(steps.times)) == (14, 14)
    steps.look()
    assert len(steps.times) == 14
    assert steps.left(14) == 0
    assert Steps(training.parent / "lora").left(10) is None


def test_the_time_between_two_tries_is_no_steps(training):
    log(training, range(10, 12), began=90_000)
    steps = Steps(training)
    steps.look()
    assert (steps.done, steps.left(40)) == (12, 14.0)  # 28 steps of half a second


def test_a_sweeps_runs_have_the_names_that_tell_them_apart(outputs, highrank, terminal):
    sweep = outputs / "2026-01-01"
    cells = [{"run": name, "axes": {"method": name, "lr": 0.1}} for name in ("hira", "lora")]
    (sweep / "sweep.json").write_text(json.dumps({"cells": cells}))
    assert [row["run"] for row in rows(Watched(sweep))] == ["method=hira lr=0.1", "method=lora lr=0.1"]


def test_what_a_run_removes_while_it_is_weighed_weighs_nothing(training, monkeypatch):
    gone = training / "gone.partial"
    gone.touch()
    os.utime(gone, (0, 0))
    real = reading.os.scandir

    @contextlib.contextmanager
    def scandir(folder):
        with real(folder) as entries:
            found = list(entries)
        gone.unlink(missing_ok=True)
        yield found

    before = reading.weigh(training)
    monkeypatch.setattr(reading.os, "scandir", scandir)
    assert reading.weigh(training) == before
    assert reading.weigh(training / "not there") == (0, 0.0)


def test_a_phase_ends_when_its_time_is_written(training):
    results = read_results(training)
    seconds = {"setup_s": 1.0, "eval_before_s": 1.0, "train_s": 1.0}
    for times, phase in ((0, "setting up"), (1, "evaluating the untrained model"), (2, "training"), (3, "evaluating")):
        write(training, {**results, "time": dict(list(seconds.items())[:times])})
        assert rows(Watched(training))[0]["status"] == phase


def test_a_run_writes_early_what_is_watched(tmp_path, monkeypatch):
    """How many steps there will be is known before the first of them."""
    seen, train = [], main_flow.train
    monkeypatch.setattr(main_flow, "train", lambda job, *rest: seen.append(look(job)) or train(job, *rest))

    def look(job):
        return rows(Watched(job.directory.path)), read_results(job.directory.path)["steps_planned"]

    assert main(["run", *WORDS, "method=hira", "r=2", f"run_dir={tmp_path / 'run'}"]) == 0
    (((row,), planned),) = seen
    assert (row["status"], row["step"], planned) == ("training", "", 3)
    assert rows(Watched(tmp_path / "run"))[0]["step"] == "3 of 3"


def test_a_sweep_has_a_row_per_cell_started_or_not(outputs, highrank):
    sweep = outputs / "2026-01-01"
    cells = [{"run": name} for name in ("hira", "running", "failed", "later")]
    (sweep / "sweep.json").write_text(json.dumps({"cells": cells}))
    watched = Watched(sweep)
    assert [row["status"] for row in rows(watched)] == ["done", "training", "failed", "waiting"]
    assert watched.title == "outputs/2026-01-01: 4 runs: 1 done, 1 running, 1 failed, 1 waiting"
    assert not watched.over
    for name in ("running", "later"):
        shutil.copytree(sweep / "lora", sweep / name, dirs_exist_ok=True)
    rows(watched)
    assert watched.over
    status, out, _ = highrank("watch", sweep)
    assert (status, len(out.splitlines())) == (0, 5)


def test_a_sweep_that_searches_rates_has_its_trials(outputs):
    sweep = outputs / "sweep_1"
    shutil.copytree(outputs / "2026-01-01/lora", sweep / "search/trial")
    (sweep / "sweep.lock").touch()
    assert [row["run"] for row in rows(Watched(sweep))] == ["trial"]


def test_a_sweep_goes_on_until_its_runs_are_settled_and_over(outputs, highrank):
    """Before the first trial, and between two of them, nothing runs: no reason to stop looking."""
    sweep = outputs / "sweep_1"
    sweep.mkdir()
    (sweep / "sweep.lock").touch()
    watched = Watched(sweep)
    assert rows(watched) == []
    assert (watched.title, watched.over) == ("outputs/sweep_1: no run has begun yet", False)
    assert highrank("watch", sweep)[:2] == (0, "\t".join(COLUMNS) + "\n")
    shutil.copytree(outputs / "2026-01-01/lora", sweep / "search/trial")
    assert rows(watched)[0]["status"] == "done"
    assert not watched.over
    shutil.copytree(outputs / "2026-01-01/lora", sweep / "cell")
    (sweep / "sweep.json").write_text(json.dumps({"cells": [{"run": "cell"}]}))
    assert rows(watched)[0]["run"] == "cell"
    assert watched.over


def test_a_damaged_run_of_a_sweep_is_named_with_its_fault(outputs, highrank, terminal):
    sweep = outputs / "2026-01-01"
    (sweep / "sweep.json").write_text(json.dumps({"cells": [{"run": name} for name in ("hira", "damaged")]}))
    watched = Watched(sweep)
    look = watched.look()
    assert look.statuses == ["done", "damaged"]
    (problem,) = look.problems
    assert problem.startswith("damaged: run: results.json is damaged, got Unterminated string")
    assert look.table("").caption == problem
    assert highrank("watch", sweep, "--once")[2] == f"{problem}\n"


def test_a_run_without_an_event_or_with_broken_ones_is_watched_too(training):
    (file,) = training.glob("events*")
    whole = file.read_bytes()
    for broken in (b"", b"x" * 100, whole[: len(whole) // 2] + b"x" * 40):
        file.write_bytes(broken)
        assert rows(Watched(training))[0]["status"] == "training"
    file.unlink()
    file.mkdir()
    assert rows(Watched(training))[0]["step"] == ""


def test_the_file_written_last_tells_where_a_run_is(training):
    """Whatever the names of its tries sort to: the tenth of one process, or a clock that was set back."""
    for file in training.glob("events*"):
        file.unlink()
    for name, steps, age in (("1.host.1.10", range(10, 12), 100), ("1.host.1.2", range(5, 8), 200)):
        log(training, steps)
        (new,) = [file for file in training.glob("events*") if "host" not in file.name]
        new.rename(training / f"events.out.tfevents.{name}")
        os.utime(training / f"events.out.tfevents.{name}", (1e9 - age, 1e9 - age))
    steps = Steps(training)
    steps.look()
    assert steps.done == 12


def test_live_it_looks_again_until_all_is_over(training, highrank, terminal, monkeypatch):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        write(training, {**read_results(training), "status": "done"})

    monkeypatch.setattr(watch.time, "sleep", sleep)
    status, out, _ = highrank("watch", training, "--every", "0.5")
    assert (status, looks) == (0, [0.5])
    assert "10 of 40" in out
    assert "outputs/2026-01-01/running: done" in out


def test_control_c_ends_the_looking_and_no_run(training, highrank, terminal, monkeypatch):
    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert highrank("watch", training)[0] == 0
    assert highrank("watch", training, "--once")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: folder; use: highrank watch RUN|SWEEP"),
        (["outputs"], "watch: a run directory is needed, got outputs, which holds runs"),
        (["outputs/2026-01-01/damaged"], "run: results.json is damaged"),
        (["outputs/2026-01-01/hira", "--every", "0"], "--every takes seconds > 0, got --every 0"),
        (["outputs/notes"], "watch: sweep.json is damaged, got no cells in outputs/notes"),
    ],
)
def test_what_cannot_be_watched_is_said(outputs, highrank, words, said):
    (outputs / "notes/sweep.json").write_text("{}")
    status, _, err = highrank("watch", *words)
    assert status == 2
    assert said in err


def test_half_an_event_at_the_end_of_a_file_is_read_when_it_is_whole(training):
    (file,) = training.glob("events*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    steps = Steps(training)
    steps.look()
    assert steps.done == 10  # the loss stands before the epoch, of which a part is missing
    file.write_bytes(whole)
    steps.look()
    assert steps.done == 10
