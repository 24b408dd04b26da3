"""Shared by the tests of exchange with other libraries."""

import pytest
from trained import write_run


@pytest.fixture
def make_run(tmp_path):
    return lambda *words, name="trained", **kwargs: write_run(tmp_path / name, *words, **kwargs)
