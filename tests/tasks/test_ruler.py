"""Long texts that hide what is asked for: answers are there, lengths hold, scoring is by the set of answers."""

import json
import re
from collections import Counter

import pytest

from highrank.base.registry import load
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.data.answers import judge_all
from highrank.data.encoding import give_tokens, prompt_text
from highrank.data.scoring import macro_averages
from highrank.model.tiny import tiny_tokenizer
from highrank.report import figures
from highrank.report.runs import read_runs
from highrank.report.scores import collect

KINDS = ("single", "multikey", "multivalue", "variables", "common_words", "two_hop")
PINNED = {"train": "4d990753f8cdeaea", "single_600": "7519602d56b469f6", "common_words_900": "49cff4cce6b559ff"}
"""Start of the sha256 of some sets, in bytes as tokens; a change raises the task's version."""
SMALL = ["task=ruler", "task.train_lengths=[600]", "task.test_lengths=[600,900]", "task.n_train=12", "task.n_test=2"]


@pytest.fixture(scope="module")
def run():
    return compose_run([*SMALL, "model=tiny_llama"])


@pytest.fixture(scope="module")
def task(run):
    made = run.make_task()
    give_tokens(made, run.protocol, tiny_tokenizer())
    return made


def every(task):
    return [*task.train(), *(row for rows in task.test().values() for row in rows)]


def test_the_answer_follows_from_the_text(task):
    for row in every(task):
        kind, text = row.id.split("-")[1], row.instruction
        if kind in ("single", "multikey", "multivalue"):
            key = re.search(r"codes? of (\w+)\?", text)[1]
            found = re.findall(rf"The code of {key} is (\d+)\.", text)
        elif kind == "variables":
            value, lets = re.search(r"value (\d+)\?", text)[1], re.findall(r"Let (\w+) = (\w+)\.", text)
            held = {}
            for name, given in lets:  # in their order: what is named was let before
                held[name] = held.get(given, given)
            assert all(value.isdigit() for value in held.values())
            found = [name for name, held_value in held.items() if held_value == value]
        elif kind == "common_words":
            counts = Counter(text.split("\n\n")[0].split()).most_common()
            assert counts[2][1] >= 3 * counts[3][1]
            found = [word for word, _ in counts[:3]]
        else:
            asked = re.search(r"colleague of (\w+) live", text)[1]
            other = re.search(rf"{asked} works with (\w+)\.", text)[1]
            found = re.findall(rf"{other} lives in (\w+)\.", text)
        assert sorted(found) == sorted(row.answers)
        assert row.output == row.answer == ", ".join(row.answers)


def test_lengths_are_the_tokenizers(run, task):
    tokenizer = tiny_tokenizer()
    for row in every(task):
        kind, length = row.id.split("-")[1], int(row.id.split("-")[2])
        prompt = tokenizer(prompt_text(row, run.protocol)).input_ids
        whole = len(prompt) + max(48, len(tokenizer(row.output, add_special_tokens=False).input_ids) + 1)
        assert length - (80 if kind == "common_words" else 40) < whole <= length
    long, short = task.test()["two_hop_900"], task.test()["two_hop_600"]
    assert min(len(row.instruction) for row in long) > max(len(row.instruction) for row in short)


def test_no_example_occurs_twice_and_codes_tell_the_splits_apart(task):
    rows = every(task)
    assert len({row.instruction for row in rows}) == len(rows)
    for split, parity in (("train", 1), ("test", 0)):
        codes = [int(n) for row in rows if row.id.startswith(split) for n in re.findall(r"\d{5}", row.instruction)]
        assert codes
        assert {code % 2 for code in codes} == {parity}


