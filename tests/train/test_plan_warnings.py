"""What a run may do and seldom means to: said with its numbers, in the plan, before anything loads."""

import json

import pytest

from highrank.cli import main
from highrank.config.words import compose_run
from highrank.train.plan import make_plan

WORDS = ["model=tiny_llama", "method=lora", "r=2", "task.n_train=24", "lr=1e-2"]


def warnings(*words):
    run = compose_run([*WORDS, *words])
    return list(make_plan(run, run.make_task()).warnings)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["batch_size=8", "epochs=3"], []),
        (["batch_size=8", "epochs=3", "warmup_steps=8"], []),
        (
            ["batch_size=8", "epochs=3", "warmup_steps=36"],
            ["the warm-up is as long as the run, got 36 steps of 9: the rate reaches at most 0.00222 of lr=0.01"],
        ),
        (
            ["batch_size=8", "accumulate=4"],
            ["a step takes more examples than there are, got 32 of 24: every step sees all of them"],
        ),
        (["batch_size=24"], []),
    ],
)
def test_warnings(words, expected):
    assert warnings(*words) == expected


def test_they_are_printed_and_kept(tmp_path, capsys):
    assert main(["run", *WORDS, "batch_size=25", "dry_run=true", f"run_dir={tmp_path}"]) == 0
    said = "a step takes more examples than there are, got 25 of 24"
    assert f"warning: {said}" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["warnings"][0].startswith(said)


def test_a_search_whose_best_rate_is_at_the_edge_says_so(tmp_path, capsys):
    words = ["run", "-m", *WORDS[:-1], "batch_size=4", "max_steps=4", "task.n_test=3", "lr_search=[1e-6,1e-4]"]
    assert main([*words, f"sweep_dir={tmp_path}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: the best rate found is at the edge, got lr=0.0001 of 1e-06, 0.0001 for" in out
