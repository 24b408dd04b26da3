"""What a person sees on the terminal: the plan and the result of a run."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from highrank.base.console import console, say
from highrank.base.files import shown, write_atomic
from highrank.config.run_config import Run
from highrank.data.answers import COUNTS, SECONDARY
from highrank.train.pace import SETTLED, Expected, expected_here, source
from highrank.train.plan import Plan, make_plan
from highrank.train.results import RunDirectory


def show_plan(run: Run, plan: Plan, seconds: Expected | None) -> None:
    """Prints what will be adapted and trained, and how long it will take, where that has been measured."""
    params = plan.params
    table = Table("", "", show_header=False, title=f"{plan.method} on {plan.model}", title_justify="left")
    table.add_row("dtype", plan.dtype)
    table.add_row("adapted weights", ", ".join(f"{part} × {n}" for part, n in plan.matched.items()))
    for note in plan.notes:
        table.add_row("", note)
    if plan.start:
        table.add_row("starts from", started(plan.start))
    table.add_row("trainable", f"{params.trainable:,}")
    table.add_row("total", f"{params.total:,}")
    table.add_row("percent", f"{params.percent:.4f} %")
    table.add_row("frozen extra", f"{params.frozen_extra:,}")
    table.add_row("head", f"{params.head:,}")
    table.add_row("training", f"{plan.num_train:,} examples, {plan.steps:,} steps, about {plan.tokens:,} tokens")
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.memory_bytes.items() if name != "peak")
    table.add_row("memory, estimated", f"{plan.memory_bytes['peak'] / 2**30:.2f} GiB at the peak ({parts})")
    if seconds is not None:
        table.add_row("time, measured", f"{seconds}, {source(seconds.runs, run.core.output)}")
    elif run.core.dry_run:
        table.add_row("time", f"no run like it has finished in {run.core.output}; training tells after {SETTLED} steps")
    console.print(table)
    for warning in plan.warnings:
        say(f"warning: {warning}")


def started(start: Mapping[str, Any]) -> str:
    """Returns in words what a run starts from."""
    if start.get("missing"):
        return f"{shown(start['run'])}, which is not there yet"
    what = "adapter" if start["as"] == "adapter" else "merged weights (start_as=merged)"
    return f"{what} of {start['method']} on {start['task']}, {shown(start['run'])}"


def dry_run(run: Run) -> Path:
    """Prints a run's plan and writes it as plan.json; returns the folder. Loads no weights.

    Raises:
        UserError: for bad input, or a run directory that holds another run.
    """
    plan, directory = make_plan(run, run.make_task()), RunDirectory(run)
    directory.read()  # refuses a folder that holds another run
    seconds = expected_here(run, plan.steps)
    show_plan(run, plan, seconds)
    directory.path.mkdir(parents=True, exist_ok=True)
    content = {**plan.as_dict(), "time_s": asdict(seconds) if seconds else None}
    write_atomic(directory.path / "plan.json", json.dumps(content, indent=1).encode())
    return directory.path


def _shown(metrics: dict[str, Any]) -> str:
    """Returns the headline rule's metrics; results.json has the other rules' and the clean subset's."""
    shown = {k: v for k, v in metrics.items() if k not in (*COUNTS, "perplexity") and not k.endswith(SECONDARY)}
    values = [f"{k} {v:.4f}" if k == "loss" else f"{k} {v:.1f} %" for k, v in shown.items()]
    seen = f", {metrics['leaked']} seen in training" if metrics.get("leaked") else ""
    cut = f", {metrics['cut']} cut to the longest length" if metrics.get("cut") else ""
    lost = f", {metrics['not_finite']} predictions are no number" if metrics.get("not_finite") else ""
    unmeasured = metrics.get("loss_left_out", 0) + metrics.get("loss_cut", 0)
    beyond = f", {unmeasured} gold answers too long for the loss" if unmeasured else ""
    return f"{', '.join(values)} (n = {metrics['n']}{seen}{cut}{lost}{beyond})"


def show_results(plan: Plan, results: dict[str, Any], note: str = "") -> None:
    """Prints the small table at the end of a run."""
    title = f"{plan.method} on {plan.model}: {results['status']}" + (f" ({note})" if note else "")
    table = Table("", "", show_header=False, title=title, title_justify="left")
    params = plan.params
    table.add_row("trainable / total", f"{params.trainable:,} / {params.total:,} ({params.percent:.4f} %)")
    if plan.start:
        table.add_row("started from", started(plan.start))
    for when, label in (("before", "before"), ("final", "after")):
        for name, metrics in results.get("metrics", {}).get(when, {}).get("sets", {}).items():
            table.add_row(f"{name} {label}", _shown(metrics))
        for task, scores in results.get("also", {}).items():
            for name, metrics in scores.get(when, {}).get("sets", {}).items():
                table.add_row(f"{name if name == task else f'{task} {name}'} {label}", _shown(metrics))
    cut_off = results.get("tokens", {}).get("cut_off", {})
    lengths = [f"{n} {key.replace('_', ' ')}" for key, n in cut_off.items() if n]
    if lengths:
        table.add_row("too long to train on whole", ", ".join(lengths))
    if early := results.get("stopped"):
        steps = f"at step {early['step']:,} of {results['steps_planned']:,}"
        table.add_row("stopped early", f"{steps}: {early['told']}")
    times = results.get("time", {})
    if times:
        table.add_row(
            "time", ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {s:.0f} s" for name, s in times.items())
        )
    memory = results.get("memory", {})
    if memory:
        shown = ", ".join(
            f"{k.removesuffix('_bytes').replace('_', ' ')} {v / 2**30:.2f} GiB" for k, v in memory.items()
        )
        table.add_row("memory", shown)
    console.print(table)


def show_next(run: Run, folder: Path) -> None:
    """Prints up to three commands that a finished run can be given to next, as they are typed."""
    place, method = shlex.quote(str(folder)), run.method
    kind = run.model.get("quantize")
    into = kind if method.exact_base(run.method_cfg) else "null"
    base = f" model.quantize={into}" if kind else ""
    commands = [f"tensorboard --logdir {place}", f"highrank eval {place}"]
    if method.mergeable:
        commands.insert(0, f"highrank merge {place} --out {shlex.quote(str(folder / 'merged'))}{base}")
    if method.family.changes_weights:
        commands.insert(0, f"highrank analyze {place}")
    say("try next:")
    for command in commands[:3]:
        say(f"  {command}")
