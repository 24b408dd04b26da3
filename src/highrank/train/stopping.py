"""Signals ask a run to stop: it does so between two steps, saved."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from highrank.base.processes import highest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """Raised between two steps after a signal asked the run to stop."""


class StopOnSignal(Callback):
    """Notes SIGNALS, on which the run stops between two steps, saved; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {s: signal.signal(s, self._note) for s in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.received is not None:
            raise Interrupted(signal.Signals(self.received).name)

    def agree(self, trainer: lightning.Trainer) -> bool:
        """Returns whether a signal has come to any process: every process asks, and all have the same answer.

        A signal that comes while they ask stays noted for the next time.
        """
        signum = highest(self.received or 0, trainer.strategy.root_device)
        if signum and self.received is None:
            self.received = signum
        return signum > 0

    def check_all(self, trainer: lightning.Trainer) -> None:
        """Raises Interrupted, in every process, if a signal came to any."""
        if self.agree(trainer):
            self.check()

    def on_validation_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "validate":  # one within training is finished
            self.on_predict_batch_end(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.state.fn == "validate":
            self.on_predict_end(trainer)

    def on_predict_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.world_size == 1:
            self.check()

    def on_predict_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.check_all(trainer)


def requeue(received: int) -> None:
    """Puts a Slurm job back into the queue that was warned of its time limit (`sbatch --signal=USR1@60`)."""
    job = os.environ.get("SLURM_JOB_ID")
    warned = received in (signal.SIGUSR1, signal.SIGUSR2)
    if warned and job and os.environ.get("SLURM_PROCID", "0") == "0" and shutil.which("scontrol"):
        subprocess.run(["scontrol", "requeue", job], check=False)
