"""Scripts of an experiment's folder, run in this process."""

import importlib
import json
import sys

import pytest


@pytest.fixture
def scripts(monkeypatch, tmp_path, capsys):
    """Returns a function that makes a folder's scripts importable, and returns one that runs them: (stdout, the JSON written)."""
    folders = []

    def of(folder):
        monkeypatch.syspath_prepend(folder)
        folders.append(folder)

        def run(name, *words):
            file = tmp_path / f"{name}.json"
            importlib.import_module(name).main([f"--json={file}", *words])
            return capsys.readouterr().out, json.loads(file.read_text())

        return run

    yield of
    for path in (path for folder in folders for path in folder.glob("*.py")):
        sys.modules.pop(path.stem, None)
