"""Shared by the tests of training."""

import pytest


@pytest.fixture
def every_base_evaluated(tmp_path_factory, monkeypatch):
    """No run finds what another has kept of the untouched base: its cache cannot be written."""
    file = tmp_path_factory.mktemp("cache") / "file"
    file.write_text("")
    monkeypatch.setenv("HIGHRANK_CACHE", str(file))
