"""One task after another: both are scored at each stage, and a report sets what was gained against what was lost."""

import json

import pytest

from highrank.base.errors import UserError
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.report import figures, retention
from highrank.report.runs import read_runs
from highrank.report.scores import collect
from highrank.train.plan import make_plan
from highrank.train.saved import read_run, words_of

SMALL = ["model=tiny_llama", "batch_size=4", "max_steps=2", "lr=0.05", "placement=qv", "protocol.max_new_tokens=2"]
RULER = "{kinds: [single], train_lengths: [400], test_lengths: [400], n_train: 4, n_test: 2}"
WORDS = "{n_train: 8, n_test: 2}"
FIRST = [
    *SMALL,
    "task=wordmath",
    "task.n_train=8",
    "task.n_test=2",
    f"eval_also={{ruler: {RULER}}}",
    "eval_before=false",
]
SECOND = [*SMALL, "task=ruler", "task.kinds=[single]", "task.train_lengths=[400]", "task.test_lengths=[400]"]
SECOND += ["task.n_train=4", "task.n_test=2", f"eval_also={{wordmath: {WORDS}}}"]
METHODS = {"hira": ["method=hira", "r=2"], "lora": ["method=lora", "r=2"]}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    text = root / "general.txt"
    text.write_text("The river is long.\nCats sleep most of the day.")
    for name, method in METHODS.items():
        always = [*method, f"general_text={text}"]
        assert main(["run", *FIRST, *always, f"run_dir={root / name}-1"]) == 0
        assert main(["run", *SECOND, *always, f"start_from={root / name}-1", f"run_dir={root / name}-2"]) == 0
    return root


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_both_tasks_are_scored_at_each_stage(stages):
    for name in METHODS:
        first, second = results(stages / f"{name}-1"), results(stages / f"{name}-2")
        assert second["start"]["as"] == "adapter"
        assert second["metrics"]["before"] == first["also"]["ruler"]["final"]
        before, final = second["also"]["wordmath"]["before"], first["metrics"]["final"]
        assert before["loss"] == final["loss"]
        assert second["also"]["wordmath"]["final"]["loss"] != final["loss"]
        assert [row["rows"] for row in second["also"]["wordmath"]["data"]] == [8, 2]
        predictions = {file.name for file in (stages / f"{name}-2" / "predictions").iterdir()}
        assert {"single_400.jsonl", "wordmath.wordmath.jsonl", "wordmath.wordmath.before.jsonl"} <= predictions
        assert second["forgetting"]["base_loss"] == first["forgetting"]["base_loss"]


def test_training_is_the_same_without(stages, tmp_path):
    assert main(["run", *FIRST, *METHODS["lora"], "eval_also=null", f"run_dir={tmp_path / 'run'}"]) == 0
    with_, without = ((f / "adapter/adapter.safetensors").read_bytes() for f in (stages / "lora-1", tmp_path / "run"))
    assert with_ == without
    assert results(tmp_path / "run")["config_hash"] != results(stages / "lora-1")["config_hash"]


def test_a_saved_run_is_read_as_it_was(stages):
    run = read_run(stages / "lora-2")
    assert run.also["wordmath"].task_cfg.n_test == 2
    assert compose_run(words_of(run)).hash == run.hash
    both = compose_run(["task=commonsense170k", "protocol=hyperadapt", "eval_also=[math10k]"])
    assert (both.protocol.max_length, both.also["math10k"].protocol.max_length) == (256, 512)
    assert compose_run(words_of(both)).also["math10k"].protocol == both.also["math10k"].protocol


def test_gain_against_forgetting(stages):
    records, _ = read_runs([stages / f"{name}-2" for name in METHODS])
    collected = collect(records)
    made = retention.table(collected)
    row = dict(zip(made.columns, made.rows[0], strict=True))
    second = results(stages / f"{row['method'].value}-2")
    before, after = (second["also"]["wordmath"][when]["loss"] for when in ("before", "final"))
    assert row["wordmath: loss before"].value == before
    assert row["wordmath: loss change"].value == pytest.approx(after - before)
    assert row["general text: loss change"].value == pytest.approx(second["forgetting"]["forgetting"])
    name, _, _, figure = figures.retained(collected)
    labels = {(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes if axis.get_visible()}
    loss = "nats per token"
    assert name == "retention"
    assert labels == {
        ("lost on wordmath, points", "gained on the trained task, points"),
        ("lost on general text, nats per token", "gained on the trained task, points"),
        (f"lost on wordmath, {loss}", f"gained on the trained task, {loss}"),
        (f"lost on general text, {loss}", f"gained on the trained task, {loss}"),
    }
    axis = next(axis for axis in figure.axes if axis.get_xlabel() == f"lost on wordmath, {loss}")
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines[:2]}
    assert any(x == pytest.approx(after - before) for x, _ in points)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval_also=[wordmth]", "unknown name, got task=wordmth; did you mean 'wordmath'"),
        ("eval_also={ruler: {n_tst: 2}}", "ruler has no field 'n_tst'"),
        ("eval_also=[ruler]", "must fit the model's 1024 positions, got 4096 tokens"),
        ("eval_also=[glue]", "eval_also takes tasks of the run's kind, got glue"),
        ("eval_also=3", "eval_also is a list of tasks, or a mapping"),
        ("eval_also=[]", "eval_also is a list of tasks, or a mapping"),
    ],
)
def test_what_cannot_be(words, said):
    with pytest.raises(UserError, match=said):
        plan([*SMALL, words])


def plan(words):
    run = compose_run(words)
    return make_plan(run, run.make_task())
