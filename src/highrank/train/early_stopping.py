"""Training that ends before its last step: the held-out loss falls no further, or its time is up."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from highrank.base.console import say


class StopsEarly(EarlyStopping):
    """Lightning's, on the loss of the held-out examples; a run that it has ended stays ended when it is resumed."""

    def __init__(self, patience: int, min_delta: float):
        super().__init__("validation/loss", min_delta, patience)

    @property
    def told(self) -> str:
        """Why training stopped."""
        if self.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
            return "the held-out loss is not finite"
        least = f" less {-self.min_delta:g}" if self.min_delta else ""
        return f"in {self.wait_count} validations the held-out loss was not below {float(self.best_score):.4g}{least}"

    def on_train_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        trainer.should_stop |= self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED

    def on_validation_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        before = trainer.should_stop
        super().on_validation_end(trainer, *args)
        if trainer.should_stop and not before:
            say(f"step {trainer.global_step}/{trainer.max_steps}: training stops, for {self.told}")


def stopped(trainer: lightning.Trainer) -> dict[str, Any]:
    """Returns what ended training before its last step and at which, for results.json; {} if nothing did."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from afar
    for callback in callbacks if trainer.global_step < trainer.max_steps else ():
        if isinstance(callback, StopsEarly) and callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            return {"reason": callback.stopping_reason.name.lower(), "step": trainer.global_step, "told": callback.told}
        if isinstance(callback, Timer) and callback.time_remaining() == 0:
            return {"reason": "max_time", "step": trainer.global_step, "told": "trainer.max_time was over"}
    return {}
