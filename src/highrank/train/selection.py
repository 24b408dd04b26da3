"""Which weights a run evaluates: the last, or those with the lowest loss on the held-out training examples."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from highrank.train import checkpoint as files


class KeepBest(Callback):
    """Keeps the trainable weights of the best validation so far, and puts them back when training ends.

    In checkpoints they have a file of their own, which is written once per best.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loss = float("inf")
        self.step: int | None = None
        self._weights: dict[str, Tensor] = {}
        self._written: int | None = None

    @property
    def _file(self) -> Path:
        return self._file_of(self.step)

    def _file_of(self, step: int | None) -> Path:
        return self.folder / f"best-{step}.ckpt"

    def _steps(self) -> list[int]:
        return sorted(int(path.stem.partition("-")[2]) for path in self.folder.glob("best-*.ckpt"))

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        loss = float(trainer.callback_metrics["validation/loss"])
        if loss < self.loss:
            self.loss, self.step = loss, trainer.global_step
            self._weights = {name: tensor.detach().clone() for name, tensor in module.adapters.state_dict().items()}

    def on_fit_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if self._weights:
            module.adapters.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.step = state["loss"], state["step"]
        if self.step is not None:
            self._weights = files.read(self._file)
            for step in self._steps():
                if step > self.step:  # of the try that ended: these steps come again
                    self._file_of(step).unlink(missing_ok=True)
            self._written = self.step

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if self.step is None:
            return
        checkpoint["needs"] = [self._file.name]
        if trainer.is_global_zero and self._written != self.step:
            files.write(self._file, self._weights)
            self._written = self.step
            for step in self._steps()[:-3]:  # this checkpoint's and those that the last two may need stay
                self._file_of(step).unlink(missing_ok=True)
