"""Models whose parameters are sharded over processes (FSDP2): gathers parameters and tensors, and shards tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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


def sharded_like(like: Any, tensor: Tensor) -> Tensor:
    """Returns this process's shard of a whole tensor, if `like` is a shard; else the tensor."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
