"""`highrank runs [FOLDER] [--where key=value]`: the runs in a folder, one line each."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from highrank.base.console import console, duration, megabytes, say
from highrank.base.errors import UserError, suggest
from highrank.base.files import run_folders, shown
from highrank.base.options import Words
from highrank.config.run_config import LATER
from highrank.find.reading import Found, read, score_text, since, weigh
from highrank.find.table import show

COLORS = {"done": "green", "running": "cyan", "interrupted": "yellow"}
SORTS: dict[str, Callable[[Found, int, float], Any]] = {
    "age": lambda run, size, written: written,
    "status": lambda run, size, written: run.status,
    "method": lambda run, size, written: str(run.config.get("method", "")),
    "score": lambda run, size, written: run.score[1] if run.score else float("-inf"),
    "time": lambda run, size, written: run.seconds,
    "size": lambda run, size, written: size,
}
"""By what the lines can be ordered, the greatest last: nearest to the prompt."""
MOST_VALUES = 10
"""How many of a key's values are named where none is the one that was asked for."""


def command(words: list[str]) -> int:
    parser = Words("runs", "[FOLDER] [--where KEY=VALUE]... [--sort age|status|method|score|time|size]")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"))
    parser.add_argument("--where", action="append", default=[])
    parser.add_argument("--sort", choices=list(SORTS), default="age")
    options = parser.parse_args(words)
    for condition in options.where:
        if not condition.partition("=")[0] or "=" not in condition:
            parser.error(f"--where takes key=value, got --where {condition}")
    folder: Path = options.folder
    if not folder.is_dir():
        what = "a file" if folder.exists() else "which is not there"
        raise UserError(f"runs: a folder is needed, got {folder}, {what}; name the output folder of your runs")
    conditions = [word.split("=", 1) for word in options.where]
    needed = {"method", "given", *(key.split(".")[0] for key, _ in conditions)}
    runs = [read(path, needed) for path in run_folders(folder)]
    if not runs:
        raise UserError(f"runs: no run is in {folder} or below it; name the output folder of your runs")
    kept = runs
    for key, wanted in conditions:
        kept = _with_value(kept, key, wanted)
    weighed = [(run, *weigh(run.path)) for run in kept]
    weighed.sort(key=lambda each: SORTS[options.sort](*each))
    columns = ["run", "status", "method", "score", "time", "trained", "size", "age"]
    show(columns, [_row(folder, *each) for each in weighed])
    for run in runs:
        if run.problem:
            print(f"{shown(run.path)}: {run.problem}", file=sys.stderr)
    if console.is_terminal:
        counts = Counter(run.status for run in kept)
        say(
            f"{len(kept)} of {len(runs)} runs: {', '.join(f'{number} {status}' for status, number in counts.items()) or 'none'}"
        )
    return 0


def _row(folder: Path, run: Found, size: int, written: float) -> Sequence[Any]:
    path = run.path.relative_to(folder) if console.is_terminal and run.path != folder else run.path
    trained = run.results.get("params", {}).get("trainable")
    return (
        path,
        status_text(run.status),
        run.config.get("method", ""),
        score_text(run.score),
        duration(run.seconds) if run.seconds else "",
        "" if trained is None else f"{trained:,}",
        megabytes(size),
        since(written),
    )


def status_text(status: str) -> Text:
    return Text(status, style=COLORS.get(status, "red"))


def _with_value(runs: Sequence[Found], key: str, wanted: str) -> list[Found]:
    """Returns the runs that have a value for a key.

    Raises:
        UserError: for a key that none of them has.
    """
    values = []
    for run in runs:
        with suppress(KeyError):
            values.append((run, run.value(key)))
    if runs and not values:
        known = {"status", *LATER}.union(*(read(run.path).config for run in runs[-1:]))
        raise UserError(f"runs: no run has the key {key}, got --where {key}={wanted}{suggest(key, known)}")
    kept = [run for run, value in values if same(value, wanted)]
    if values and not kept:
        there = sorted({"null" if value is None else str(value) for _, value in values})
        more = f" and {len(there) - MOST_VALUES} more" if len(there) > MOST_VALUES else ""
        print(f"no run has {key}={wanted}; there are: {', '.join(there[:MOST_VALUES])}{more}", file=sys.stderr)
    return kept


def same(value: Any, text: str) -> bool:
    """Whether a text of the command line means a saved value: 5e-3 is 0.005, null is none, [q,v] is a list."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    if isinstance(value, str):
        return value == text.strip("'\"")
    try:
        return bool(yaml.load(text, yaml.CSafeLoader) == value)
    except (yaml.YAMLError, ValueError):  # as of 2026-13-01, which begins like a date
        return False
