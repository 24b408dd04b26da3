"""The Lightning Trainer of a run."""

import math
from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from highrank.base.console import console
from highrank.base.errors import UserError
from highrank.config.run_config import Run
from highrank.train import devices
from highrank.train.checkpoint import CheckpointFiles, Checkpoints
from highrank.train.devices import alone, num_processes, quiet
from highrank.train.divergence import StopsWhenDiverged
from highrank.train.early_stopping import StopsEarly
from highrank.train.effect import EveryAdapterLearns, PacksExactly
from highrank.train.fsdp import Sharded
from highrank.train.lightning_internals import leave_signals_alone
from highrank.train.loggers import make_logger
from highrank.train.progress import progress
from highrank.train.results import RunDirectory
from highrank.train.selection import KeepBest
from highrank.train.stopping import StopOnSignal


def lightning_arguments(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the Trainer arguments as Lightning takes them: `strategy=fsdp` as an object, and without its inference mode,
    in which the gathering of shards over NCCL fails."""
    given = dict(trainer)
    if given.get("strategy") == "fsdp":
        given["inference_mode"] = False
        given["strategy"] = Sharded(
            data_parallel_size=num_processes(trainer),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    return given


def check_trainer(run: Run) -> devices.Processes:
    """Makes a Trainer of the run's arguments and throws it away; returns the processes that it would have.

    Raises:
        UserError: if Lightning refuses them on this machine, or there are more processes than devices.
    """
    arguments = {**lightning_arguments(run.trainer), "logger": False, "enable_checkpointing": False}
    try:
        with quiet():
            trainer = lightning.Trainer(**arguments, enable_model_summary=False)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        given = ", ".join(f"trainer.{key}={value}" for key, value in run.trainer.items())
        raise UserError(f"trainer: {str(error).strip().splitlines()[0]}, got {given}") from error
    devices.check(trainer)
    return devices.Processes(trainer)


def make_trainer(
    run: Run,
    directory: RunDirectory,
    stop: StopOnSignal,
    steps: int,
    num_batches: int,
    checkpoints: Checkpoints | None = None,
) -> lightning.Trainer:
    """Returns the Lightning Trainer of a run: the logger that it asks for, progress, and our checkpoints alone.

    `num_batches` are one epoch's micro-batches, of this process.
    """
    callbacks: list[Callback] = [
        stop,
        *progress(),
        EpochOrder(),
        EveryAdapterLearns(),
        *([PacksExactly()] if run.core.packing else []),
        StopsWhenDiverged(),
        *([checkpoints] if checkpoints else []),
    ]
    start = checkpoints.resume_from.step if checkpoints and checkpoints.resume_from else 0
    validation: dict[str, Any] = {}
    if run.protocol.num_validation:
        interval = min(run.protocol.validate_every, steps) * run.core.accumulate
        validation = {"val_check_interval": interval, "check_val_every_n_epoch": None}
    if run.protocol.selection == "best":
        callbacks.append(KeepBest(directory.path / "checkpoints"))
    if run.core.patience is not None:
        callbacks.append(StopsEarly(run.core.patience, run.core.min_delta))
    trainer = lightning.Trainer(
        **lightning_arguments(run.trainer),
        **validation,
        use_distributed_sampler=False,
        max_steps=steps,
        max_epochs=math.ceil(steps / math.ceil(num_batches / run.core.accumulate)),
        accumulate_grad_batches=run.core.accumulate,
        gradient_clip_val=run.core.max_grad_norm or None,
        logger=make_logger(run, directory, start),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=console.is_interactive,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    trainer.strategy.checkpoint_io = CheckpointFiles()
    leave_signals_alone(trainer)
    return trainer


def make_evaluator(run: Run) -> lightning.Trainer:
    """Returns the Lightning Trainer that evaluates a finished run, on one device."""
    bar = console.is_interactive
    return lightning.Trainer(**alone(run.trainer), logger=False, enable_checkpointing=False, enable_progress_bar=bar)


class EpochOrder(Callback):
    """Gives each epoch its own batch order."""

    def on_train_epoch_start(self, trainer: Any, module: lightning.LightningModule) -> None:
        trainer.train_dataloader.batch_sampler.set_epoch(trainer.current_epoch)
