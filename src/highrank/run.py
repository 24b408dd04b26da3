"""A run, from plan to results: read top to bottom."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.seed import isolate_rng

from highrank.analysis.analyze import at_end_of
from highrank.base.allocator import keep_freed_memory
from highrank.base.processes import total
from highrank.config.run_config import Run
from highrank.data.batches import EvalData, TrainingData
from highrank.data.encoding import give_tokens, within
from highrank.data.task import Task, sources_of
from highrank.model.adapters import Adapters
from highrank.model.language import context_length
from highrank.report.dashboard import hyperparameters, scalars, write_run
from highrank.train import devices, shown
from highrank.train.checkpoint import Checkpoints
from highrank.train.devices import quiet
from highrank.train.divergence import Diverged
from highrank.train.early_stopping import stopped
from highrank.train.evaluation import answer, evaluate, validate
from highrank.train.failures import failures_written
from highrank.train.fitting import fit, tell
from highrank.train.forgetting import forgetting
from highrank.train.loggers import finish
from highrank.train.module import FineTuner
from highrank.train.pace import expected_here
from highrank.train.plan import Plan, make_plan, optimizer_steps
from highrank.train.ready import Ready
from highrank.train.results import RunDirectory, peak_memory
from highrank.train.saved import begin
from highrank.train.selection import KeepBest
from highrank.train.stopping import Interrupted, StopOnSignal, requeue
from highrank.train.trainer import check_trainer, make_trainer
from highrank.train.untouched import Untouched


def execute(run: Run, ready: Ready | None = None) -> tuple[Path, int]:
    """Runs, and returns the run directory and the exit status: 0, or 130 after SIGINT, 143 after other SIGNALS.

    `ready` is what the runs of a sweep share and this process has loaded already.

    Raises:
        UserError: for bad input, before any weight loads; if memory or the disk does not suffice.
        Diverged: if a loss or a parameter is not finite.
    """
    keep_freed_memory()
    task = ready.task if ready else run.make_task()
    plan = make_plan(run, task)
    directory = RunDirectory(run)
    earlier = directory.read()
    if earlier.get("status") == "done":
        shown.show_results(plan, earlier, note="finished before; nothing was run again")
        if run.core.analyze and directory.writes and not (directory.path / "analysis" / "statistics.json").is_file():
            directory.write(**{**earlier, "analysis": at_end_of(directory.path)})
    elif earlier.get("status") == "diverged" and run.core.resume != "never":
        raise Diverged(
            f"{earlier.get('error', 'the loss was not finite')}; it did so before, and nothing was run again (resume=never does)"
        )
    else:
        shown.show_plan(run, plan, expected_here(run, plan.steps))
        stop, processes = StopOnSignal(), check_trainer(run)
        try:
            with stop.listening(), quiet(), processes, failures_written(run, directory):
                fine_tune(run, plan, task, directory, earlier, stop, processes, ready)
        except (Interrupted, KeyboardInterrupt, SystemExit):  # Lightning turns a second Ctrl-C into SystemExit
            if stop.received is None:
                raise
            if directory.opened:
                directory.write(status="interrupted", memory=peak_memory())
                shown.show_results(plan, directory.results)
            requeue(stop.received)
            return directory.path, 130 if stop.received == signal.SIGINT else 143
        finally:
            with contextlib.suppress(OSError):
                write_session(directory)
        shown.show_results(plan, directory.results)
    shown.show_next(run, directory.path)
    return directory.path, 0


@dataclass(frozen=True)
class Prepared:
    """A run whose model and data are there: what its stages work with."""

    run: Run
    directory: RunDirectory
    stop: StopOnSignal
    adapters: Adapters
    tokenizer: Any
    data: TrainingData
    tests: EvalData
    others: dict[str, EvalData]
    """Of the tasks of eval_also."""
    module: FineTuner
    untouched: Untouched
    checkpoints: Checkpoints


def fine_tune(
    run: Run,
    plan: Plan,
    task: Task,
    directory: RunDirectory,
    earlier: dict[str, Any],
    stop: StopOnSignal,
    processes: devices.Processes,
    ready: Ready | None,
) -> None:
    """Prepares, evaluates the untrained model, trains, evaluates again; `earlier` is what a try that ended had found."""
    with directory.timing("setup_s"):
        job = prepare(run, plan, task, directory, earlier, stop, ready)
        processes.start(directory.path / "config.yaml")
        trainer = make_trainer(run, directory, stop, job.module.total_steps, len(job.data.buckets), job.checkpoints)
    with reporting(directory, trainer.logger):
        go_on(job, trainer)


def go_on(job: Prepared, trainer: lightning.Trainer) -> None:
    """Does what is left of a run that is prepared."""
    run, directory = job.run, job.directory
    batch_size = run.core.eval_batch_size
    if run.core.eval_before and run.core.eval_test and "metrics" not in directory.results:
        batch_size = evaluate_before(job, trainer, batch_size)
    trainer = train(job, trainer)
    if job.data.validation:
        directory.write(validation=validate(trainer, job.module, job.data))
    if run.core.eval_test:
        evaluate_after(job, trainer, batch_size)
    directory.write(status="done", memory=peak_memory())


def prepare(
    run: Run,
    plan: Plan,
    task: Task,
    directory: RunDirectory,
    earlier: dict[str, Any],
    stop: StopOnSignal,
    ready: Ready | None,
) -> Prepared:
    """Loads the model and the data, opens the run directory, and looks for what training goes on from."""
    core = run.core
    share, eval_share = devices.share_of(run.trainer), devices.evaluation_share_of(run.trainer)
    lightning.seed_everything((core.seed + share.rank) % 2**32, verbose=False)
    backbone, adapters = begin(run, task, ready.base() if ready else None)
    model, sources = {"name": run.model["name"], **vars(backbone.source)}, sources_of(task)
    directory.open(directory.kept(earlier, model, sources))
    lost = {} if backbone.update_lost is None else {"update_lost": backbone.update_lost}
    start = {"start": {**plan.start, **lost}} if plan.start else {}
    directory.write(model=model, params=vars(plan.params), data=sources, **start)
    write_session(directory)
    stop.check()
    tokenizer = backbone.tokenizer
    positions = context_length(backbone.model, tokenizer) - adapters.num_positions
    protocol = within(run.protocol, positions)
    data = TrainingData(
        task,
        protocol,
        tokenizer,
        core.batch_size,
        core.eval_batch_size,
        core.seed,
        share,
        core.accumulate,
        core.packing,
        ready.tokens(backbone, protocol) if ready else None,
    )
    tests = EvalData(task, run.protocol, tokenizer, data.records, eval_share, positions)
    others = {}
    for name, other in run.also.items() if core.eval_test else ():
        second = other.make_task()
        give_tokens(second, other.protocol, tokenizer)
        others[name] = EvalData(second, other.protocol, tokenizer, data.records, eval_share, positions)
    for each in (tests, *others.values()) if core.eval_test else ():
        each.check_lengths()
    checkpoints = Checkpoints(
        directory.path / "checkpoints", core.checkpoint_every, data.buckets, stop, first=core.auto_microbatch
    )
    tell(directory, checkpoints)
    steps, parts = optimizer_steps(run, len(data.examples)), directory.results.get("parts", 1)
    directory.write(steps_planned=steps)
    module = FineTuner(adapters, task, tokenizer, core, steps, run.protocol, eval_share, parts)
    untouched = Untouched(run, model, adapters)
    return Prepared(run, directory, stop, adapters, tokenizer, data, tests, others, module, untouched, checkpoints)


def evaluate_before(job: Prepared, trainer: lightning.Trainer, batch_size: int) -> int:
    """Evaluates the untrained model; returns the batch size that fitted.

    Training draws the same random numbers whether or not this is done.
    """
    directory = job.directory
    with directory.timing("eval_before_s"), isolate_rng():
        metrics, fitting = evaluate(
            trainer,
            job.module,
            job.tests,
            batch_size,
            lambda name, rows: directory.write_predictions(f"{name}.before", rows),
            job.untouched.answer,
        )
        others = evaluate_others(job, trainer, fitting, job.untouched.answer, ".before")
    also = {"also": {name: {"before": found} for name, found in others.items()}} if others else {}
    directory.write(metrics={"before": metrics}, base_reused=job.untouched.reused, **also)
    return fitting


def evaluate_others(
    job: Prepared, trainer: lightning.Trainer, batch_size: int, by: Any = answer, ending: str = ""
) -> dict[str, Any]:
    """Evaluates the model on the tasks of eval_also; returns their metrics by name, predictions in <task>.<set><ending>."""
    found = {}
    for name, tests in job.others.items():
        with job.module.asked(tests.task, tests.protocol):
            found[name], batch_size = evaluate(
                trainer,
                job.module,
                tests,
                batch_size,
                lambda of, rows, name=name: job.directory.write_predictions(f"{name}.{of}{ending}", rows),  # type: ignore[misc]  # a default value binds the loop's
                by,
            )
    return found


def train(job: Prepared, trainer: lightning.Trainer) -> lightning.Trainer:
    """Trains, saves the adapter, and returns the Trainer.

    Raises:
        Interrupted: if a signal ended it.
    """
    directory, data, module = job.directory, job.data, job.module
    trainer = fit(trainer, job.run, directory, module, data, job.checkpoints, job.stop)
    job.adapters.save(directory.path / "adapter")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from afar
    directory.write(
        time={**directory.results["time"], "train_s": job.checkpoints.seconds},
        tokens={
            "train": total(module.num_tokens, module.device),
            "skipped_examples": data.num_skipped,
            "cut_off": dict(data.cut_off),
        },
        steps=trainer.global_step,
        steps_planned=module.total_steps,
        **({"stopped": early} if (early := stopped(trainer)) else {}),
        selected=[{"step": c.step, "loss": c.loss} for c in callbacks if isinstance(c, KeepBest)],
    )
    job.stop.check_all(trainer)
    return trainer


def evaluate_after(job: Prepared, trainer: lightning.Trainer, batch_size: int) -> None:
    """Evaluates the trained model: its test sets, what it forgot, and what changed in its weights, where asked for."""
    directory, core = job.directory, job.run.core
    with directory.timing("eval_final_s"):
        metrics, fitting = evaluate(trainer, job.module, job.tests, batch_size, directory.write_predictions)
        before = directory.results.get("also", {})
        for name, found in evaluate_others(job, trainer, fitting).items():
            task = job.others[name].task
            read = {"data": task.sources()} if task.has_data else {}
            before = {**before, name: {**before.get(name, {}), "final": found, **read}}
        if before:
            directory.write(also=before)
    times = directory.results["time"]
    directory.results["time"] = {**times, "total_s": sum(times.values())}
    if core.general_text is not None and job.adapters.model.can_generate():
        with directory.timing("forgetting_s"):
            lost = forgetting(job.adapters, job.tokenizer, core.general_text, core.eval_batch_size)
        directory.write(forgetting=lost)
    if core.analyze and directory.writes:
        with directory.timing("analyze_s"):
            directory.write(analysis=at_end_of(directory.path, job.adapters if trainer.world_size == 1 else None))
    directory.write(metrics={**directory.results.get("metrics", {}), "final": metrics})


@contextlib.contextmanager
def reporting(directory: RunDirectory, logger: Any) -> Iterator[None]:
    """Gives a logger other than TensorBoard's, whose records `write_session` writes, the run's values, and what came out."""
    if directory.opened and directory.run.core.logger != "tensorboard":
        logger.log_hyperparams(hyperparameters(directory.run.resolved))
    try:
        yield
    finally:
        finish(logger, directory, scalars(directory.results))


def write_session(directory: RunDirectory) -> None:
    """Writes the run's values, status and final metrics for TensorBoard, if this process writes the run."""
    if directory.opened:
        write_run(directory.path)
