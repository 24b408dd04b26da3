"""Shared by all tests: one thread per process is enough for tiny models, and no test needs a network."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the processes that tests start inherit it

import ipaddress
import socket
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Refuses every connection that leaves this machine."""

    def local(connect: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if isinstance(address, tuple) and not is_local(address[0]):
                raise OSError(f"tests are offline, got a connection to {address}")
            return connect(self, address)

        return call

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, local(getattr(socket.socket, name)))


def is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))  # one of this machine's own addresses
        except OSError:
            return False
    return True


@pytest.fixture
def run_cli(tmp_path, capsys):
    """Returns a function that runs `run.py` words in this process: (exit status, stdout, stderr)."""
    from highrank.cli import main

    def call(*words: str) -> tuple[int, str, str]:
        status = main(["run", f"output={tmp_path / 'outputs'}", *words])
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


@pytest.fixture(scope="session")
def tiny_sweep(tmp_path_factory):
    """Returns the folder of a sweep over three methods on a tiny random model, one of them without r; only to read."""
    from highrank.cli import main
    from highrank.lab import dashboard
    from highrank.lab.grid import expand

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
