"""Which weights a run evaluates: the last, or those with the lowest loss on the held-out training examples."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class KeepBest(Callback):
    """Keeps the trainable weights of the best validation so far, and puts them back when training ends."""

    def __init__(self) -> None:
        self.loss = float("inf")
        self.step: int | None = None
        self._weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        loss = float(trainer.callback_metrics["validation/loss"])
        if loss < self.loss:
            self.loss, self.step = loss, trainer.global_step
            self._weights = {name: tensor.detach().clone() for name, tensor in module.adapters.state_dict().items()}

    def on_fit_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if self._weights:
            module.adapters.load_state_dict(self._weights)
