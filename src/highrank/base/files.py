"""Writes files atomically, finds run directories, shows paths, names the cache folder and takes sha256 sums."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def path_field(default: Any = dataclasses.MISSING) -> Any:
    """Returns a config field that names a file or folder: it is saved absolute, so that a run can be used from anywhere.

    Whether the file exists is for whoever reads it to say, not for the config: a trained adapter does without its data.
    """
    return dataclasses.field(default=default, metadata={"path": True})


def shown(path: Path | str) -> str:
    """Returns a path as people read it: from the working directory if it lies below, else as it is."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if path and Path(path).is_relative_to(here) else str(path)


def run_folders(folder: Path) -> Iterator[Path]:
    """Yields the run directories in a folder and below it, but for the trials of a learning-rate search within."""
    for path, folders, names in os.walk(folder):
        if "results.json" in names:
            folders.clear()
            yield Path(path)
        folders[:] = sorted(name for name in folders if name != "search" and not name.startswith("."))


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Returns the folder for converted wheels and tokenised data: $HIGHRANK_CACHE, else the user's cache."""
    root = os.environ.get("HIGHRANK_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "highrank"


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Returns the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
