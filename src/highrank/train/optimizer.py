"""The optimizer over all that trains, and the schedules by name."""

from typing import Any

import torch
from torch import nn

from highrank.config.run_config import RunConfig
from highrank.model.adapters import Adapters

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def make_optimizer(adapters: Adapters, core: RunConfig) -> torch.optim.Optimizer:
    """Returns the optimizer over all trainable parameters, in groups: with weight decay and without, adapter and head.

    Decay pulls towards 0, so it spares what a method names in `no_decay` (HyperAdapt's a and b, whose neutral value is
    1) and, outside the adapters, biases and norms. Heads are a group of their own where core.head_lr is given, and so are
    parameters whose rate a method multiplies by one of its `lr_factors` (LoRA+'s B).
    """
    told = {
        id(p): (name in adapter.no_decay, adapter.lr_factors.get(name, 1.0))
        for adapter in adapters.by_view.values()
        for name, p in adapter.named_parameters()
    }
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in adapters.named_parameters():
        spared, factor = told.get(id(parameter), (parameter.dim() <= 1, 1.0))
        in_head = core.head_lr is not None and name in adapters.heads
        groups.setdefault((in_head, spared, factor), []).append(parameter)
    rate: Any = core.lr
    settings: dict[str, Any] = {} if core.optimizer == "sgd" else {"betas": tuple(core.betas)}
    return OPTIMIZERS[core.optimizer](
        [
            {
                "params": groups[in_head, spared, factor],
                "lr": core.head_lr if in_head else factor * rate,
                "weight_decay": 0.0 if spared else core.weight_decay,
            }
            for in_head, spared, factor in sorted(groups)
        ],
        **settings,
    )


def warmup_steps(core: RunConfig, steps: int) -> int:
    """Returns the optimizer steps of warm-up in a run of so many."""
    return core.warmup_steps or round(core.warmup_ratio * steps)
