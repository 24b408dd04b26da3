"""A run of a sweep, as it is handed to the process that executes it."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from highrank.config.words import spelled
from highrank.train.ready import Ready


@dataclass(frozen=True)
class Job:
    """One run to execute."""

    words: tuple[str, ...]
    run_dir: str
    log: str
    """File for what the run prints."""
    config_hash: str
    main: Callable[..., int]
    """The command line, which executes the run."""
    shared: str | None = None
    """What it can share with other runs, by `shared_by`."""
    cwd: str = field(default_factory=os.getcwd)
    """Folder to which relative paths in the words refer."""


def together(jobs: Sequence[Job]) -> list[Job]:
    """Returns the jobs with those next to each other that share something, else in their order."""
    first = {job.shared: place for place, job in reversed(list(enumerate(jobs)))}
    return sorted(jobs, key=lambda job: first[job.shared])


def run_job(job: Job, ready: Ready | None = None) -> int:
    """Executes one run in this process, which may have loaded what it shares, and returns its exit status.

    Its log file is locked meanwhile, so that a run that outlived a killed sweep and the same run of the sweep started again do
    not meet.
    """
    with in_place(job) as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        return job.main(["run", *job.words, f"run_dir={spelled(job.run_dir)}"], ready)


@contextmanager
def in_place(job: Job) -> Iterator[TextIO]:
    """Brings this process to a job's folder, and what it prints into the job's log, which it yields."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.chdir(job.cwd)
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        yield log
