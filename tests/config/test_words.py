"""Words of the command line whose values are texts and paths: any name that a file can have."""

import json
import shlex

import pytest

from highrank.base.errors import UserError
from highrank.cli import main
from highrank.config.words import compose_run, given_text, parse, quoted, readable, spelled
from highrank.sweep.grid import expand
from highrank.sweep.sweep import Sweep
from highrank.train.saved import read_run, words_of

NAMES = [
    *(
        "plain",
        "müller",
        "データ",
        "a b",
        "a  b",
        "a=b",
        "a==b",
        "a (1)",
        "a#b",
        "#b",
        "it's",
        "[x]",
        "a[1]",
        "[a, b]",
        "a&b",
    ),
    *(
        "x;y",
        "100%",
        "a!b",
        'q"q',
        "a\\b",
        "a\\'b",
        "{a}",
        "{a: b}",
        "$x",
        "~x",
        "a:b",
        "a*b",
        "a?",
        "-x",
        "a|b",
        "<a>",
    ),
    *(
        "1e3",
        "007",
        "12",
        "1.50",
        "true",
        "nan",
        "f(x)",
        "glob(x)",
        "a@b",
        "a^b",
        "`a`",
        "été (1) #2 [x]&y='z'",
        "...",
        "a+b",
    ),
]
COMMAS = ["a,b", "a, b", "it's, (1)", "[a],[b]", "x=1,y=2"]
KEYS = ["run_dir", "output", "task.train", "task.data"]


def of(run, key):
    name = key.removeprefix("task.")
    value = getattr(run.task_cfg if name != key else run.core, name)
    return run.given.get(key, value)


def read(words, **how):
    return [parse(word).value() for word in readable(["task=jsonl", *words], **how)[1:]]


@pytest.mark.parametrize("name", [*NAMES, *COMMAS])
def test_a_path_is_taken_as_it_stands(name):
    assert read(f"{key}={name}" for key in KEYS) == [name] * len(KEYS)
    assert given_text(f"sweep_dir={name}") == name
    assert parse(f"x={spelled(name)}").value() == name
    assert read(shlex.split(quoted(f"{key}={name}"))[0] for key in KEYS) == [name] * len(KEYS)


@pytest.mark.parametrize("name", ["été (1), #2 [x]&y='z'", "[x]", "12", "a,b"])
def test_so_it_reaches_the_run_and_comes_back(name):
    run = compose_run(["task=jsonl", *(f"{key}={name}" for key in KEYS)])
    assert [of(run, key) for key in KEYS] == [name] * len(KEYS)
    assert compose_run(words_of(run)).task_cfg == run.task_cfg


@pytest.mark.parametrize("name", NAMES)
def test_in_a_sweep_too_where_a_comma_separates_values(name):
    assert read([f"task.train={name}"], multirun=True) == [name]
    (word,) = readable([f"run_dir={spelled(name)},other"], multirun=True)
    texts = [parse(f"x={each}").value() for each in parse(word).sweep_string_iterator()]
    assert texts == [name, "other"]


@pytest.mark.parametrize("name", ["été (1), #2 [x]&y='z'", "[x]", "12", "plain"])
def test_so_it_reaches_the_cells(name):
    cells = expand(["task=jsonl", f"task.train={spelled(name)},other"]).cells
    assert [cell.axes for cell in cells] == [{"task.train": name}, {"task.train": "other"}]
    assert [of(cell.run, "task.train") for cell in cells] == [name, "other"]


def test_a_pattern_is_no_axis():
    with pytest.raises(UserError, match=r"an axis has listed values, got placement=glob\(a\)"):
        expand(["placement=glob(a)"])


def test_a_comma_within_a_name_is_quoted_in_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"""write "task.train='a \(1\),b'", and each of several texts in quotes of its own"""
    ):
        expand(["task=jsonl", "seed=0,1", "task.train=a (1),b"])
    (tmp_path / "a,b").write_text("")
    with pytest.raises(
        UserError, match=r"""a comma separates values, got the one path .*; write "task.train='a,b'"$"""
    ):
        expand(["task=jsonl", "seed=0,1", "task.train=a,b"])
    (cell, _) = expand(["task=jsonl", "seed=0,1", "task.train='a,b'"]).cells
    assert of(cell.run, "task.train") == "a,b"


@pytest.mark.parametrize("name", ["a b", "x=1, y", "sw'eep", "12"])
def test_a_sweeps_folder_is_parsed_by_the_rule_of_a_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (name, spelled(name)):
        assert str(Sweep(["seed=0,1", f"sweep_dir={value}"], main).folder) == name
        assert Sweep(["seed=0,1", f"output={value}"], main).folder.parent.name == name


@pytest.mark.parametrize("text", ["a=b", "12", "1e5", "deadbeef", "1234567", "it's"])
def test_so_is_a_text(text):
    assert compose_run([f"model.revision={text}"]).model["revision"] == text
    template = f"{text}: {{instruction}}\n"
    assert compose_run([f"protocol.template={template}"]).protocol.template == template


def test_another_word_is_told_how_to_be_quoted():
    with pytest.raises(UserError, match=r"""got layers=\{; for a text as it stands write "layers='\{'"$"""):
        compose_run(["layers={"])


def test_a_run_with_such_names_is_trained_and_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "Übung (1), ä=b & c's [x] #2.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"{i}?", "output": f"{i}"}) + "\n" for i in range(4)))
    test = tmp_path / "データ,1.jsonl"
    test.write_text(json.dumps({"instruction": "9?", "output": "9"}))
    folder = tmp_path / "läuft (1), a=b"
    tiny = ["model=tiny_llama", "method=lora", "r=1", "placement=q", "max_steps=1", "eval_before=false", "lr=1e-2"]
    words = ["task=jsonl", f"task.train={data.name}", f"task.test={test.name}", "protocol.max_new_tokens=2"]
    assert main(["run", *tiny, *words, f"run_dir={folder.name}"]) == 0
    assert read_run(folder).task_cfg.train == str(data)
    assert main(["eval", folder.name, f"task.test={test.name}"]) == 0
    (tmp_path / "a=b").symlink_to(folder)
    assert main(["eval", "a=b"]) == 0  # a folder, though it reads like a word
    capsys.readouterr()
    assert (
        main(
            [
                "run",
                "-m",
                *tiny,
                *words[:1],
                f"task.train={spelled(data.name)}",
                f"task.test={spelled(test.name)}",
                "protocol.max_new_tokens=2",
                "seed=0,1",
                "sweep_dir=swe=ep, (1)",
            ]
        )
        == 0
    )
    assert (tmp_path / "swe=ep, (1)" / "table.csv").is_file()
