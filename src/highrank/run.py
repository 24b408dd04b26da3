"""A run, from plan to results: read top to bottom."""

import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from highrank import report
from highrank.adapters import Adapters, attach
from highrank.allocator import keep_freed_memory
from highrank.backbones import Backbone, head_modules, load_backbone
from highrank.config import Run
from highrank.data import TaskData
from highrank.errors import UserError
from highrank.forgetting import forgetting
from highrank.module import FineTuner
from highrank.plan import Plan, adapted_views, make_plan, optimizer_steps
from highrank.results import RunDirectory, peak_memory
from highrank.scoring import evaluate_rows, macro_average
from highrank.selection import KeepBest
from highrank.task import Task


class Interrupted(Exception):
    """Raised at a batch boundary after a signal asked the run to stop."""


class StopOnSignal(Callback):
    """Turns SIGINT and SIGTERM into a clean stop at the next batch boundary; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.received is not None:
            raise Interrupted(signal.Signals(self.received).name)

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if self.received is not None:
            trainer.should_stop = True

    def on_train_start(self, *args: Any) -> None:
        self._take_back()

    def on_predict_start(self, *args: Any) -> None:
        self._take_back()

    def _take_back(self) -> None:
        """Lightning puts its own handler of SIGTERM in at every start, which would end the process without saving."""
        if signal.getsignal(signal.SIGTERM) is not self._note:
            signal.signal(signal.SIGTERM, self._note)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.check()


def build_model(run: Run, task: Task) -> tuple[Backbone, Adapters]:
    """Loads the backbone and attaches the run's adapters to it."""
    core = run.core
    backbone = load_backbone(run.model, core.path, task.kind, task.num_labels, core.seed)
    views = adapted_views(run, backbone.model)
    heads = head_modules(backbone.model) if task.kind != "generate" else []
    return backbone, attach(
        backbone.model, views, run.method, run.method_cfg, core.seed, heads, tokenizer=backbone.tokenizer
    )


def predict(trainer: lightning.Trainer, module: FineTuner, data: TaskData, records: Any) -> list[Any]:
    """Returns the model's output per record, in the records' order."""
    outputs: list[Any] = [None] * len(records)
    for batch in trainer.predict(module, data.eval_dataloader(records)) or []:
        for place, output in batch:
            outputs[place] = output
    return outputs


def evaluate(
    trainer: lightning.Trainer, module: FineTuner, data: TaskData, save: Callable[..., None]
) -> dict[str, Any]:
    """Evaluates every test set; returns metrics per set and their macro average, and saves the predictions."""
    by_set = {}
    for name, records in data.task.test().items():
        rows, by_set[name] = evaluate_rows(data, name, records, predict(trainer, module, data, records))
        save(name, rows)
    return {"sets": by_set, data.task.metric: macro_average(data.task, by_set)}


def validate(trainer: lightning.Trainer, module: FineTuner, data: TaskData) -> dict[str, float]:
    """Returns the mean loss over the held-out training examples, in nats for texts and classes, and their number."""
    (found,) = trainer.validate(module, data.val_dataloader(), verbose=False)
    return {"loss": found["validation/loss"], "n": len(data.validation)}


def execute(run: Run) -> tuple[Path, int]:
    """Runs, and returns the run directory and the exit status: 0, or 128 + the signal that interrupted the run.

    Raises:
        UserError: for bad input, before any weight loads.
    """
    keep_freed_memory()
    plan = make_plan(run)
    directory = RunDirectory(run)
    if directory.finished:
        report.show_results(plan, directory.results, note="finished before; nothing was run again")
        return directory.path, 0
    report.show_plan(plan)
    check_trainer(run)
    stop = StopOnSignal()
    try:
        with stop.listening(), quiet():
            _run(run, plan, directory, stop)
    except (Interrupted, KeyboardInterrupt, SystemExit):  # Lightning turns a second Ctrl-C into SystemExit
        if stop.received is None:
            raise
        if directory.opened:
            directory.write(status="interrupted", memory=peak_memory())
            report.show_results(plan, directory.results)
        return directory.path, 128 + stop.received
    except Exception as error:
        if directory.opened:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            directory.write(status="oom" if out_of_memory else "failed", error=f"{type(error).__name__}: {error}")
        raise
    report.show_results(plan, directory.results)
    return directory.path, 0


def check_trainer(run: Run) -> None:
    """Makes a Trainer of the run's arguments and throws it away.

    Raises:
        UserError: if Lightning refuses them on this machine.
    """
    try:
        with quiet():
            lightning.Trainer(**run.trainer, logger=False, enable_checkpointing=False, enable_model_summary=False)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        given = ", ".join(f"trainer.{key}={value}" for key, value in run.trainer.items())
        raise UserError(f"trainer: {str(error).strip().splitlines()[0]}, got {given}") from error


