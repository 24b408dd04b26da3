"""Where the runs of a sweep execute: in processes of this machine, in a Ray cluster, or as Slurm jobs."""

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch

from highrank.base.errors import UserError, suggest
from highrank.config.words import spelled


@dataclass(frozen=True)
class Job:
    """One run to execute."""

    words: tuple[str, ...]
    run_dir: str
    log: str
    """File for what the run prints."""
    config_hash: str
    main: Callable[[Sequence[str]], int]
    """The command line, which executes the run."""
    cwd: str = field(default_factory=os.getcwd)
    """Folder to which relative paths in the words refer."""


def run_job(job: Job) -> int:
    """Executes one run in this process and returns its exit status; its log file is locked meanwhile, so that a run
    that outlived a killed sweep and the same run of the sweep started again do not meet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.chdir(job.cwd)
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        return job.main(["run", *job.words, f"run_dir={spelled(job.run_dir)}"])


class Launcher(Protocol):
    """Executes jobs, each in a fresh process."""

    jobs: int
    """How many at once."""
    threads: int | None
    """Of each; None where other machines decide."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        """Yields each job when it ended, with a note on how."""
        ...

    def stop(self) -> None:
        """Asks the running jobs to save and end, and starts no more."""
        ...


class Local:
    """Processes of this machine, forked from one that has imported PyTorch already."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        given = "OMP_NUM_THREADS" in os.environ
        self.threads: int | None = torch.get_num_threads() if given else max(1, (os.cpu_count() or 1) // jobs)
        self.running: dict[Any, tuple[Job, Any]] = {}
        self.stopped = False

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["highrank.run"])
        waiting = list(jobs)
        while self.running or (waiting and not self.stopped):
            while waiting and len(self.running) < self.jobs and not self.stopped:
                job = waiting.pop(0)
                process = context.Process(target=_in_process, args=(job, self.threads))
                process.start()
                self.running[process.sentinel] = (job, process)
            for sentinel in wait(list(self.running), timeout=1):
                job, process = self.running.pop(sentinel)
                process.join()
                code = process.exitcode
                yield job, f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def stop(self) -> None:
        self.stopped = True
        for _, process in list(self.running.values()):
            process.terminate()


def _in_process(job: Job, threads: int) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches the sweep alone, which passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    sys.exit(run_job(job))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


class Ray:
    """Tasks of a Ray cluster: the one that RAY_ADDRESS names, else one on this machine. Folders must be shared."""

    def __init__(self, jobs: int):
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UserError('sweep: Ray is an extra, got launcher=ray; pip install "highrank[ray]"') from error
        self.ray, self.jobs, self.stopped = ray, jobs, False
        self.threads: int | None = None
        self.pending: dict[Any, Job] = {}

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        ray = self.ray
        env_vars = {key: value for key, value in os.environ.items() if key.startswith(("HIGHRANK_", "HF_", "OMP_"))}
        ray.init(ignore_reinit_error=True, log_to_driver=False, runtime_env={"env_vars": env_vars})
        execute = ray.remote(max_calls=1, max_retries=0)(run_job)  # one call per worker process
        waiting = list(jobs)
        while self.pending or (waiting and not self.stopped):
            while waiting and len(self.pending) < self.jobs and not self.stopped:
                job = waiting.pop(0)
                self.pending[execute.remote(job)] = job
            for done in ray.wait(list(self.pending), timeout=1)[0]:
                job = self.pending.pop(done)
                try:
                    yield job, f"exit status {ray.get(done)}"
                except ray.exceptions.RayError as error:
                    yield job, str(error).strip().splitlines()[0]

    def stop(self) -> None:
        self.stopped = True
        for reference in list(self.pending):
            self.ray.cancel(reference)


class Slurm:
    """Slurm jobs through submitit, whose options come from SBATCH_* variables. Folders must be shared."""

    def __init__(self, jobs: int, cluster: str = "slurm"):
        try:
            import submitit
        except ModuleNotFoundError as error:
            raise UserError('sweep: Slurm is an extra, got launcher=slurm; pip install "highrank[slurm]"') from error
        self.submitit, self.jobs, self.cluster = submitit, jobs, cluster
        self.threads: int | None = None
        self.pending: dict[Any, Job] = {}

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        if not jobs:
            return
        executor = self.submitit.AutoExecutor(folder=Path(jobs[0].log).parent / "slurm", cluster=self.cluster)
        executor.update_parameters(name="highrank", timeout_min=7 * 24 * 60)
        if self.cluster == "slurm":
            executor.update_parameters(slurm_array_parallelism=self.jobs)
        self.pending = dict(zip(executor.map_array(run_job, jobs), jobs, strict=True))
        while self.pending:
            for handle in [handle for handle in self.pending if handle.done()]:
                job = self.pending.pop(handle)
                error = handle.exception()
                yield job, str(error).strip().splitlines()[0] if error else f"exit status {handle.result()}"
            time.sleep(1)

    def stop(self) -> None:
        for handle in list(self.pending):
            handle.cancel()


LAUNCHERS: dict[str, Callable[[int], Launcher]] = {"local": Local, "ray": Ray, "slurm": Slurm}


def launcher(name: str, jobs: str) -> Launcher:
    """Returns the launcher called `name`, for `jobs` runs at once.

    Raises:
        UserError: for an unknown name, a number below 1, or a library that is not installed.
    """
    if name not in LAUNCHERS:
        raise UserError(f"sweep: unknown launcher, got launcher={name}{suggest(name, LAUNCHERS)}")
    if not jobs.isdigit() or int(jobs) < 1:
        raise UserError(f"sweep: jobs is a whole number >= 1, got jobs={jobs}")
    return LAUNCHERS[name](int(jobs))
