"""Moves what trains away from its start, where many methods change nothing yet: the same for all tests."""

from typing import Any

import torch


@torch.no_grad()
def move(adapters: Any, size: float, seed: int | None = None) -> None:
    """Adds `size` times normal noise to every parameter of an adapter, of adapters or of a model; with a seed, always the same."""
    if seed is not None:
        torch.manual_seed(seed)
    for _, parameter in adapters.named_parameters():
        parameter.add_(size * torch.randn_like(parameter))
