"""Reads what the folders of runs and sweeps hold, without anything that takes time to import."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from highrank.base.errors import UserError, described


def read_results(folder: Path) -> dict[str, Any]:
    """Returns what results.json in a run directory holds.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
        if not isinstance(results, dict) or not {"status", "config_hash"} <= results.keys():
            raise ValueError("no status and config_hash")
    except (OSError, ValueError) as error:
        raise UserError(f"run: results.json is damaged, got {error} in {folder}; choose another run_dir") from error
    return results


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
        config = yaml.load(text, yaml.CSafeLoader)
        if not isinstance(config, dict) or not isinstance(config.get("method"), dict):
            raise ValueError("no method")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"run: config.yaml is damaged, got {described(error)} in {folder}") from error
    return config


def sweep_cells(part: str, folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns the run directories that a sweep's folder names, there or not yet, with their values on its axes; `part` asks.

    Raises:
        UserError: if sweep.json is missing or damaged.
    """
    try:
        cells = json.loads((folder / "sweep.json").read_text())["cells"]
        return {folder / cell["run"]: dict(cell.get("axes", {})) for cell in cells}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{part}: sweep.json is damaged, got {described(error)} in {folder}") from error
