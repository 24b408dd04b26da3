"""A run, from plan to results: read top to bottom."""

import contextlib
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.seed import isolate_rng

from highrank import devices, report
from highrank.adapters import Adapters, attach
from highrank.allocator import keep_freed_memory
from highrank.backbones import Backbone, head_modules, load_backbone
from highrank.checkpoint import CheckpointFiles, Checkpoints
from highrank.config import Run
from highrank.data import TaskData
from highrank.errors import UserError, described, refused_by_disk
from highrank.forgetting import forgetting
from highrank.lightning_internals import leave_signals_alone
from highrank.memory import DoesNotFit, out_of_memory
from highrank.module import FineTuner
from highrank.plan import Plan, adapted_views, make_plan, optimizer_steps
from highrank.results import RunDirectory, peak_memory
from highrank.scoring import evaluate_rows, macro_average
from highrank.selection import KeepBest
from highrank.signals import Interrupted, StopOnSignal, requeue
from highrank.task import Task


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
    """Returns the model's output per record, in the records' order.

    What memory does not suffice for, in any process, comes again in batches of half the size.

    Raises:
        DoesNotFit: if one record is too much.
    """
    outputs: list[Any] = [None] * len(records)
    while left := [place for place, output in enumerate(outputs) if output is None]:
        module.lacking = None
        batches: Any = trainer.predict(module, data.eval_dataloader(records, left)) or []
        for place, output in devices.gather([pair for batch in batches for pair in batch]):
            if outputs[place] is None:  # a process without a batch of its own repeated the first
                outputs[place] = output
        if lacking := [said for said in devices.gather([module.lacking]) if said]:
            if data.test_batch_size == 1:
                raise DoesNotFit(lacking[0], 1)
            data.test_batch_size //= 2
            garbage_collection_cuda()
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
    """Runs, and returns the run directory and the exit status: 0, or 130 after SIGINT, 143 after other SIGNALS.

    Raises:
        UserError: for bad input, before any weight loads; if memory or the disk does not suffice.
    """
    keep_freed_memory()
    plan = make_plan(run)
    directory = RunDirectory(run)
    if not directory.writes:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, of several processes one speaks, to the end
    if directory.finished:
        report.show_results(plan, directory.results, note="finished before; nothing was run again")
        if run.core.analyze and directory.writes and not (directory.path / "analysis" / "statistics.json").is_file():
            analyze(directory)
        return directory.path, 0
    report.show_plan(plan)
    processes = check_trainer(run)
    stop = StopOnSignal()
    try:
        with stop.listening(), quiet(), processes, failures_written(run, directory):
            _run(run, plan, directory, stop, processes)
    except (Interrupted, KeyboardInterrupt, SystemExit):  # Lightning turns a second Ctrl-C into SystemExit
        if stop.received is None:
            raise
        if directory.opened:
            directory.write(status="interrupted", memory=peak_memory())
            report.show_results(plan, directory.results)
        requeue(stop.received)
        return directory.path, 130 if stop.received == signal.SIGINT else 143
    finally:
        with contextlib.suppress(OSError):
            write_session(directory)
    report.show_results(plan, directory.results)
    return directory.path, 0


