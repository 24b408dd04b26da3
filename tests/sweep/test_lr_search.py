"""The search of rates, on losses that a formula gives: which are tried, which is the arm's, and when it goes on past an edge."""

import json
import math

import pytest

from highrank.sweep.grid import expand
from highrank.sweep.lr_search import parse

WORDS = ["model=tiny_llama", "task.n_train=16", "task.n_test=2", "method=hira,lora", "r=2", "protocol.num_validation=4"]
BEST = {"hira": 1.0, "lora": 1e-4}
"""The rate with the lowest loss."""


def searched(folder, *options, ends=lambda method, lr: True):
    """Returns per method the record of its arm, and how often each rate was asked for."""
    grid = expand(WORDS)
    times = []

    def execute(cells):
        for cell in cells:
            method, lr = cell.axes["method"], cell.run.core.lr
            times.append((method, lr))
            loss = (math.log10(lr) - math.log10(BEST[method])) ** 2
            done = {"status": "done", "validation": {"loss": loss, "n": 1}}
            results = done if ends(method, lr) else {"status": "diverged"}
            (folder / cell.folder).mkdir(parents=True, exist_ok=True)
            (folder / cell.folder / "results.json").write_text(json.dumps({**results, "config_hash": cell.run.hash}))

    found = parse(*options[:1], grid, *options[1:]).run(grid.cells, folder, execute)
    assert len(times) == len(set(times))
    assert [cell.run.core.lr for cell in found.cells if cell] == [arm["lr"] for arm in found.arms if arm["lr"]]
    return {arm["axes"]["method"]: arm for arm in found.arms}


def rates(arm):
    return [trial["lr"] for trial in arm["trials"]]


def test_as_many_as_given(tmp_path):
    arms = searched(tmp_path, "3")
    assert {name: rates(arm) for name, arm in arms.items()} == {
        "hira": [0.0016, 0.005, 0.016],
        "lora": [0.00032, 1e-3, 0.0032],
    }
    assert all(arm["at_edge"] for arm in arms.values())


def test_on_until_a_worse_one_stands_on_either_side(tmp_path):
    arms = searched(tmp_path, "3", "10")
    assert rates(arms["hira"]) == [0.0016, 0.005, 0.016, 0.051, 0.16, 0.51, 1.6, 5.1]
    assert (arms["hira"]["lr"], arms["hira"]["at_edge"]) == (1.6, False)
    assert rates(arms["lora"]) == [3.2e-5, 1e-4, 0.00032, 1e-3, 0.0032]
    assert (arms["lora"]["lr"], arms["lora"]["at_edge"]) == (1e-4, False)


def test_downwards_by_the_list_s_own_steps(tmp_path):
    arms = searched(tmp_path, "[0.01,0.1]", "5")
    assert rates(arms["hira"]) == [0.01, 0.1, 1.0, 10.0]
    assert rates(arms["lora"]) == [1e-5, 1e-4, 1e-3, 0.01, 0.1]


def test_no_further_than_asked(tmp_path):
    arms = searched(tmp_path, "3", "5")
    assert rates(arms["hira"]) == [0.0016, 0.005, 0.016, 0.051, 0.16]
    assert (arms["hira"]["lr"], arms["hira"]["at_edge"]) == (0.16, True)


def test_a_rate_that_does_not_end_is_a_worse_one(tmp_path):
    arms = searched(tmp_path, "3", "10", ends=lambda method, lr: lr < 0.1)
    assert rates(arms["hira"]) == [0.0016, 0.005, 0.016, 0.051, 0.16]
    assert (arms["hira"]["lr"], arms["hira"]["at_edge"]) == (0.051, False)
    none = searched(tmp_path / "none", "3", "10", ends=lambda method, lr: False)
    assert [rates(arm) for arm in none.values()] == [[0.0016, 0.005, 0.016], [0.00032, 1e-3, 0.0032]]
    assert [arm["lr"] for arm in none.values()] == [None, None]


@pytest.mark.parametrize("most", ["2", "21", "3.5", "x"])
def test_a_bound_that_is_none(most):
    with pytest.raises(Exception, match=r"lr_search_most is a whole number from lr_search's 3 to 20"):
        parse("3", expand(WORDS), most)
