"""What we use of PyTorch beyond its documented calls; tests/model/test_internals.py names the hook that moved."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map as tree_map


def has_bf16_tiles() -> bool:
    """Returns whether this CPU multiplies bf16 matrices in tiles of its own (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def version_of(tensor: Tensor) -> int:
    """Returns how many times a tensor was written to in place."""
    return tensor._version


def tensor_without_storage(cls: type, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """Returns an instance of a tensor subclass that has a shape, a dtype and a device, and no entries."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def as_plain_tensors() -> AbstractContextManager[Any]:
    """Within it functions do not ask a tensor subclass for its own form of them."""
    return torch._C.DisableTorchFunctionSubclass()


def hook_once(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Registers a forward pre-hook, unless it is there already."""
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook)


def leave_out_of_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Lets DDP neither send nor compare these parameters and buffers."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))
