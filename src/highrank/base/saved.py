"""Reads what the folders of runs and sweeps hold, checked against its shape, without anything that takes time to import.

What of a run or sweep has not the shape below is damaged, and said with the file and the place in it: whoever reads on may
count on these keys and types.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from highrank.base.errors import UserError, suggest
from highrank.base.files import run_folders, shown
from highrank.base.shapes import amount, plain, read_json, shaped

STATUSES = frozenset(("running", "done", "interrupted", "failed", "oom", "diverged", "imported"))
"""What a run can be."""
SCORES = {"sets?": {...: {"n": amount, "leaked?": (amount, None), ...: float}}, ...: float}
"""Of one moment: the metrics of each test set, and their means."""
RESULTS = {
    **{
        "status": STATUSES,
        "config_hash": str,
        "error?": str,
        "pace?": str,
        "seed?": int,
        "steps?": amount,
        "steps_planned?": amount,
    },
    **{"time?": {...: amount}, "memory?": {...: amount}, "versions?": {...: str}, "imported?": {...: plain}},
    "params?": {"trainable": amount, "total": amount, "percent": amount, ...: amount},
    "tokens?": {"train?": amount, "cut_off?": {...: amount}},
    "git?": (None, {"commit": str, "dirty?": bool}),
    "protocol?": {"hash": str},
    "model?": {"name": str, "sha": str, "kind": str, "location?": str, "files?": {...: str}},
    "data?": [{"name": str, "rows": amount, "sha256": str}],
    "metrics?": {"before?": SCORES, "final?": SCORES},
    "also?": {...: {"before?": SCORES, "final?": SCORES}},
    "validation?": {"loss": float},
    "forgetting?": {"base_loss": float, "adapted_loss": float},
    "stopped?": {"step?": amount, "told?": str},
    "start?": {...: plain},
}
"""What results.json holds of what is read from it."""
NAMED = {"name?": str, ...: plain}
CONFIG: dict[Any, Any] = {
    **{"method": NAMED, "task?": NAMED, "model?": NAMED, "protocol?": NAMED, "trainer?": {...: plain}},
    **{"given?": {...: str}, "lr?": (float, None), "max_steps?": (int, None), ...: plain},
}
"""What config.yaml holds, or some of its keys."""
AXES = {"seed?": (int, None), ...: plain}
TRIAL = {"lr": float, "loss?": (float, None), "status?": str}
SWEEP = {
    **{"name?": str, "words?": [str], "axes?": {...: [plain]}},
    "cells": [{"run": str, "config_hash?": str, "asked?": str, "axes?": AXES}],
    "lr_search?": (None, {"arms": [{"axes": AXES, "trials?": [TRIAL], "lr?": (float, None)}]}),
}
"""What sweep.json holds."""


class Loader(yaml.CSafeLoader):
    """Reads YAML with 1e-3 as the number that whoever edits a config means."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), None)


def read_results(folder: Path, needed: Collection[str] = ()) -> dict[str, Any]:
    """Returns what results.json in a run directory holds, some keys of which are `needed`.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        results: dict[str, Any] = read_json(folder / "results.json", RESULTS)
        if lacking := [key for key in needed if key not in results]:
            raise ValueError(f"no {', '.join(lacking)}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"run: results.json is damaged, got {error} in {folder}; bring it back, or move the folder away"
        ) from error
    return results


def state_of(folder: Path) -> dict[str, Any]:
    """Returns a run's results; of no run nothing, and of a damaged one its status and what is damaged."""
    if not (folder / "results.json").is_file():
        return {}
    try:
        return read_results(folder)
    except UserError as error:
        return {"status": "damaged", "error": str(error)}


def read_config(folder: Path, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Returns what config.yaml in a run directory holds, as it stands; nothing where there is none yet.

    Of many runs, to parse only some of its top-level `keys` is ten times as fast; `method` must be one.

    Raises:
        UserError: if it is damaged.
    """
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        if keys is not None:
            blocks = re.split(r"^(?=\w)", text, flags=re.MULTILINE)
            text = "".join(block for block in blocks if block.partition(":")[0] in keys)
        config: dict[str, Any] = shaped(yaml.load(text, Loader), CONFIG)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"run: config.yaml is damaged, got {_first_line(error)} in {folder}") from error
    return config


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def sweep_cells(part: str, folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns the run directories that a sweep's folder names, there or not yet, with their values on its axes; `part` asks.

    Raises:
        UserError: if sweep.json is missing or damaged.
    """
    try:
        cells = read_json(folder / "sweep.json", SWEEP)["cells"]
    except (OSError, ValueError) as error:
        raise UserError(f"{part}: sweep.json is damaged, got {error} in {folder}") from error
    return {folder / cell["run"]: cell.get("axes", {}) for cell in cells}


def instead(folder: Path) -> str:
    """Returns in words what a folder is that is no run directory, and where runs are."""
    if folder.is_file():
        return "a file"
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        said = suggest(folder.name, near)
        return f"which is not there{said if 'mean' in said else ''}; highrank runs lists them"
    if (folder / "sweep.json").is_file():
        return f"a sweep; highrank runs {shown(folder)} lists its runs"
    below = [shown(path) for path, _ in zip(run_folders(folder), range(3), strict=False)]
    if below:
        return f"which holds runs: {', '.join(below)}; highrank runs {shown(folder)} lists them"
    if (folder / "plan.json").is_file():
        return "a dry run; give its command without dry_run=true"
    return "which has no results.json"
