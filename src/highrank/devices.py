"""Many devices: which processes a run has, what each of them takes of the work, and how their results become one.

Every process runs the same program. Training shares out whole micro-batches: process r of N takes the batches r, r + N,
..., so that N processes with accumulate=A take the very steps that one process takes with accumulate=N A. Evaluation
shares out batches in the same way and puts the outputs together. Process 0 alone writes.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from highrank.errors import UserError
from highrank.method import Method
from highrank.transformers_internals import block_names

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Where torchrun, Lightning and Slurm each tell a process its number."""


@dataclass(frozen=True)
class Share:
    """What one process takes of a list of batches: those at `rank`, `rank + of`, ..."""

    rank: int = 0
    of: int = 1

    def number(self, position: int) -> int:
        """Returns the place in the whole list of this process's batch at `position`."""
        return position * self.of + self.rank

    def of_examples(self, examples: Sequence[Any], batch_size: int) -> list[Any]:
        """Returns the examples of this process's batches, in order; without a batch of its own it repeats the first,
        because Lightning wants one from every process."""
        starts = list(range(self.rank * batch_size, len(examples), self.of * batch_size)) or [0]
        return [example for start in starts for example in examples[start : start + batch_size]]


WHOLE = Share()
"""The share of a process that is alone."""


def num_processes(trainer: Mapping[str, Any]) -> int:
    """Returns how many processes a run with these Trainer arguments has: one per device."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes") or 1
    if isinstance(devices, list):
        return len(devices) * nodes
    if isinstance(devices, int) and devices >= 0:
        return max(devices, 1) * nodes
    import lightning

    from highrank.run import quiet

    given = {**trainer, "strategy": "auto", "logger": False, "enable_checkpointing": False}
    with quiet():  # auto, -1 or a text: as Lightning reads it
        return lightning.Trainer(**given, enable_model_summary=False).world_size


def arguments(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the Trainer arguments as Lightning takes them: `strategy=fsdp` as an object."""
    given = dict(trainer)
    if given.get("strategy") == "fsdp":
        from highrank.fsdp import Sharded

        given["strategy"] = Sharded(
            data_parallel_size=num_processes(trainer),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    return given


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
            command = [sys.executable, "-m", "highrank.devices", str(config)]
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


def writes() -> bool:
    """Whether this process is the one that writes files: process 0, or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def gather(outputs: list[Any]) -> list[Any]:
    """Returns every process's outputs, joined; the same list in each of them."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return outputs
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, outputs)
    return [output for part in parts for output in part]


def highest(value: int, device: torch.device) -> int:
    """Returns the largest of the processes' values."""
    return int(_all_reduce(value, device, distributed.ReduceOp.MAX))


def total(value: int, device: torch.device) -> int:
    """Returns the sum of the processes' values."""
    return int(_all_reduce(value, device, distributed.ReduceOp.SUM))


def _all_reduce(value: int, device: torch.device, operation: Any) -> int:
    if not distributed.is_initialized():
        return value
    tensor = torch.tensor(value, device=device)
    distributed.all_reduce(tensor, operation)
    return int(tensor)


def shard(model: Any, mesh: Any) -> None:
    """Shards a model's parameters over the processes (FSDP2), block by block, the rest as one more unit.

    A block's parameters are whole while it computes, forward and backward, so an adapter inside sees W as ever. What
    trains and what is frozen keep their own dtypes.
    """
    from torch.distributed.fsdp import fully_shard

    if is_sharded(model):
        return
    blocks = block_names(model)
    for module in list(model.modules()):
        if isinstance(module, Method):
            module.keeps = False
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module, path: str) -> Iterator[None]:
    """Within it the parameters of the unit that holds the module at `path` are whole; does nothing without sharding."""
    if not is_sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    names = path.split(".")
    above = [model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]
    unit = next(module for module in reversed(above) if isinstance(module, FSDPModule))
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor of which every process may hold a shard, whole; all processes must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(like: Tensor, tensor: Tensor) -> Tensor:
    """Returns this process's shard of a whole tensor, if `like` is a shard; else the tensor."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def main(config: Path) -> None:
    """Takes part in a run that process 0 has started."""
    from omegaconf import OmegaConf

    from highrank.config import build, register_configs
    from highrank.run import execute

    register_configs()
    values: Any = OmegaConf.load(config)
    values["run_dir"] = str(config.parent)
    try:
        execute(build(values))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
