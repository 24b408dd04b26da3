"""Where a task's rows come from: a local file in one of the layouts people have, or the Hugging Face Hub.

A file is `.json` (a list of objects), `.jsonl`, `.tsv`, `.txt` (lines) or `.parquet`, each but parquet also as `.gz`.
Byte-order marks and CRLF line ends are tolerated; anything else that is wrong names file, row and field.
"""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from highrank.base.errors import UserError
from highrank.base.hub import hub


class MissingData(UserError):
    """No source has the rows."""


@dataclass(frozen=True)
class Source:
    """One table of rows: the file names it goes by, and its place on the Hub."""

    paths: tuple[str, ...]
    """File names inside the data folder, the first that exists is read; `.gz` is tried too."""
    get: str
    """Where a person gets the files."""
    rows: int | None = None
    """Published number of rows."""
    columns: tuple[str, ...] = ()
    """Column names of a tsv file without a header line."""
    hub: str | None = None
    """Hub id, with `:subset` if it has several (`:a+b` for two of them), and `@revision` if main is not plain data."""
    split: str = "train"
    has_broken_rows: bool = False
    """Whether the published tsv file has rows with too few fields, which everybody leaves out."""


@dataclass(frozen=True)
class SourceTable:
    """Rows as read, and what to record of them."""

    rows: list[Any]
    name: str
    sha256: str | None
    """Of the file as it lies on disk, or of the rows' JSON if they come from the Hub."""
    location: str


def as_text(value: Any, name: str) -> str:
    """Returns a value of a row as text: a text as it is, a number, true or false as JSON writes it.

    Raises:
        ValueError: with the field's name, for null, a number that is not finite, a list, an object, or half a character.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} must be whole characters, got {name}={value!r} with half a pair") from error
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    got = "null" if value is None else repr(value)
    raise ValueError(f"{name} must be a text, or a number, true or false, got {name}={got[:80]}")


def text_of(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """Returns a field of a row as text, see `as_text`; `default` where the field is null or not there.

    Raises:
        KeyError: for a field that is not there and has no default.
        ValueError: for a field that is no text.
    """
    if default is not None and row.get(name) is None:
        return default
    return as_text(row[name], name)


def data_folder(given: str | None) -> Path | None:
    """Returns the folder that a task names, else $HIGHRANK_DATA, else None.

    Raises:
        UserError: if it does not exist.
    """
    root = given or os.environ.get("HIGHRANK_DATA")
    if not root:
        return None
    if not Path(root).is_dir():
        raise UserError(f"task: the data folder must exist, got {'data' if given else 'HIGHRANK_DATA'}={root}")
    return Path(root)


def find(source: Source, root: Path, folders: Sequence[str] = ("",)) -> Path | None:
    """Returns the file of a source inside one of the folders of a data folder, or None."""
    for path in source.paths:
        for folder in folders:
            for name in (path, f"{path}.gz"):
                if (root / folder / name).is_file():
                    return root / folder / name
    return None


def read(source: Source, root: Path | None, revision: str | None = None, folders: Sequence[str] = ("",)) -> SourceTable:
    """Returns the rows of a source: from `root` if there is a data folder, else from the Hub.

    Raises:
        MissingData: if the file is not there and the Hub cannot be asked.
        UserError: if the file is malformed or empty.
    """
    if root is not None:
        file = find(source, root, folders)
        if file is None:
            raise MissingData(f"data: {source.paths[0]} (or .gz) is needed, got none in {root}; {source.get}")
        rows = read_file(file, source.columns, source.has_broken_rows)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        table = SourceTable(rows, str(file.relative_to(root)), digest, str(file))
    else:
        table = _read_hub(source, revision)
    if not table.rows:
        raise UserError(f"data: a set must not be empty, got 0 rows in {table.location}; {source.get}")
    return table


def _read_hub(source: Source, revision: str | None) -> SourceTable:
    place = f"the Hub's {source.hub}" if source.hub else "the Hub (it has no such set)"
    advice = f"set HIGHRANK_DATA or task.data=<folder with {source.paths[0]}>; {source.get}"
    if source.hub is None:
        raise MissingData(f"data: {source.paths[0]} is needed, got no data folder, and nothing from {place}; {advice}")
    from datasets import load_dataset

    name, _, pinned = source.hub.partition("@")
    repo, _, subset = name.partition(":")
    revision = revision or pinned or None
    with hub() as reason:
        try:
            names = [one or None for one in subset.split("+")]
            tables = [load_dataset(repo, name, split=source.split, revision=revision) for name in names]
            rows = [row for table in tables for row in table]
        except Exception as error:  # datasets raises its own, the hub client's, httpx's and OS errors
            said = f"{type(error).__name__} from {place}" + (f" ({reason})" if reason else "")
            raise MissingData(f"data: {source.paths[0]} is needed, got no data folder, and {said}; {advice}") from error
    digest = hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
    name = f"{name}/{source.split}@{revision or 'main'}"
    return SourceTable(rows, name, digest, name)


def read_file(file: Path, columns: Sequence[str] = (), has_broken_rows: bool = False) -> list[Any]:
    """Returns the rows of a file: dicts, or strings for `.txt`; of a tsv file that is known for them, less broken rows.

    Raises:
        UserError: naming the file and the first row that cannot be read.
    """
    kind = file.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"data: a parquet file must be whole, got {error} in {file}") from error
    if kind not in ("json", "jsonl", "tsv", "txt"):
        raise UserError(f"data: a file is json, jsonl, tsv, txt (each also .gz) or parquet, got {file}")
    text = _text(file)
    if kind == "json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"data: a json file must be valid JSON, got {error} in {file}") from error
        if not isinstance(rows, list):
            raise UserError(f"data: a json file must hold a list of objects, got {type(rows).__name__} in {file}")
    else:
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        rows = (
            lines
            if kind == "txt"
            else _jsonl(file, lines)
            if kind == "jsonl"
            else _tsv(file, lines, columns, has_broken_rows)
        )
    for i, row in enumerate(rows, start=1):
        if kind != "txt" and not isinstance(row, dict):
            raise UserError(f"data: a row must be an object, got {type(row).__name__} in {file} row {i}")
    return rows


def _text(file: Path) -> str:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return raw.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"data: a .gz file must be whole, got {error} in {file}") from error
    except UnicodeDecodeError as error:
        row = raw[: error.start].count(b"\n") + 1
        raise UserError(f"data: a file must be UTF-8, got {error.reason} in {file} row {row}") from error


def _jsonl(file: Path, lines: Sequence[str]) -> list[Any]:
    rows = []
    for i, line in enumerate(lines, start=1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"data: each line must be a JSON object, got {error} in {file} row {i}") from error
    return rows


def _tsv(file: Path, lines: Sequence[str], columns: Sequence[str], has_broken_rows: bool) -> list[Any]:
    """Splits on tabs alone: quotes are text."""
    names = list(columns) or (lines[0].split("\t") if lines else [])
    rows = []
    for i, line in enumerate(lines[0 if columns else 1 :], start=1 if columns else 2):
        fields = line.split("\t")
        if has_broken_rows and len(fields) < len(names):
            continue
        if len(fields) != len(names):
            raise UserError(
                f"data: a row must have {len(names)} tab-separated fields ({', '.join(names)}), got {len(fields)} in "
                f"{file} row {i}"
            )
        rows.append(dict(zip(names, fields, strict=True)))
    return rows
