"""Runs to find: two finished ones, and others in each state that a folder can be in."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_run import WORDS, write

from highrank.cli import main


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory):
    """Returns a folder with the finished runs `hira` and `lora`; only to read."""
    folder = tmp_path_factory.mktemp("found")
    for name, *words in (("hira", "method=hira", "r=2"), ("lora", "method=lora", "r=4", "lr=1e-3", "seed=1")):
        assert main(["run", *WORDS, *words, f"run_dir={folder / name}"]) == 0
    return folder


@pytest.fixture
def outputs(two_runs, tmp_path, monkeypatch):
    """Returns `outputs` in the working directory: the two runs, a running, a failed and a damaged one, and no run at all."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs"
    shutil.copytree(two_runs, folder / "2026-01-01")
    runs = folder / "2026-01-01"
    for name in ("running", "failed", "damaged"):
        shutil.copytree(runs / "hira", runs / name)
    results = json.loads((runs / "running" / "results.json").read_text())
    times = {key: results["time"][key] for key in ("setup_s", "eval_before_s")}
    running = {**results, "status": "running", "time": times, "metrics": {"before": results["metrics"]["before"]}}
    write(runs / "running", {key: value for key, value in running.items() if key != "steps"})
    write(runs / "failed", {**results, "status": "failed", "error": "the loss went away", "steps": 1})
    (runs / "damaged" / "results.json").write_text('{"status": "do')
    (folder / "notes").mkdir()
    for place, age in (("lora", 100), ("hira", 200)):  # seconds after the others were made
        for file in (runs / place).rglob("*"):
            os.utime(file, times=(results_time(runs) + age,) * 2)
    return Path("outputs")


def results_time(runs):
    return (runs / "failed" / "results.json").stat().st_mtime


@pytest.fixture
def highrank(capsys):
    """Returns a function that runs a command in this process: (exit status, stdout, stderr)."""

    def call(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


@pytest.fixture
def terminal(monkeypatch):
    """Makes the commands believe that somebody looks at a wide terminal."""
    from highrank.base.console import console

    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_width", 200)
    monkeypatch.setattr(console, "no_color", True)
