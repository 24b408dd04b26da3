"""A run, from plan to results: read top to bottom."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.seed import isolate_rng

from highrank.analysis.analyze import at_end_of
from highrank.base.allocator import keep_freed_memory
from highrank.base.console import say
from highrank.base.errors import UserError, described, refused_by_disk
from highrank.base.processes import total
from highrank.config.run_config import Run
from highrank.data.batches import TaskData
from highrank.model.adapters import Adapters
from highrank.report.dashboard import write_run
from highrank.train import devices, shown
from highrank.train.build import build_model
from highrank.train.checkpoint import Checkpoints
from highrank.train.devices import quiet
from highrank.train.evaluation import evaluate, validate
from highrank.train.forgetting import forgetting
from highrank.train.memory import DoesNotFit, out_of_memory
from highrank.train.module import FineTuner
from highrank.train.plan import Plan, make_plan, optimizer_steps
from highrank.train.results import RunDirectory, peak_memory
from highrank.train.selection import KeepBest
from highrank.train.stopping import Interrupted, StopOnSignal, requeue
from highrank.train.trainer import check_trainer, make_trainer


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
        shown.show_results(plan, directory.results, note="finished before; nothing was run again")
        if run.core.analyze and directory.writes and not (directory.path / "analysis" / "statistics.json").is_file():
            analyze(directory)
        shown.show_next(run, directory.path)
        return directory.path, 0
    shown.show_plan(plan)
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
            shown.show_results(plan, directory.results)
        requeue(stop.received)
        return directory.path, 130 if stop.received == signal.SIGINT else 143
    finally:
        with contextlib.suppress(OSError):
            write_session(directory)
    shown.show_results(plan, directory.results)
    shown.show_next(run, directory.path)
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
            "train": total(module.num_tokens, module.device),
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
        say(checkpoints.found.told)


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
    directory.write(analysis=at_end_of(directory.path, adapters))


def write_session(directory: RunDirectory) -> None:
    """Writes the run's values, status and final metrics for TensorBoard, if this process writes the run."""
    if directory.opened:
        write_run(directory.path)