def _run(run: Run, plan: Plan, directory: RunDirectory, stop: StopOnSignal) -> None:
    core = run.core
    started = time.perf_counter()
    task = run.task(run.task_cfg, core.seed)
    lightning.seed_everything(core.seed, verbose=False)
    backbone, adapters = build_model(run, task)
    directory.open()
    directory.write(
        model={"name": run.model["name"], **vars(backbone.source)},
        params=vars(plan.params),
        data=task.sources(),
    )
    stop.check()
    data = TaskData(task, run.protocol, backbone.tokenizer, core.batch_size, core.eval_batch_size, core.seed)
    steps = optimizer_steps(run, len(data.examples))
    module = FineTuner(adapters, task, backbone.tokenizer, core, steps, run.protocol)
    per_epoch = math.ceil(len(data.buckets) / core.accumulate)
    trainer = make_trainer(run, directory, stop, steps, math.ceil(steps / per_epoch))
    times = {"setup_s": time.perf_counter() - started}

    found: dict[str, Any] = {}
    if core.eval_before and core.eval_test:
        at = time.perf_counter()
        module.eval()
        found["before"] = evaluate(trainer, module, data, lambda n, r: directory.write_predictions(f"{n}.before", r))
        times["eval_before_s"] = time.perf_counter() - at
        directory.write(metrics=found)

    at = time.perf_counter()
    module.train()
    trainer.fit(
        module,
        train_dataloaders=data.train_dataloader(),
        val_dataloaders=data.val_dataloader() if data.validation else None,
    )
    times["train_s"] = time.perf_counter() - at
    adapters.save(directory.path / "adapter")
    trainer.save_checkpoint(directory.path / "checkpoints" / "last.ckpt")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    directory.write(
        time=times,
        tokens={"train": module.num_tokens, "skipped_examples": data.num_skipped, "cut_off": dict(data.cut_off)},
        steps=trainer.global_step,
        selected=[{"step": c.step, "loss": c.loss} for c in callbacks if isinstance(c, KeepBest)],
    )
    stop.check()
    if data.validation:
        directory.write(validation=validate(trainer, module, data))
    if not core.eval_test:
        directory.write(status="done", time=times, memory=peak_memory())
        return

    at = time.perf_counter()
    module.eval()
    found["final"] = evaluate(trainer, module, data, directory.write_predictions)
    times["eval_final_s"] = time.perf_counter() - at
    times["total_s"] = time.perf_counter() - started
    if core.general_text is not None and task.kind == "generate":
        directory.write(forgetting=forgetting(adapters, backbone.tokenizer, core.general_text, core.eval_batch_size))
    directory.write(status="done", metrics=found, time=times, memory=peak_memory())
    log_final(trainer, found["final"])


def make_trainer(run: Run, directory: RunDirectory, stop: StopOnSignal, steps: int, epochs: int) -> lightning.Trainer:
    """Returns the Lightning Trainer of a run: TensorBoard events and progress bars, no automatic checkpoints."""
    callbacks: list[Callback] = [stop, RichProgressBar(), EpochOrder()]
    validation: dict[str, Any] = {}
    if run.protocol.num_validation:
        interval = min(run.protocol.validate_every, steps) * run.core.accumulate
        validation = {"val_check_interval": interval, "check_val_every_n_epoch": None}
    if run.protocol.selection == "best":
        callbacks.append(KeepBest())
    return lightning.Trainer(
        **run.trainer,
        **validation,
        max_steps=steps,
        max_epochs=epochs,
        accumulate_grad_batches=run.core.accumulate,
        gradient_clip_val=run.core.max_grad_norm or None,
        logger=TensorBoardLogger(directory.path, name="", version="", default_hp_metric=False),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )


class EpochOrder(Callback):
    """Gives each epoch its own batch order."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        trainer.train_dataloader.batch_sampler.set_epoch(trainer.current_epoch)  # type: ignore[union-attr]


def log_final(trainer: lightning.Trainer, final: dict[str, Any]) -> None:
    """Writes the final metrics as TensorBoard scalars under final/."""
    logger: Any = trainer.logger
    for name, found in final["sets"].items():
        logger.log_metrics({f"final/{name}/{k}": v for k, v in found.items()}, trainer.global_step)
    logger.finalize("success")


@contextmanager
def quiet() -> Iterator[None]:
    """Hides Lightning's tips about workers and hardware, which change no number; leaves other warnings alone."""
    loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
