"""What two runs found, compared where their batches differ in size."""

import json

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
