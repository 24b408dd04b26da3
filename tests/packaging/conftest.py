"""Shared by the tests of the built wheel."""

import pytest
from build_wheel import build_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("tree") / "highrank", tmp_path_factory.mktemp("wheel"))