@contextmanager
def failures_written(run: Run, directory: RunDirectory) -> Iterator[None]:
    """Writes down what ends the run within it, before other processes can learn of it.

    Raises:
        UserError: if memory ran out or the disk refused, with what to do.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        memory = out_of_memory(error)
        parts = 2 * directory.results.get("parts", 1)
        again = memory and run.core.auto_microbatch and parts <= run.core.batch_size
        status = "oom" if memory or isinstance(error, DoesNotFit) else "failed"
        with contextlib.suppress(OSError, UserError):
            directory.fail(status, f"{type(error).__name__}: {error}", **({"parts": parts} if again else {}))
        if refused_by_disk(error):
            raise UserError(
                f"run: its files must be writable, got {described(error)}; make room, then give the same command again: "
                "it goes on from the last checkpoint"
            ) from error
        if memory:
            advice = (
                "halve batch_size and double accumulate, or set checkpoint_activations=true or auto_microbatch=true"
            )
            if again:
                advice = f"give the same command again: a batch is then computed in {parts} parts"
            raise UserError(
                f"run: a step must fit into memory, got {described(error)} with batch_size={run.core.batch_size}; {advice}"
            ) from error
        if status == "failed" and directory.opened and directory.results["status"] == "oom":
            raise UserError(
                f"run: another of its processes ran out of memory, got {directory.results['error']}"
            ) from error
        raise


def check_trainer(run: Run) -> devices.Processes:
    """Makes a Trainer of the run's arguments and throws it away; returns the processes that it would have.

    Raises:
        UserError: if Lightning refuses them on this machine, or there are more processes than devices.
    """
    arguments = {**devices.arguments(run.trainer), "logger": False, "enable_checkpointing": False}
    try:
        with quiet():
            trainer = lightning.Trainer(**arguments, enable_model_summary=False)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        given = ", ".join(f"trainer.{key}={value}" for key, value in run.trainer.items())
        raise UserError(f"trainer: {str(error).strip().splitlines()[0]}, got {given}") from error
    devices.check(trainer)
    return devices.Processes(trainer)


def _run(run: Run, plan: Plan, directory: RunDirectory, stop: StopOnSignal, processes: devices.Processes) -> None:
    core = run.core
    started = time.perf_counter()
    task = run.task(run.task_cfg, core.seed)
    share, eval_share = devices.share_of(run.trainer), devices.evaluation_share_of(run.trainer)
    lightning.seed_everything((core.seed + share.rank) % 2**32, verbose=False)
    backbone, adapters = build_model(run, task)
    model, sources = {"name": run.model["name"], **vars(backbone.source)}, task.sources()
    earlier = directory.earlier(model, sources)
    directory.open(earlier)
    directory.write(model=model, params=vars(plan.params), data=sources)
    write_session(directory)
    stop.check()
    batch_sizes = core.batch_size, core.eval_batch_size
    data = TaskData(task, run.protocol, backbone.tokenizer, *batch_sizes, core.seed, share, eval_share)
    checkpoints = Checkpoints(
        directory.path / "checkpoints", core.checkpoint_every, data.buckets, stop, first=core.auto_microbatch
    )
    told(directory, checkpoints)
    processes.start(directory.path / "config.yaml")
    steps = optimizer_steps(run, len(data.examples))
    module = FineTuner(adapters, task, backbone.tokenizer, core, steps, run.protocol, eval_share)
    module.parts = earlier.get("parts", 1)
    epochs = math.ceil(steps / math.ceil(len(data.buckets) / core.accumulate))
    trainer = make_trainer(run, directory, stop, steps, epochs, checkpoints)
    times = {"setup_s": time.perf_counter() - started}

    found: dict[str, Any] = earlier.get("metrics", {})
    if found:
        times["eval_before_s"] = earlier["time"]["eval_before_s"]
    elif core.eval_before and core.eval_test:
        at = time.perf_counter()
        module.eval()
        with isolate_rng():  # training draws the same numbers whether or not this was done in an earlier try
            found["before"] = evaluate(
                trainer, module, data, lambda n, r: directory.write_predictions(f"{n}.before", r)
            )
        times["eval_before_s"] = time.perf_counter() - at
        directory.write(metrics=found, time=times)

    while not fit(trainer, module, data, checkpoints):
        directory.write(parts=module.parts)
        checkpoints.find()
        told(directory, checkpoints)
        trainer = make_trainer(run, directory, stop, steps, epochs, checkpoints)
        garbage_collection_cuda()
    times["train_s"] = checkpoints.seconds
    adapters.save(directory.path / "adapter")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    directory.write(
        time=times,
        tokens={
            "train": devices.total(module.num_tokens, module.device),
            "skipped_examples": data.num_skipped,
            "cut_off": dict(data.cut_off),
        },
        steps=trainer.global_step,
        steps_planned=steps,
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
    times["total_s"] = sum(times.values())
    if core.general_text is not None and task.kind == "generate":
        directory.write(forgetting=forgetting(adapters, backbone.tokenizer, core.general_text, core.eval_batch_size))
    if core.analyze and directory.writes:
        at = time.perf_counter()
        analyze(directory, adapters if trainer.world_size == 1 else None)
        times["analyze_s"] = time.perf_counter() - at
    directory.write(status="done", metrics=found, time=times, memory=peak_memory())


def told(directory: RunDirectory, checkpoints: Checkpoints) -> None:
    """Says, and writes down, which checkpoint training goes on from."""
    if checkpoints.found:
        directory.write(resumed=[*directory.results.get("resumed", []), checkpoints.found.told])
        report.console.print(checkpoints.found.told, markup=False, highlight=False)


def fit(trainer: lightning.Trainer, module: FineTuner, data: TaskData, checkpoints: Checkpoints) -> bool:
    """Trains to the end or a signal; False with auto_microbatch where memory ran out: `module` takes smaller parts."""
    module.train()
    try:
        trainer.fit(
            module,
            train_dataloaders=data.train_dataloader(),
            val_dataloaders=data.val_dataloader() if data.validation else None,
            ckpt_path=checkpoints.found and checkpoints.found.path,
            weights_only=True,
        )
    except Interrupted:  # saved; the caller looks for the signal
        return True
    except Exception as error:
        alone = module.core.auto_microbatch and trainer.world_size == 1
        if not (alone and out_of_memory(error) and 2 * module.parts <= module.core.batch_size):
            raise
        module.parts *= 2
        return False
    return True


def analyze(directory: RunDirectory, adapters: Adapters | None = None) -> None:
    """Analyses what training changed; its mean statistics, or why there are none, go into results.json."""
    from highrank.analysis.analyze import at_end_of

    directory.write(analysis=at_end_of(directory.path, adapters))


def make_trainer(
    run: Run,
    directory: RunDirectory,
    stop: StopOnSignal,
    steps: int,
    epochs: int,
    checkpoints: Checkpoints | None = None,
) -> lightning.Trainer:
    """Returns the Lightning Trainer of a run: TensorBoard events, progress bars, and our checkpoints alone."""
    callbacks: list[Callback] = [stop, RichProgressBar(), EpochOrder(), *([checkpoints] if checkpoints else [])]
    start = checkpoints.found.step if checkpoints and checkpoints.found else 0
    validation: dict[str, Any] = {}
    if run.protocol.num_validation:
        interval = min(run.protocol.validate_every, steps) * run.core.accumulate
        validation = {"val_check_interval": interval, "check_val_every_n_epoch": None}
    if run.protocol.selection == "best":
        callbacks.append(KeepBest(directory.path / "checkpoints"))
    trainer = lightning.Trainer(
        **devices.arguments(run.trainer),
        **validation,
        use_distributed_sampler=False,
        max_steps=steps,
        max_epochs=epochs,
        accumulate_grad_batches=run.core.accumulate,
        gradient_clip_val=run.core.max_grad_norm or None,
        logger=TensorBoardLogger(directory.path, name="", version="", default_hp_metric=False, purge_step=start),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    trainer.strategy.checkpoint_io = CheckpointFiles()
    leave_signals_alone(trainer)
    return trainer


class EpochOrder(Callback):
    """Gives each epoch its own batch order."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        trainer.train_dataloader.batch_sampler.set_epoch(trainer.current_epoch)  # type: ignore[union-attr]


def write_session(directory: RunDirectory) -> None:
    """Writes the run's values, status and final metrics for TensorBoard, if this process writes the run."""
    from highrank.lab.dashboard import write_run

    if directory.opened:
        write_run(directory.path)


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
        warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # its sampler is
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
