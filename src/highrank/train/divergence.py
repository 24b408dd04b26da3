"""Training that leaves the finite numbers ends at once, before a checkpoint or an adapter holds one that is not."""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from highrank.base.errors import UserError
from highrank.base.processes import highest


class Diverged(UserError):
    """A loss, a gradient or a parameter is no finite number."""

    exit_status = 1


class StopsWhenDiverged(Callback):
    """Looks at the losses and the gradient of every step before it is taken, and at the parameters before they are saved.

    Raises:
        Diverged: in every process, if one of them met a number that is not finite.
    """

    def __init__(self) -> None:
        self.finite: Tensor | bool = True

    def on_before_backward(self, trainer: lightning.Trainer, module: Any, loss: Tensor) -> None:
        self.finite = torch.isfinite(loss.detach()) & self.finite

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module: Any, optimizer: Any) -> None:
        finite, self.finite = bool(self.finite), True
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # a scaler leaves out such steps, and goes on
            finite &= _finite([p.grad for p in module.parameters() if p.grad is not None])
        if highest(int(not finite), trainer.strategy.root_device):
            raise diverged(trainer, "the loss or its gradient")

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        finite = _finite([p.detach() for _, p in module.adapters.named_parameters()])
        if highest(int(not finite), trainer.strategy.root_device):
            raise diverged(trainer, "a trained parameter")


def _finite(tensors: list[Tensor]) -> bool:
    """Whether the tensors, of each its part in this process, have a finite norm."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return not local or bool(torch.nn.utils.get_total_norm(local).isfinite())


def diverged(trainer: lightning.Trainer, what: str) -> Diverged:
    return Diverged(
        f"run: training diverged, got {what} not finite at step {trainer.global_step + 1} of {trainer.max_steps}; use a "
        "smaller lr, a longer warm-up or a smaller max_grad_norm"
    )
