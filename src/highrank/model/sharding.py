"""Models whose parameters are shared out over the processes (FSDP2), and tensors of them made whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from highrank.model.method import Method
from highrank.model.transformers_internals import block_names


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
