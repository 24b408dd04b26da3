"""Shared by all tests: one thread per process is enough for tiny models, and no test needs a network."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the processes that tests start inherit it

import runpy
from pathlib import Path

import pytest

OFFLINE = Path(__file__).parent / "offline"
if os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(OFFLINE):  # a worker of xdist has it already
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
    runpy.run_path(str(OFFLINE / "sitecustomize.py"))


@pytest.fixture
def run_cli(tmp_path, capsys):
    """Returns a function that runs `run.py` words in this process: (exit status, stdout, stderr)."""
    from highrank.cli import main

    def call(*words: str) -> tuple[int, str, str]:
        status = main(["run", f"output={tmp_path / 'outputs'}", *words])
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


@pytest.fixture
def wide(monkeypatch):
    """Makes tiny models with rows of 64 and more, nf4's block."""
    from highrank.model import backbones

    narrow = backbones.tiny_config
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    monkeypatch.setattr(backbones, "tiny_config", lambda name: {**narrow(name), **sizes})


@pytest.fixture(scope="session")
def tiny_sweep(tmp_path_factory):
    """Returns the folder of a sweep over three methods on a tiny random model, one of them without r; only to read."""
    from highrank.cli import main
    from highrank.report import dashboard
    from highrank.sweep.grid import expand

    folder = tmp_path_factory.mktemp("outputs") / "sweep"
    words = ["model=tiny_llama", "task.n_train=16", "task.n_test=4", "batch_size=4", "max_steps=4"]
    grid = expand([*words, "method=hira,lora,hyperadapt", "r=2,4"])
    cells = []
    for cell in grid.cells:  # in this process, which is faster than `run -m`
        assert main(["run", *cell.words, f"run_dir={folder / cell.folder}"]) == 0
        about = {"run": cell.folder, "config_hash": cell.run.hash, "words": list(cell.words), "axes": cell.axes}
        cells.append(about)
    plan = {"name": "tiny", "words": words, "axes": grid.axes, "cells": cells, "lr_search": None}
    (folder / "sweep.json").write_text(json.dumps(plan))
    dashboard.write(folder)
    return folder
