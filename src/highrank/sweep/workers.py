"""A sweep's workers on this machine: each has loaded what some runs share, and forks a process for every one of them.

So a run has a process of its own, which starts with the model in memory that it shares with the worker and the other runs
until it writes there. A worker computes nothing and has no threads: those would not live on in a fork.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

import torch

from highrank.config.words import compose_run
from highrank.sweep.jobs import Job, in_place, run_job
from highrank.train.ready import Ready, load_shared


class Worker:
    """A worker, as the sweep sees it: forked from a process that has imported PyTorch already."""

    def __init__(self, first: Job, threads: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["highrank.run"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, first, threads))
        self.process.start()
        theirs.close()
        self.running: dict[str, Job] = {}
        """Jobs that it was given, by their run directory."""
        self.gone = False
        """Whether it has ended, killed by someone, and its runs with it."""

    def start(self, job: Job) -> None:
        self.running[job.run_dir] = job
        with suppress(OSError):  # it is gone: the next `ended` says so
            self.connection.send(job)

    def ended(self) -> Iterator[tuple[Job, str]]:
        """Yields the jobs whose end the connection tells, with a note on how."""
        try:
            run_dir, code = self.connection.recv()
        except (EOFError, OSError):  # neither the worker nor a run holds the other end any more
            self.process.join()
            self.gone = True
            while self.running:
                yield self.running.popitem()[1], f"its worker: {_how(self.process.exitcode)}"
        else:
            yield self.running.pop(run_dir), _how(code)

    def close(self) -> None:
        """Lets it end."""
        self.connection.close()
        self.process.join()


def _how(code: Any) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _work(connection: Connection, first: Job, threads: int) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches the sweep alone, which passes it on
    torch.set_num_threads(1)
    runs = _Runs(connection, _load(first), threads)
    signal.signal(signal.SIGTERM, runs.stop)
    runs.serve()


def _load(job: Job) -> Ready | None:
    """Returns what the runs share; nothing where it cannot be loaded: each run then tries to, and says what is wrong."""
    if job.shared is None:
        return None
    with in_place(job):
        try:
            ready = load_shared(compose_run(job.words))
        except Exception:
            return None
    gc.collect()
    gc.freeze()  # what is here stays: a collection in a run would copy the memory that it looks through
    return ready


class _Runs:
    """The runs of a worker, in the worker."""

    def __init__(self, connection: Connection, ready: Ready | None, threads: int):
        self.connection, self.ready, self.threads = connection, ready, threads
        self.processes: dict[Any, tuple[Job, Any]] = {}
        self.stopped = False

    def serve(self) -> None:
        """Forks a run for each job that comes, and tells how it ended, until the sweep closes the connection or is gone."""
        while True:
            for source in wait([self.connection, *self.processes]):
                if source is not self.connection:
                    self.tell(*self.processes.pop(source))
                    continue
                try:
                    job = self.connection.recv()
                except (EOFError, OSError):
                    self.stop()
                    for _, process in self.processes.values():
                        process.join()
                    return
                self.fork(job)

    def fork(self, job: Job) -> None:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_run, args=(job, self.ready, self.threads, os.getpid()))
        process.start()
        self.processes[process.sentinel] = job, process
        if self.stopped:  # while it was started
            process.terminate()

    def tell(self, job: Job, process: Any) -> None:
        process.join()
        with suppress(OSError):  # the sweep is gone: the connection says so next
            self.connection.send((job.run_dir, process.exitcode))

    def stop(self, signum: int = 0, frame: FrameType | None = None) -> None:
        """Asks the runs to save and end."""
        self.stopped = True
        for _, process in list(self.processes.values()):
            process.terminate()


def _run(job: Job, ready: Ready | None, threads: int, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(worker,), daemon=True).start()
    torch.set_num_threads(threads)
    sys.exit(run_job(job, ready))


def _end_with(worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
