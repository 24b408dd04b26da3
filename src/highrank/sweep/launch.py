"""Where the runs of a sweep execute: in processes of this machine, in a Ray cluster, or as Slurm jobs."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch

from highrank.base.errors import UserError, suggest
from highrank.sweep.jobs import Job, run_job
from highrank.sweep.workers import Worker


class Launcher(Protocol):
    """Executes jobs, each in a fresh process."""

    jobs: int
    """How many at once."""

    @property
    def threads(self) -> int | None:
        """Of each; None where other machines decide."""
        ...

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        """Yields each job when it ended, with a note on how."""
        ...

    def stop(self) -> None:
        """Asks the running jobs to save and end, and starts no more."""
        ...


class Local:
    """Processes of this machine: each run has its own, forked by a worker that holds what the runs share."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        given = "OMP_NUM_THREADS" in os.environ
        self.threads = torch.get_num_threads() if given else max(1, (os.cpu_count() or 1) // jobs)
        self.workers: dict[str | None, Worker] = {}
        self.stopped = False

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
        waiting = list(jobs)
        while self.workers or (waiting and not self.stopped):
            running = sum(len(worker.running) for worker in self.workers.values())
            for _ in range(min(self.jobs - running, 0 if self.stopped else len(waiting))):
                job = waiting.pop(0)
                if job.shared not in self.workers:
                    self.workers[job.shared] = Worker(job, self.threads)
                self.workers[job.shared].start(job)
            connections = {worker.connection: worker for worker in self.workers.values()}
            for connection in wait(list(connections), timeout=1):
                yield from connections[connection].ended()
            needed = set() if self.stopped else {job.shared for job in waiting}
            for shared, worker in list(self.workers.items()):
                if worker.gone or not (worker.running or shared in needed):
                    self.workers.pop(shared).close()

    def stop(self) -> None:
        self.stopped = True
        for worker in list(self.workers.values()):
            worker.process.terminate()


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
