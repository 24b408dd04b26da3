"""Runs of several processes: which part of the work each of them takes, and how their results are joined."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


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