def test_a_seed_gives_the_same_examples_everywhere(task, run):
    found = {source["name"].partition("/")[2]: source["sha256"][:16] for source in task.sources()}
    assert {name: found[name] for name in PINNED} == PINNED
    other = compose_run([*SMALL, "task.data_seed=1"]).make_task()
    give_tokens(other, run.protocol, tiny_tokenizer())
    assert not {row.instruction for row in every(task)} & {row.instruction for row in every(other)}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("31, 12", True),
        ("12 and 31.", True),
        ("31,12\n", True),
        ("12", False),
        ("12, 31, 44", False),
        ("12, 12, 31", False),
        ("The answer is 12, 31", False),
        ("", False),
    ],
)
def test_all_answers_and_nothing_else_in_any_order(text, right):
    parsed, correct = judge_all(text, ("12", "31"))
    assert correct == right
    assert (parsed is None) == (text == "")


def test_averages_by_length(task):
    by_set = {name: {"accuracy": float(i), "loss": i / 2} for i, name in enumerate(task.test())}
    found = macro_averages(task, by_set)
    assert list(found) == ["accuracy", "loss", "accuracy_600", "loss_600", "accuracy_900", "loss_900"]
    assert [found["accuracy"], found["accuracy_600"], found["loss_900"]] == [5.5, 2.5, 4.25]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.test_lengths=[512,2048]"], "must fit the model's 1024 positions, got 2048 tokens"),
        (["protocol.max_length=512"], r"cut-off must hold its examples, got 900 tokens with protocol.max_length=512"),
        (["task.train_lengths=[60]"], r"a length must hold what is hidden, .*kind \w+ with length=60"),
        (["task.kinds=[singel]"], "unknown kinds, got kinds=singel; did you mean 'single'"),
        (["task.kinds=[single,single]"], "kinds must name one or more, each once"),
        (["task.test_lengths=[]"], "test_lengths must name one or more"),
        (["task.test_lengths=[0]"], "test_lengths are in tokens"),
        (["task.n_test=0"], "n_test must be >= 1"),
        (["method=prompt_tuning", "num_virtual_tokens=200"], "must fit the model's 824 positions, got 900 tokens"),
    ],
)
def test_what_cannot_be_is_said_before_weights(run_cli, monkeypatch, words, said):
    monkeypatch.setattr("highrank.train.build.load_backbone", None)
    status, _, err = run_cli(*SMALL, "model=tiny_llama", *words)
    assert status == 2
    assert re.search(said, err), err


def test_a_run_scores_every_kind_and_length(tmp_path, capsys):
    words = [*SMALL, "model=tiny_llama", "method=lora", "placement=qv", "max_steps=1", "eval_before=false"]
    words += ["task.kinds=[single,multivalue]", "task.n_train=4", "protocol.max_new_tokens=2"]
    assert main(["run", *words, f"run_dir={tmp_path / 'run'}"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    final = results["metrics"]["final"]
    assert list(final["sets"]) == ["single_600", "multivalue_600", "single_900", "multivalue_900"]
    assert all(
        scores["n"] == 2 and scores["loss"] > 0 and "loss_cut" not in scores for scores in final["sets"].values()
    )
    sets = final["sets"]
    assert final["loss_900"] == pytest.approx((sets["single_900"]["loss"] + sets["multivalue_900"]["loss"]) / 2)
    rows = (tmp_path / "run" / "predictions" / "multivalue_900.jsonl").read_text().splitlines()
    assert {"parsed", "correct", "nats"} <= json.loads(rows[0]).keys()
    assert results["tokens"]["cut_off"]["left_out"] == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == final
    records, _ = read_runs([tmp_path / "run"])
    name, _, _, figure = figures.lengths(collect(records))
    assert name == "lengths"
    assert [axis.get_ylabel() for axis in figure.axes] == ["score, %", "test loss, nats per token"]
    assert [list(axis.lines[0].get_xdata()) for axis in figure.axes] == [[600, 900], [600, 900]]


def test_the_task_says_its_kinds():
    cls = load("tasks", "ruler")
    assert set(cls(cls.config(), 0).test()) == {f"{kind}_{n}" for n in (512, 1024, 2048, 4096) for kind in KINDS}
