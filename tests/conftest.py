"""Shared by all tests: one thread per process is enough for tiny models."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture
def run_cli(tmp_path, capsys):
    """Returns a function that runs `run.py` words in this process: (exit status, stdout, stderr)."""
    from highrank.cli import main

    def call(*words: str) -> tuple[int, str, str]:
        status = main(["run", f"output={tmp_path / 'outputs'}", *words])
        out = capsys.readouterr()
        return status, out.out, out.err

    return call
