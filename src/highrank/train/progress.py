"""How far a run is: Lightning's bar on a terminal, plain lines in a log, and on both how long training will take."""

import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, RichProgressBar

from highrank.base.console import console, duration, say
from highrank.train.pace import SETTLED


def progress() -> list[Callback]:
    """Returns the callbacks that show how far a run is."""
    return [RichProgressBar(refresh_rate=4), Progress(lines=False)] if console.is_interactive else [Progress()]


class Progress(Callback):
    """Prints the steps `shown`, a test set by quarters, and from ten steps on the time that is left.

    With `lines=False`, beside a bar, that time alone, once.
    """

    def __init__(self, lines: bool = True):
        self.lines = lines
        self.seen = self.done = 0

    def on_train_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.first = self.seen = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        step, steps = trainer.global_step, trainer.max_steps
        if step == self.seen:  # one of several batches that a step accumulates
            return
        self.seen, done = step, step - self.first
        if done == 1:
            self.started = time.perf_counter()  # the first step is slower than the others
        if not (shown(done, steps) if self.lines else done == SETTLED):
            return
        said = f"step {step}/{steps}: loss {float(trainer.callback_metrics['train/loss']):.4g}"
        if done >= SETTLED and step < steps:
            each = (time.perf_counter() - self.started) / (done - 1)
            said += f", about {duration(each * (steps - step))} left"
        say(said)

    def on_predict_start(self, *args: Any) -> None:
        self.done = 0

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        dataset = trainer.predict_dataloaders.dataset
        of = len(dataset)
        before, self.done = self.done, self.done + len(batch["index"])
        if self.lines and 4 * self.done // of > 4 * before // of:
            say(f"{dataset.name}: {self.done} of {of} evaluated")


def shown(done: int, steps: int) -> bool:
    """Whether a line tells of this step: the first, the tenth, and from there every tenth of all steps, at the latest every 100th."""
    return done in (1, SETTLED) or (done > SETTLED and done % min(max(steps // 10, 1), 100) == 0)
