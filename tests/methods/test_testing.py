"""What `highrank check` asks of a plugin, every method and every task with data of its own keeps."""

import pytest

from highrank.base.registry import available
from highrank.testing import check_method, check_task

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("name", available("methods"))
def test_a_method_keeps_the_contract(name):
    assert check_method(name)


@pytest.mark.parametrize("name", available("tasks"))
def test_a_task_keeps_the_contract(name, monkeypatch):
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    assert check_task(name)
