"""The optimizer over all that trains, and the schedules by name."""

from typing import Any

import torch

from highrank.config.run_config import RunConfig
from highrank.model.adapters import Adapters

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def make_optimizer(adapters: Adapters, core: RunConfig) -> torch.optim.Optimizer:
    """Returns the optimizer over all trainable parameters, in the adapters' groups."""
    settings: dict[str, Any] = {} if core.optimizer == "sgd" else {"betas": tuple(core.betas)}
    groups = adapters.parameter_groups(core.lr, core.weight_decay, core.head_lr)
    return OPTIMIZERS[core.optimizer](groups, **settings)


def warmup_steps(core: RunConfig, steps: int) -> int:
    """Returns the optimizer steps of warm-up in a run of so many."""
    return core.warmup_steps or round(core.warmup_ratio * steps)
