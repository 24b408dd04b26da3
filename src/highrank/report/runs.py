"""Finished and unfinished runs as records: run directories and `sweep.json`, read once and checked."""

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from highrank.base.errors import UserError, described
from highrank.base.saved import SWEEP, read_config, read_results
from highrank.base.shapes import read_json
from highrank.config.run_config import GROUPS, SAME_RUN, as_given, flat, with_later


@dataclass(frozen=True)
class Record:
    """One run directory."""

    path: Path
    config: Mapping[str, Any]
    """The resolved config; empty where the run never wrote one."""
    results: Mapping[str, Any]
    axes: Mapping[str, Any]
    """The swept keys that this run has, with their values; the seed is always one."""
    search: Mapping[str, Any] | None = None
    """How its learning rate was searched: values or budget, seed, trials, lr, at_edge; None where it was not."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def status(self) -> str:
        return self.results["status"]

    @property
    def seed(self) -> Any:
        return self.axes["seed"]

    @property
    def arm(self) -> dict[str, Any]:
        """The axes without the seed: what is compared."""
        return {key: value for key, value in self.axes.items() if key != "seed"}

    @property
    def metric(self) -> str:
        """The headline metric's name."""
        return next(key for key in self.results["metrics"]["final"] if key != "sets")

    @property
    def final(self) -> Mapping[str, Mapping[str, Any]]:
        """The trained model's metrics per test set."""
        return self.results["metrics"]["final"]["sets"]

    def predictions(self, name: str) -> list[dict[str, Any]] | None:
        """Returns the trained model's rows of one test set, or None where the file is missing or damaged."""
        try:
            lines = (self.path / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
        except (OSError, ValueError, RecursionError):
            return None
        return rows if rows and all(isinstance(row, dict) and "id" in row for row in rows) else None


@dataclass(frozen=True)
class SweepRuns:
    """A sweep folder: its plan, and what is there of it."""

    path: Path
    name: str
    axes: Mapping[str, Sequence[Any]]
    """Every swept key with its values, in the order of the words."""
    records: list[Record]
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Run directories that cannot be used, and why."""
    missing: list[Path] = field(default_factory=list)
    """Cells that have not started."""
    search: Mapping[str, Any] | None = None
    """`lr_search` of sweep.json."""
    command: str | None = None
    """What was typed."""


def read_sweep(folder: Path | str) -> SweepRuns:
    """Returns a sweep's records, and names what is damaged or missing.

    Raises:
        UserError: if sweep.json is missing or damaged.
    """
    folder = Path(folder)
    try:
        plan = read_json(folder / "sweep.json", SWEEP)
        cells = [(folder / cell["run"], dict(cell["axes"]), cell["config_hash"]) for cell in plan["cells"]]
        name, axes, search = plan["name"], dict(plan["axes"]), plan.get("lr_search")
        searched = [(dict(arm["axes"]), arm) for arm in search["arms"]] if search else []
        command = " ".join(["python run.py -m", *map(str, plan.get("words", ()))])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"sweep: sweep.json must hold name, axes and cells, got {error} in {folder}; "
            "run the sweep again, or name its run directories"
        ) from error
    sweep = SweepRuns(folder, name, axes, [], search=search, command=command)
    for path, values, config_hash in cells:
        if not (path / "results.json").is_file():
            sweep.missing.append(path)
            continue
        try:
            record = _read(path, {**values, "seed": values.get("seed")})
            if record.results["config_hash"] != config_hash:
                raise UserError(f"its config_hash {record.results['config_hash'][:12]} is not the plan's")
        except UserError as error:
            sweep.skipped.append((path, str(error)))
            continue
        arm = next((arm for arm_axes, arm in searched if arm_axes == record.arm), None)
        about = {key: value for key, value in search.items() if key != "arms"} if search else {}
        sweep.records.append(_with(record, search={**about, **arm} if arm else None))
    return sweep


def read_runs(folders: Iterable[Path | str]) -> tuple[list[Record], list[tuple[Path, str]]]:
    """Returns the records of run directories, or of all those below a folder, and what was skipped and why.

    Their axes are the keys in which they differ. Trials of a learning-rate search (below `search/`) are left out.
    """
    by_path: dict[Path, Record] = {}
    skipped: dict[Path, str] = {}
    cells: dict[Path, Record] = {}
    for folder in map(Path, folders):
        if (folder / "sweep.json").is_file():
            cells |= {record.path.resolve(): record for record in read_sweep(folder).records}
        runs = [folder] if (folder / "results.json").is_file() else _below(folder)
        if not runs:
            skipped[folder] = "no results.json in it or below it"
        for path in runs:
            try:
                by_path[path.resolve()] = cells.get(path.resolve()) or _read(path, {})
            except UserError as error:
                skipped[path] = str(error)
    records = list(by_path.values())
    axes = differences([record.config for record in records])
    named = [_with(r, axes={**values, "seed": r.seed}) for r, values in zip(records, axes, strict=True)]
    return named, list(skipped.items())


def _below(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("results.json")) if folder.is_dir() else []
    return [file.parent for file in files if "search" not in file.relative_to(folder).parts]


def _with(record: Record, **values: Any) -> Record:
    return Record(**{**vars(record), **values})


def _read(path: Path, axes: Mapping[str, Any]) -> Record:
    results, config = read_results(path), read_config(path)
    try:
        _check(config, results)
        config = with_later(as_given(config)) if config else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"run: a result must be whole, got {described(error)} in {path}; run it again") from error
    seed = axes.get("seed")
    return Record(path, config, results, {**axes, "seed": results.get("seed") if seed is None else seed})


def _check(config: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError unless a finished run's results hold what tables are made of."""
    if results["status"] != "done":
        return
    if not config:
        raise ValueError("no config.yaml")
    if "final" not in results.get("metrics", {}):
        raise ValueError("no test set was scored")
    final = results["metrics"]["final"]
    metric = next(key for key in final if key != "sets")
    if not final["sets"]:
        raise ValueError("no test sets")
    for name, metrics in final["sets"].items():
        if not (isinstance(metrics[metric], int | float) and math.isfinite(metrics[metric]) and metrics["n"] > 0):
            raise ValueError(f"{name} has {metric}={metrics[metric]}, n={metrics['n']}")
    if not {"protocol", "data", "params", "seed"} <= results.keys():
        raise ValueError("no protocol, data, params or seed")


def differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns, per config, its values of the keys in which the configs differ, groups first.

    Left out: what else a run is evaluated on; keys that follow from a group's name (a model's shape, a protocol's template), and a learning rate, or what a
    run started from, that follows from the other keys.
    """
    rows = [{k: v for k, v in flat(config).items() if k not in (*SAME_RUN, "eval_also")} for config in configs]
    order = {**dict.fromkeys(GROUPS), **{key: None for row in rows for key in row}}
    varied = [key for key in order if len({hashable(row[key]) for row in rows if key in row}) > 1]
    names = [key for key in varied if key in GROUPS]
    axes = [key for key in varied if key.split(".")[0] not in names or not follows(rows, key, [key.split(".")[0]])]
    axes = without_followed_rate(rows, [key for key in varied if key in axes or key in names])
    others = [key for key in axes if key not in ("start_hash", "lr")]
    if "start_hash" in axes and follows(rows, "start_hash", others):  # each run goes on from its own
        axes.remove("start_hash")
    return [{key: row[key] for key in axes if key in row} for row in rows]


def without_followed_rate(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Returns the keys without a learning rate that the others decide: a rate per arm is no arm of its own."""
    others = [key for key in keys if key not in ("lr", "seed")]
    return [key for key in keys if key != "lr" or not others or not follows(rows, "lr", others)]


def follows(rows: Sequence[Mapping[str, Any]], key: str, others: Sequence[str]) -> bool:
    """Whether the other keys' values decide a key's value, in the rows that have it."""
    seen: dict[tuple[Hashable, ...], Hashable] = {}
    return all(
        seen.setdefault(tuple(hashable(row.get(other)) for other in others), hashable(row[key])) == hashable(row[key])
        for row in rows
        if key in row
    )


def hashable(value: Any) -> Hashable:
    """Returns a config value as something that can be a key."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value
