"""Tokenised training data is cached under a hash of everything it depends on."""

from dataclasses import replace

import pytest

from highrank.data import token_cache
from highrank.data.encoding import Encoded, encode
from highrank.data.protocol import Protocol
from highrank.data.task import Example, LabelledText
from highrank.data.token_cache import cached_encoding
from highrank.model.tiny import tiny_tokenizer

PLAIN = Protocol(name="plain", version=1, template="{instruction}=", max_length=20)
RECORDS = [Example(str(i), "q" * i, f"{i}.", str(i)) for i in range(1, 30)]
TEXTS = [LabelledText(str(i), "t" * i, float(i % 2), "u" if i % 3 else None) for i in range(1, 9)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1)
    return tmp_path / "tokens"


class Counting:
    """Encodes, and counts how often it was asked to."""

    def __init__(self, records, protocol, tokenizer):
        self.calls, self.args = 0, (records, protocol, tokenizer)

    def __call__(self):
        self.calls += 1
        records, protocol, tokenizer = self.args
        return [encode(record, protocol, tokenizer) for record in records]


def read(records, protocol=PLAIN, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    build = Counting(records, protocol, tokenizer)
    return cached_encoding(records, protocol, tokenizer, build), build.calls, build()


@pytest.mark.parametrize("records", [RECORDS, TEXTS], ids=["text to write", "text to classify"])
@pytest.mark.parametrize("change", [{}, {"too_long": "cut"}, {"mask_prompt": False}, {"eos": False}])
def test_the_second_read_is_the_same_without_encoding(cache, records, change):
    protocol = replace(PLAIN, **change)
    first, calls, plain = read(records, protocol)
    assert (calls, first) == (1, plain)
    again, calls, _ = read(records, protocol)
    assert (calls, again) == (0, plain)
    if not change and records is RECORDS:
        assert None in plain  # the drop of long examples is kept too
        assert any(isinstance(row, Encoded) for row in plain)


def test_any_change_is_another_entry(cache):
    read(RECORDS)
    assert read([*RECORDS[:-1], replace(RECORDS[-1], output="x")])[1] == 1
    assert read(RECORDS, replace(PLAIN, max_length=19))[1] == 1
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["qq"])
    assert read(RECORDS, tokenizer=tokenizer)[1] == 1
    assert len(list(cache.iterdir())) == 4


def test_a_damaged_entry_is_encoded_again_and_that_is_said_once(cache, capsys):
    """One byte among the tokens is a whole safetensors file with another word in it."""
    read(RECORDS)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    places = range(0, len(whole), 37)
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    for content in (b"", whole[:50], whole[:-1], *flipped):
        file.write_bytes(content)
        found, calls, plain = read(RECORDS)
        assert (calls, found) == (1, plain)
        assert file.read_bytes() == whole
        assert read(RECORDS)[1] == 0
        assert " ".join(capsys.readouterr().out.split()).count("is damaged; what it held is made again") == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1)
    for _ in range(2):
        found, calls, plain = read(RECORDS)
        assert (calls, found) == (1, plain)


def test_few_examples_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path))
    read(RECORDS)
    assert not (tmp_path / "tokens").exists()
