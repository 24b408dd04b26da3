"""Many devices: which processes a run has, and how those of this machine are started and ended.

Every process runs the same program. Training shares out whole micro-batches: process r of N takes the batches r, r + N,
..., so that N processes with accumulate=A take the very steps that one process takes with accumulate=N A. Evaluation
shares out batches in the same way and puts the outputs together. Process 0 alone writes.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed

from highrank.base.errors import UserError
from highrank.base.processes import WHOLE, Share

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Where torchrun, Lightning and Slurm each tell a process its number."""


def num_processes(trainer: Mapping[str, Any]) -> int:
    """Returns how many processes a run with these Trainer arguments has: one per device."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes") or 1
    if isinstance(devices, list):
        return len(devices) * nodes
    if isinstance(devices, int) and devices >= 0:
        return max(devices, 1) * nodes
    import lightning

    given = {**trainer, "strategy": "auto", "logger": False, "enable_checkpointing": False}
    with quiet():  # auto, -1 or a text: as Lightning reads it
        return lightning.Trainer(**given, enable_model_summary=False).world_size


def alone(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the Trainer arguments for one process on one device, with which a finished run is opened."""
    return {**trainer, "devices": 1, "num_nodes": 1, "strategy": "auto"}


def share_of(trainer: Mapping[str, Any]) -> Share:
    """Returns this process's share of a run's batches, known before the processes meet; rank 0 writes and prints."""
    processes = num_processes(trainer)
    if processes == 1:
        return WHOLE
    return Share(int(next((os.environ[key] for key in RANK_VARIABLES if key in os.environ), 0)), processes)


def evaluation_share_of(trainer: Mapping[str, Any]) -> Share:
    """Returns this process's share of the evaluation: all of it with a sharded model, which computes only in step."""
    return WHOLE if trainer.get("strategy") == "fsdp" else share_of(trainer)


def check(trainer: Any) -> None:
    """Checks that a Lightning Trainer's processes can be had on this machine.

    Raises:
        UserError: for more processes than cores on the CPU (Lightning itself refuses more than there are GPUs), or for
            several nodes without torchrun or Slurm to start their processes.
    """
    from lightning.pytorch.accelerators import CPUAccelerator

    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
        raise UserError(
            f"trainer: a process on the CPU needs a core, got trainer.devices={trainer.num_devices} on {cores} cores; "
            f"use at most trainer.devices={cores}"
        )
    if trainer.num_nodes > 1 and not trainer.strategy.cluster_environment.creates_processes_externally:
        raise UserError(
            "trainer: processes on several nodes are started by torchrun or srun, got "
            f"trainer.num_nodes={trainer.num_nodes} in a process of its own"
        )


class Processes:
    """The other processes of a run on this machine; none where torchrun or Slurm has started them all.

    On leaving the context they are waited for, or ended if this process failed. If one of them fails while this process
    waits for it, which it may do for half an hour, this process ends too.
    """

    VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK")
    GRACE_S = 10
    """How long this process may take to fail by itself after another did."""

    def __init__(self, trainer: Any):
        environment = getattr(trainer.strategy, "cluster_environment", None)
        self.ours = environment is not None and not environment.creates_processes_externally
        self.number = trainer.num_devices if self.ours else 1
        self.others: list[subprocess.Popen[bytes]] = []
        self.left = threading.Event()

    def start(self, config: Path) -> None:
        """Starts them on the run that a config.yaml describes, in whose folder it lies."""
        if self.number == 1:
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(zip(self.VARIABLES, ("127.0.0.1", str(port), "0", "0"), strict=True))
        for place in range(1, self.number):
            command = [sys.executable, "-m", "highrank.worker", str(config)]
            self.others.append(subprocess.Popen(command, env={**os.environ, "LOCAL_RANK": str(place)}))
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.left.wait(1):
            if any(other.poll() for other in self.others) and not self.left.wait(self.GRACE_S):
                print("error: another process of this run has failed, see above", file=sys.stderr, flush=True)
                os._exit(1)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        self.left.set()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for other in self.others:
            if failure is not None:
                other.kill()
            other.wait()
        if self.ours:
            for key in self.VARIABLES:
                os.environ.pop(key, None)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides Lightning's tips about workers and hardware, which change no number; leaves other warnings alone."""
    loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # its sampler is
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
