"""Memory that runs out, and what is then done in smaller batches."""

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_out_of_cpu_memory
from torch import nn

from highrank.base.errors import UserError, described
from highrank.model.sharding import is_sharded

T = TypeVar("T")


class DoesNotFit(UserError):
    """An evaluation ran out of memory, and there is no smaller batch."""

    def __init__(self, said: str, batch_size: int):
        smaller = "a smaller eval_batch_size" if batch_size > 1 else "a device with more memory"
        super().__init__(
            f"evaluation: a batch must fit into memory, got {said} with eval_batch_size={batch_size}; use {smaller}, or "
            "train without (eval_before=false eval_test=false protocol.num_validation=0) and evaluate elsewhere"
        )


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_out_of_cpu_memory(error)


def halving(attempt: Callable[[int], T], batch_size: int, model: nn.Module) -> tuple[T, int]:
    """Returns attempt(batch_size), and batch_size: halved until memory suffices.

    Raises:
        DoesNotFit: if it does not for one example; at once with a sharded model, whose other processes would wait.
    """
    while True:
        try:
            return attempt(batch_size), batch_size
        except Exception as error:
            if not out_of_memory(error):
                raise
            if batch_size == 1 or is_sharded(model):
                raise DoesNotFit(described(error), batch_size) from error
        batch_size //= 2
        garbage_collection_cuda()  # now the error, and what its frames held, is gone
