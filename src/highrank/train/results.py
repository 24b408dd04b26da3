"""The run directory and what is written into it."""

import datetime
import glob
import importlib.metadata
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from highrank.base.errors import UserError
from highrank.base.files import write_atomic
from highrank.base.saved import read_config, read_results
from highrank.config.run_config import SAME_RUN, Run, as_given
from highrank.train.devices import share_of
from highrank.train.pace import pace_of


class RunDirectory:
    """One run's folder: config.yaml, results.json, predictions/, adapter/, checkpoints/, TensorBoard events."""

    def __init__(self, run: Run, path: Path | None = None):
        self.run = run
        self.path = path or (Path(run.core.run_dir) if run.core.run_dir else _default_path(run))
        self.results: dict[str, Any] = {}
        self.opened = False
        """Whether this run writes into the folder."""
        self.writes = share_of(run.trainer).rank == 0
        """Whether this process does: of several, the first."""

    def read(self) -> dict[str, Any]:
        """Returns the results of an earlier try of this very run, or {} if there was none.

        Raises:
            UserError: if it holds another run, or files that no run wrote.
        """
        for folder in (self.path, *self.path.parents):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"run: a run directory must be a folder, got the file {folder}; choose another run_dir")
        file = self.path / "results.json"
        if not file.is_file():
            names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
            foreign = [name for name in names if name != "plan.json" and not name.endswith(".partial")]
            if foreign:
                raise UserError(
                    f"run: a run directory is empty or holds a run, got run_dir={self.path} with {foreign[:3]}; "
                    "choose another run_dir"
                )
            return {}
        results = read_results(self.path)
        if results["config_hash"] != self.run.hash:
            raise UserError(
                f"run: an existing run directory keeps its config, got run_dir={self.path} with {self._differences()}; "
                "choose another run_dir"
            )
        return results

    def _differences(self) -> str:
        """Returns which values of the folder's config are others than this run's."""
        try:
            saved = _flat(as_given(read_config(self.path)))
        except UserError:
            return "a config.yaml that is missing or damaged"
        resolved: Any = OmegaConf.to_container(OmegaConf.create(self.run.resolved))
        current = _flat(as_given(resolved))
        keys = [key for key in {**saved, **current} if key not in SAME_RUN and saved.get(key) != current.get(key)]
        return (
            ", ".join(f"{key}={saved.get(key)} instead of {current.get(key)}" for key in keys)
            or "another version's config"
        )

    def kept(
        self, earlier: Mapping[str, Any], model: Mapping[str, Any], data: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Returns what stays, for `open`, of what an unfinished try had found; with resume=never its checkpoints go.

        Raises:
            UserError: if it had another model or other data.
        """
        checkpoints = self.path / "checkpoints"
        if self.run.core.resume == "never":
            if self.writes and checkpoints.exists():
                shutil.rmtree(checkpoints)
            return {}
        kept: dict[str, Any] = {
            key: earlier[key]
            for key in ("model", "data", "metrics", "also", "base_reused", "resumed", "parts", "logged")
            if key in earlier
        }
        if "eval_before_s" in earlier.get("time", {}):
            kept["time"] = {"eval_before_s": earlier["time"]["eval_before_s"]}
        if "metrics" in kept or checkpoints.exists():
            earlier = read_results(self.path, needed=("model", "data"))
            _compare("model", *model_files(model, earlier["model"]))
            new, old = ({row["name"]: row["sha256"] for row in rows} for rows in (data, earlier["data"]))
            if list(new.values()) != list(old.values()):  # a file that was only moved is the same data
                _compare("data", new, old)
        return kept

    def open(self, earlier: Mapping[str, Any] = {}) -> None:
        """Creates the folder and starts results.json with what stays of an earlier try.

        The file marks the folder as this run's, so it comes first. Every process knows what stays: they decide alike
        what is still to be done.
        """
        self.results = {**earlier}
        if not self.writes:
            return
        self.opened = True
        self.path.mkdir(parents=True, exist_ok=True)
        self.write(
            status="running",
            config_hash=self.run.hash,
            git=git_state(),
            versions=versions(),
            seed=self.run.core.seed,
            threads=torch.get_num_threads(),
            pace=pace_of(self.run, torch.get_num_threads()),
            protocol={
                "name": self.run.protocol.name,
                "hash": self.run.protocol.hash,
                "version": self.run.protocol.version,
            },
        )
        write_atomic(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.run.resolved)).encode())

    def write(self, **values: Any) -> None:
        """Merges `values` into results.json, in one rename."""
        self.results.update(values)
        if self.writes:
            write_atomic(self.path / "results.json", json.dumps(self.results, indent=1).encode())

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Writes down how many seconds passed within it."""
        start = time.perf_counter()
        yield
        self.write(time={**self.results.get("time", {}), name: time.perf_counter() - start})

    def fail(self, status: str, error: str, **values: Any) -> None:
        """Writes down what ended the run. Where another process ran out of memory, that is what stands."""
        if not self.opened and (self.writes or status != "oom"):
            return
        self.results = read_results(self.path)
        if status == "oom" or self.results["status"] != "oom":
            self.results |= {"status": status, "error": error, **values}
            write_atomic(self.path / "results.json", json.dumps(self.results, indent=1).encode())

    def write_predictions(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes predictions/<name>.jsonl, one JSON object per example in the data's order."""
        if not self.writes:
            return
        file = self.path / "predictions" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _compare(what: str, new: Mapping[str, str], old: Mapping[str, str]) -> None:
    if new != old:
        raise UserError(
            f"run: an unfinished run goes on with the {what} it had, got {changed(new, old)}; bring it back, or start "
            "afresh with resume=never"
        )


def changed(new: Mapping[str, str], old: Mapping[str, str]) -> str:
    """Returns which files are not the same, given the sha256 of each by name."""
    lists = [
        ", ".join(f"{name} {sha256[:12]}…" for name, sha256 in one.items() if other.get(name) != sha256) or "none"
        for one, other in ((new, old), (old, new))
    ]
    return f"sha256 of {lists[0]} instead of {lists[1]}"


def model_files(*models: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the sha256 of each model's files by name; of all of them the one recorded `sha`, where one has no more.

    A random model has no files, and before they were recorded a run held `sha` alone.
    """
    if all(model.get("files") for model in models):
        return [dict(model["files"]) for model in models]
    return [{model["name"]: model["sha"]} for model in models]


def _flat(values: Any, start: str = "") -> dict[str, Any]:
    """Returns nested mappings as {dotted key: value}."""
    if not isinstance(values, Mapping):
        return {start: values}
    return {
        k: v for key, value in values.items() for k, v in _flat(value, f"{start}.{key}" if start else str(key)).items()
    }


def _default_path(run: Run) -> Path:
    """Returns <output>/<date>/<name>_<hash>: of the day on which this run was first started, else today."""
    name = f"{run.name}_{run.hash[:8]}"
    started = sorted(Path(run.core.output).glob(f"*/{glob.escape(name)}/results.json"))
    return started[-1].parent if started else Path(run.core.output) / datetime.date.today().isoformat() / name


def git_state() -> dict[str, Any] | None:
    """Returns commit and whether the tree has changes, of the repository that holds this package, or None."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not (Path(git("rev-parse", "--show-toplevel")) / "src" / "highrank").is_dir():
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


def versions() -> dict[str, str]:
    packages = ("highrank", "torch", "lightning", "transformers", "tokenizers", "safetensors", "hydra-core", "numpy")
    by_package = {name: importlib.metadata.version(name) for name in packages}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {**by_package, "python": platform.python_version(), "platform": platform.platform(), "device": device}


def peak_memory() -> dict[str, int]:
    """Returns the process's peak resident bytes, and the peak bytes allocated on a CUDA device if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        memory["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return memory
