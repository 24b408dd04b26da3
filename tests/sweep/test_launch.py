"""The launchers: what a sweep gets from processes, from a Ray cluster on this machine, and from submitit."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from highrank.base.errors import UserError
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.sweep.jobs import Job
from highrank.sweep.launch import Local, Slurm, launcher
from highrank.train.ready import shared_by

ROOT = Path(__file__).parents[2]
TINY = ["model=tiny_llama", "task.n_train=8", "task.n_test=2", "max_steps=1", "batch_size=2", "placement=q", "r=2"]


def job(folder, *words):
    own = (*TINY, *words)
    run = compose_run(own)
    return Job(own, str(folder / "run"), str(folder / "logs" / "run.txt"), run.hash, main, shared_by(run))


def test_a_run_that_dies_is_told_by_its_signal_and_the_next_one_runs(tmp_path):
    local = Local(1)
    threading.Thread(target=kill, args=(local, run_of)).start()
    jobs = [job(tmp_path / "first", "max_steps=100000"), job(tmp_path / "second")]
    assert [note for _, note in local.run(jobs)] == ["killed by SIGKILL", "exit status 0"]


def test_a_worker_that_dies_takes_its_runs_along_and_is_replaced(tmp_path):
    local = Local(1)
    threading.Thread(target=kill, args=(local, lambda worker: worker.process.pid)).start()
    jobs = [job(tmp_path / "first", "max_steps=100000"), job(tmp_path / "second")]
    assert [note for _, note in local.run(jobs)] == ["its worker: killed by SIGKILL", "exit status 0"]
    state = json.loads((tmp_path / "first" / "run" / "results.json").read_text())
    assert state["status"] == "interrupted"  # asked to end, it saved


def kill(local, which):
    """Kills a process of the first run, once that trains."""
    while not local.workers:
        time.sleep(0.01)
    (worker,) = local.workers.values()
    (first,) = worker.running.values()
    while not list(Path(first.run_dir).glob("checkpoints/*")):
        time.sleep(0.01)
    os.kill(which(worker), signal.SIGKILL)


def run_of(worker):
    """Returns the process of a worker's only run."""
    pid = worker.process.pid
    (run,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(run)


@pytest.mark.filterwarnings("default")
def test_submitit_runs_each_job_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install highrank[slurm]")
    ((done, note),) = Slurm(1, cluster="local").run([job(tmp_path)])
    assert note == "exit status 0"
    assert '"status": "done"' in (Path(done.run_dir) / "results.json").read_text()


def test_a_sweep_on_a_ray_cluster(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install highrank[ray]")
    words = ["-m", *TINY, "seed=0,1", "launcher=ray", "jobs=2", f"sweep_dir={tmp_path / 'sweep'}"]
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "sweep" / "table.csv").open() as file:
        assert [(row["seed"], row["status"]) for row in csv.DictReader(file)] == [("0", "done"), ("1", "done")]


@pytest.mark.parametrize(
    ("name", "jobs", "said"), [("slrum", "1", "did you mean 'slurm'"), ("local", "x", "whole number")]
)
def test_bad_words(name, jobs, said):
    with pytest.raises(UserError, match=said):
        launcher(name, jobs)
