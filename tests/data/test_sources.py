"""Files in every layout, plain and compressed, and what is said when one is wrong."""

import gzip
import hashlib
import json

import pytest

from highrank.base.errors import UserError
from highrank.data.sources import MissingData, Source, read, read_file

ROWS = [{"a": "1", "b": "x y"}, {"a": "2", "b": '"quoted'}]
TEXTS = {
    "rows.json": json.dumps(ROWS),
    "rows.jsonl": "\n".join(json.dumps(row) for row in ROWS),
    "rows.tsv": 'a\tb\n1\tx y\n2\t"quoted',
}


def write(file, text, compressed=False):
    raw = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(gzip.compress(raw) if compressed else raw)
    return file


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("change", [str, lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n") + "\r\n"])
def test_layouts(tmp_path, name, suffix, change):
    assert read_file(write(tmp_path / (name + suffix), change(TEXTS[name]), bool(suffix))) == ROWS


def test_tsv_without_header_text_and_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    assert read_file(write(tmp_path / "r.tsv", "1\tx\n2\ty\n"), ("a", "b")) == [
        {"a": "1", "b": "x"},
        {"a": "2", "b": "y"},
    ]
    assert read_file(write(tmp_path / "r.txt", "1 a\tb\n2 c\td\n")) == ["1 a\tb", "2 c\td"]
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    assert read_file(tmp_path / "r.parquet") == ROWS


def test_broken_rows_are_left_out_where_the_published_file_has_them(tmp_path):
    write(tmp_path / "rows.tsv", "a\tb\n1\tx\n2\n3\tz\n")
    table = read(Source(("rows.tsv",), "ask", has_broken_rows=True), tmp_path)
    assert table.rows == [{"a": "1", "b": "x"}, {"a": "3", "b": "z"}]
    write(tmp_path / "rows.tsv", "a\tb\n1\tx\ty\n")
    with pytest.raises(UserError, match=r"got 3 in .* row 2"):  # too many fields is another matter
        read(Source(("rows.tsv",), "ask", has_broken_rows=True), tmp_path)


def test_what_was_read_is_recorded(tmp_path):
    file = write(tmp_path / "rows.json.gz", TEXTS["rows.json"], compressed=True)
    table = read(Source(("rows.json",), "ask"), tmp_path)
    assert table.rows == ROWS
    assert (table.name, table.sha256) == ("rows.json.gz", hashlib.sha256(file.read_bytes()).hexdigest())


BAD = [
    ("rows.json", "{", "must be valid JSON"),
    ("rows.json", '{"a": 1}', "must hold a list of objects, got dict"),
    ("rows.json", "[1]", "must be an object, got int in {file} row 1"),
    ("rows.json", "[]", "must not be empty, got 0 rows in {file}; ask"),
    ("rows.jsonl", '{"a": 1}\n{"a"', "{file} row 2"),
    ("rows.jsonl", "", "must not be empty"),
    ("rows.tsv", "a\tb\n1\t2\n3", "must have 2 tab-separated fields (a, b), got 1 in {file} row 3"),
    ("rows.tsv", "a\tb\n", "must not be empty"),
    ("rows.json", b"[\n\xff]", "must be UTF-8, got invalid start byte in {file} row 2"),
    ("rows.json.gz", b"no gzip", "a .gz file must be whole"),
    ("rows.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-9], "a .gz file must be whole"),
    ("rows.parquet", b"PAR1", "a parquet file must be whole"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD, ids=[f"{name}: {message}" for name, _, message in BAD])
def test_bad_files(tmp_path, name, text, message):
    file = write(tmp_path / name, text)
    with pytest.raises(UserError) as error:
        read(Source((name,), "ask"), tmp_path)
    assert message.format(file=file) in str(error.value)


def test_missing_files_say_where_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(MissingData, match=r"rows\.json \(or \.gz\) is needed, got none in .*; ask them"):
        read(Source(("rows.json",), "ask them"), tmp_path)
    with pytest.raises(MissingData, match=r"set HIGHRANK_DATA or task\.data=<folder with rows\.json>; ask them"):
        read(Source(("rows.json",), "ask them"), None)


def test_the_hub_is_asked_by_id_subset_split_and_revision(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or ROWS)
    table = read(Source(("rows.json",), "ask", hub="some/set:part", split="test"), None, "abc")
    assert asked == [(("some/set", "part"), {"split": "test", "revision": "abc"})]
    assert (table.rows, table.name) == (ROWS, "some/set:part/test@abc")

    asked.clear()
    both = read(Source(("rows.json",), "ask", hub="some/set:a+b@pinned"), None)
    assert [args for args, _ in asked] == [("some/set", "a"), ("some/set", "b")]
    assert asked[1][1] == {"split": "train", "revision": "pinned"}
    assert both.rows == ROWS * 2

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(MissingData, match="ConnectionError from the Hub's some/set"):
        read(Source(("rows.json",), "ask", hub="some/set"), None)
