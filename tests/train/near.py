"""What two runs found, compared: bit for bit, and where their batches differ in size."""

import json
from pathlib import Path

import pytest

LOSSES = {f"{name}{end}" for name in ("nats", "loss", "perplexity") for end in ("", "_clean")}


def near(found):
    """Equals the same metrics or prediction rows: losses up to the order of their sums, all else exactly."""
    if isinstance(found, dict):
        return {k: pytest.approx(v, rel=1e-5) if k in LOSSES and v is not None else near(v) for k, v in found.items()}
    return [near(each) for each in found] if isinstance(found, list) else found


def saved(file):
    """The rows of a predictions file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def check_same(folder, other):
    """Two runs have, bit for bit, the same adapter, metrics and predictions."""
    file = Path("adapter", "adapter.safetensors")
    assert (folder / file).read_bytes() == (other / file).read_bytes()
    for key in ("steps", "tokens", "metrics", "selected", "validation"):
        assert results(folder)[key] == results(other)[key]
    for file in (folder / "predictions").iterdir():
        assert (other / "predictions" / file.name).read_text() == file.read_text()
