"""Training ends when the held-out loss falls no further, and says why."""

import json
import re
import shutil

import pytest

from highrank.cli import main
from highrank.config.words import compose_run
from highrank.train.module import FineTuner
from highrank.train.plan import make_plan
from highrank.train.saved import read_run

WORDS = ["model=tiny_llama", "method=lora", "r=2", "task.n_train=24", "task.n_test=2", "batch_size=2", "max_steps=12"]
HELD_OUT = ["protocol.num_validation=4", "protocol.validate_every=2"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on which nothing is an improvement: the first validation is one, the next two are not."""
    folder = tmp_path_factory.mktemp("early") / "run"
    assert main(["run", *WORDS, *HELD_OUT, "patience=2", "min_delta=99", f"run_dir={folder}"]) == 0
    return folder


def test_it_stops_and_the_reason_is_kept(run):
    found = results(run)
    assert (found["status"], found["steps"], found["steps_planned"]) == ("done", 6, 12)
    assert found["stopped"].keys() == {"reason", "step", "told"}
    assert (found["stopped"]["reason"], found["stopped"]["step"]) == ("patience_exhausted", 6)
    assert found["stopped"]["told"].startswith("in 2 validations the held-out loss was not below ")
    assert found["stopped"]["told"].endswith(" less 99")
    assert read_run(run).core.patience == 2


def test_the_reason_is_told(run, capsys):
    assert main(["run", *WORDS, *HELD_OUT, "patience=2", "min_delta=99", f"run_dir={run}"]) == 0  # finished before
    out = " ".join(re.sub("[│┤├]", " ", capsys.readouterr().out).split())
    assert "stopped early at step 6 of 12: in 2 validations the held-out loss was not below" in out


def test_an_interrupted_evaluation_leaves_an_adapter_that_can_be_used(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "results.json").write_text(json.dumps({**results(run), "status": "interrupted"}))
    assert read_run(copy).core.patience == 2


def test_a_loss_that_falls_goes_on_to_the_end(tmp_path, capsys):
    assert main(["run", *WORDS, *HELD_OUT, "patience=5", "lr=1e-2", f"run_dir={tmp_path / 'run'}"]) == 0
    found = results(tmp_path / "run")
    assert found["steps"] == 12
    assert "stopped" not in found
    assert "stopped early" not in capsys.readouterr().out


def test_a_loss_that_is_no_number_ends_training(tmp_path, monkeypatch, capsys):
    def validation_step(self, batch, index):
        self.log("validation/loss", float("nan"), batch_size=1)

    monkeypatch.setattr(FineTuner, "validation_step", validation_step)
    assert main(["run", *WORDS, *HELD_OUT, "patience=2", "task.n_test=1", f"run_dir={tmp_path / 'run'}"]) == 0
    assert "step 2/12: training stops, for the held-out loss is not finite" in capsys.readouterr().out
    assert results(tmp_path / "run")["stopped"]["reason"] == "non_finite_metric"


def test_a_time_limit_is_a_reason_too(tmp_path):
    assert main(["run", *WORDS, "trainer.max_time='00:00:00:00'", f"run_dir={tmp_path / 'run'}"]) == 0
    found = results(tmp_path / "run")
    assert found["stopped"] == {"reason": "max_time", "step": found["steps"], "told": "trainer.max_time was over"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("patience=0", "run: patience must be >= 1, or null, got patience=0"),
        ("patience=2", "got patience=2 with protocol.num_validation=0; hold some out with protocol.num_validation=<n>"),
        ("min_delta=0.1", "run: min_delta belongs to patience, got min_delta=0.1 alone; add patience=<n>"),
        ("patience=2 min_delta=-1 protocol.num_validation=4", "run: min_delta must be a finite number >= 0, got"),
        ("patience=x", "patience"),
        ("trainer.callbacks=[]", "use patience or protocol.selection"),
    ],
)
def test_bad_input(capsys, words, expected):
    assert main(["run", *WORDS, *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_patience_that_cannot_end_a_run_is_warned_of():
    run = compose_run([*WORDS, *HELD_OUT, "patience=5"])
    assert list(make_plan(run, run.make_task()).warnings) == [
        "the run is over before patience can end it, got patience=5 with 6 validations in 12 steps: use a smaller "
        "protocol.validate_every"
    ]
    enough = compose_run([*WORDS, *HELD_OUT, "patience=4"])
    assert make_plan(enough, enough.make_task()).warnings == ()
