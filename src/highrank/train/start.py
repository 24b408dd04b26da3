"""Whether a run can start from the one it names, said before any weight loads."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from highrank.base.errors import UserError
from highrank.base.files import sha256, shown
from highrank.base.hub import on_hub
from highrank.base.saved import read_results
from highrank.config.run_config import Run
from highrank.data.task import Task
from highrank.model.adapter_folder import read_card
from highrank.model.whole_model import no_merged_weight
from highrank.train.saved import source_of

SAME_MODEL = ("name", "hub", "revision", "wheel", "shape", "shuffled")
"""What makes two models one; its files are compared when they are read."""
SAME_PLACES = ("placement", "layers", "fused", "architecture", "seed")
"""Core keys that an adapter stands on; its frozen random parts are drawn from the seed."""


def check_start(run: Run, task: Task) -> dict[str, Any] | None:
    """Returns what a run starts from, for its plan and results; None for a run that starts from the plain model.

    Raises:
        UserError: if the run is not there, unfinished or damaged; for another model or kind of task; for an adapter of
            another method, fields, placement or seed; for weights that cannot be merged.
    """
    core = run.core
    if core.start_from is None:
        return None
    if core.dry_run and not on_hub(core.start_from) and not Path(core.start_from).exists():
        return {"run": core.start_from, "as": core.start_as, "missing": True}
    folder, source = source_of(run)
    card = read_card(folder / "adapter")
    weights = folder / "adapter" / "adapter.safetensors"
    if not weights.is_file() or sha256(weights) != card["sha256"]:
        raise UserError(
            f"start_from: the adapter must be whole, got {shown(weights)} missing or damaged; bring it back"
        )
    _same("the model must be the same", {f"model.{k}": (source.model.get(k), run.model.get(k)) for k in SAME_MODEL})
    trained = source.make_task()
    kinds = [
        f"{t.name} ({t.kind}{f', {t.num_labels} labels' if t.kind.startswith('classify') else ''})"
        for t in (trained, task)
    ]
    if (trained.kind, trained.num_labels) != (task.kind, task.num_labels):
        raise UserError(f"start_from: the task must be of the kind trained on, got {kinds[1]} after {kinds[0]}")
    if core.start_as == "adapter":
        _check_adapter(run, source)
    else:
        _check_merged(run, source)
    return {
        "run": core.start_from if on_hub(core.start_from) else str(folder),
        "as": core.start_as,
        "method": source.method.name,
        "task": trained.name,
        "config_hash": read_results(folder)["config_hash"],
        "adapter": card["sha256"],
        "hash": core.start_hash,
    }


def _check_adapter(run: Run, source: Run) -> None:
    merged = "; start_as=merged goes on from its merged weights"
    if source.method is not run.method:
        raise UserError(
            f"start_from: an adapter goes on as its own method, got method={run.method.name} start_as=adapter for a run of "
            f"{source.method.name}{merged}"
        )
    if source.core.start_as == "merged":
        raise UserError(
            "start_from: an adapter goes on from a run on the plain model, got start_as=adapter for one that has itself "
            f"started from merged weights{merged}"
        )
    was, now = asdict(source.method_cfg), asdict(run.method_cfg)
    places = {key: (getattr(source.core, key), getattr(run.core, key)) for key in SAME_PLACES}
    _same("an adapter goes on with what it has", {**{k: (was[k], now[k]) for k in now}, **places}, merged)


def _check_merged(run: Run, source: Run) -> None:
    if not source.method.mergeable:
        raise UserError(
            f"start_from: {str(no_merged_weight(source.method)).removeprefix('merge: ')}, or start_as=adapter"
        )
    for kind in (source.model.get("quantize"), run.model.get("quantize")):
        if kind:
            raise UserError(
                f"start_from: a quantised base cannot hold merged weights, got model.quantize={kind} with start_as=merged; "
                "start_as=adapter goes on from the adapter of the same method"
            )


def _same(rule: str, values: dict[str, tuple[Any, Any]], fix: str = "") -> None:
    if other := [f"{key}={now} instead of {was}" for key, (was, now) in values.items() if was != now]:
        raise UserError(f"start_from: {rule}, got {', '.join(other)}{fix}")
