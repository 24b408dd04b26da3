"""The default task: disjoint, reproducible, and strictly scored."""

import pytest

from highrank.base.registry import load

PINNED = ["7b8be6496c285493", "9741ee05423d404f"]
"""Start of the sha256 of the default training and test problems; a change raises the task's version."""


@pytest.fixture(scope="module")
def task():
    cls = load("tasks", "wordmath")
    return cls(cls.config(), seed=0)


@pytest.fixture(scope="module")
def module():
    import importlib

    return importlib.import_module("highrank.tasks.wordmath")


def test_splits_share_no_question_and_no_computation(module):
    splits = {name: module.generate(name, 600, 0) for name in module.SPLITS}
    questions = [row.instruction for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)
    computations = {name: {module.computation(row.output) for row in rows} for name, rows in splits.items()}
    assert not computations["train"] & computations["test"]
    assert not computations["train"] & computations["validation"]
    assert not computations["validation"] & computations["test"]


def test_splits_are_disjoint_whatever_the_seed(module):
    train = {module.computation(row.output) for row in module.generate("train", 500, 1)}
    test = {module.computation(row.output) for row in module.generate("test", 500, 2)}
    assert not train & test


def test_worked_answers_are_right(module):
    for row in module.generate("train", 500, 3):
        steps = module._STEP.findall(row.output)
        assert steps
        for x, op, y, z in steps:
            assert {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y), "/": int(x) / int(y)}[op] == int(
                z
            )
        assert row.output.endswith(f"The answer is {row.answer}.")
        assert steps[-1][3] == row.answer


def test_a_seed_gives_the_same_problems_everywhere(module, task):
    """The sha256 of the data is in every result; it must not move with Python or the machine."""
    assert [row["sha256"][:16] for row in task.sources()] == PINNED
    assert module.generate("train", 30, 0) == module.generate("train", 60, 0)[:30]
