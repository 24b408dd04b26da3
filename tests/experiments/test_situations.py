"""The table of situations names tests that there are; that they pass is their own matter."""

import importlib.util
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS.parent / "experiments" / "robustness" / "situations.py"


def test_every_situation_has_its_test():
    spec = importlib.util.spec_from_file_location("situations", SCRIPT)
    situations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(situations)
    table = (SCRIPT.parent / "situations.md").read_text()
    for rows in situations.SITUATIONS.values():
        for said, test in rows.items():
            file, _, name = test.partition("::")
            assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.M), test
            assert re.search(rf"^\| {re.escape(said)} \| ok", table, re.M), said
