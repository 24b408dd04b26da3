"""Run directories as they are found: read fast, whatever state they are in."""

import functools
import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from highrank.base import registry
from highrank.base.console import duration
from highrank.base.errors import UserError
from highrank.base.files import shown
from highrank.base.saved import instead, read_config, read_results
from highrank.base.source import Field, Source
from highrank.config.run_config import LATER, as_given, flat

QUIET_S = 600
"""After how many seconds without a written file a run that says it is running is told of."""


@dataclass(frozen=True)
class Found:
    """One run directory, perhaps unfinished or damaged."""

    path: Path
    results: Mapping[str, Any]
    config: Mapping[str, Any]
    """The values by the keys of the command line; empty where there is no config.yaml yet."""
    problem: str = ""
    """What is damaged."""

    @property
    def status(self) -> str:
        return "damaged" if self.problem else str(self.results["status"])

    @property
    def score(self) -> tuple[str, float] | None:
        """The headline metric of the trained model; of a run without test sets, the loss on held-out training examples."""
        final = self.results.get("metrics", {}).get("final", {})
        headline = next(((key, value) for key, value in final.items() if key != "sets"), None)
        held_out = self.results.get("validation", {}).get("loss")
        return headline or (("validation loss", held_out) if held_out is not None else None)

    @property
    def seconds(self) -> float:
        """How long it took, or what of it has been written down."""
        times = self.results.get("time", {})
        return float(times.get("total_s", sum(times.values())))

    def value(self, key: str) -> Any:
        """Returns what the run has for a key of the command line, or `status`; KeyError where it has no such key."""
        if key == "status":
            return self.status
        if key in self.config or key in LATER:
            return self.config.get(key, LATER.get(key))
        field = _fields(str(self.config.get("method"))).get(key)
        if field is None or field.default is None:
            raise KeyError(key)
        return field.default  # younger than the run, which was as it is without


@functools.cache
def _fields(method: str) -> dict[str, Field]:
    modules = registry.available("methods")
    if method not in modules:
        return {}
    source = Source(modules[method])
    return {field.name: field for field in source.fields(source.config)}


def read(folder: Path, keys: Collection[str] | None = None) -> Found:
    """Returns the run in a folder with a results.json, with some top-level keys of its config, or all."""
    try:
        results = read_results(folder)
        return Found(folder, results, flat(as_given(read_config(folder, keys))))
    except UserError as error:
        return Found(folder, {}, {}, str(error))


def one_run(command: str, folder: Path) -> Found:
    """Returns the run in a folder, which may still be going.

    Raises:
        UserError: if the folder holds no run (naming what it holds instead) or a damaged one.
    """
    if not (folder / "results.json").is_file():
        raise UserError(f"{command}: a run directory is needed, got {shown(folder)}, {instead(folder)}")
    found = read(folder)
    if found.problem:
        raise UserError(found.problem)
    return found


def weigh(folder: Path) -> tuple[int, float]:
    """Returns the bytes of a folder's files, and when the last of them was written."""
    size, newest = 0, 0.0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            inner, written = 0, 0.0
            if entry.is_dir(follow_symlinks=False):
                inner, written = weigh(Path(entry.path))
            else:
                with suppress(OSError):  # of a run at work, which renames and removes
                    stat = entry.stat(follow_symlinks=False)
                    inner, written = stat.st_size, stat.st_mtime
            size, newest = size + inner, max(newest, written)
    return size, newest


def score_text(score: tuple[str, float] | None) -> str:
    """Returns a metric with its name: losses with four digits, what is in percent with one."""
    return f"{score[0]} {number(*score)}" if score else ""


def number(name: str, value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "" if value is None else str(value)
    if "loss" in name or "perplexity" in name:
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"


def since(moment: float) -> str:
    """Returns how long ago something was, in its largest units."""
    seconds = max(time.time() - moment, 0)
    return f"{seconds / 86400:.0f} days" if seconds >= 2 * 86400 else duration(seconds)
