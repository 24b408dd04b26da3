"""`highrank runs`: every run in a folder, whatever state it is in, and those that a condition names."""

import json
import shutil

import pytest
from tiny_run import write

from highrank.base.errors import UserError
from highrank.base.saved import read_config
from highrank.find.runs import same


def table(out):
    head, *lines = out.splitlines()
    return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]


def names(out):
    return [row["run"].rpartition("/")[2] for row in table(out)]


def test_each_run_is_a_line_with_what_came_out(outputs, highrank):
    status, out, err = highrank("runs")
    assert status == 0
    rows = {row["run"].rpartition("/")[2]: row for row in table(out)}
    assert {name: row["status"] for name, row in rows.items()} == {
        **{"hira": "done", "lora": "done", "running": "running", "failed": "failed", "damaged": "damaged"}
    }
    results = json.loads((outputs / "2026-01-01/lora/results.json").read_text())
    lora = rows["lora"]
    assert lora["run"] == "outputs/2026-01-01/lora"
    assert (lora["method"], lora["trained"]) == ("lora", f"{results['params']['trainable']:,}")
    assert lora["score"] == f"accuracy {results['metrics']['final']['accuracy']:.1f}"
    assert rows["running"]["score"] == rows["damaged"]["method"] == ""
    assert "results.json is damaged" in err
    assert "outputs/2026-01-01/damaged" in err
    assert list(rows)[-2:] == ["lora", "hira"]  # the newest nearest to the prompt


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        (["method=lora"], ["lora"]),
        (["method=hira", "status=done"], ["hira"]),
        (["lr=1e-3"], ["lora"]),
        (["r=4", "seed=1"], ["lora"]),
        (["r=4", "seed=0"], []),
        (["R=w0"], ["failed", "running", "hira"]),
        (["task.n_train=16", "method=lora"], ["lora"]),
        (["task=wordmath", "packing=false", "status=failed"], ["failed"]),
        (["betas=[0.9, 0.999]", "max_steps=3", "path=null", "status=running"], ["running"]),
        (["lr_ratio=1"], ["lora"]),
    ],
)
def test_conditions_are_words_as_a_run_takes_them(outputs, highrank, conditions, found):
    status, out, _ = highrank("runs", "outputs", *(word for each in conditions for word in ("--where", each)))
    assert status == 0
    assert sorted(names(out)) == sorted(found)


def test_a_field_younger_than_a_run_has_its_default(outputs, highrank):
    config = outputs / "2026-01-01/lora/config.yaml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "lr_ratio" not in line))
    assert names(highrank("runs", "--where", "lr_ratio=1.0")[1]) == ["lora"]
    assert names(highrank("runs", "--where", "lr_ratio=2")[1]) == []


def test_lines_are_ordered_by_what_is_asked_for(outputs, highrank):
    for run, accuracy in (("hira", 50.0), ("lora", 25.0)):
        results = json.loads((outputs / "2026-01-01" / run / "results.json").read_text())
        results["metrics"]["final"]["accuracy"] = accuracy
        write(outputs / "2026-01-01" / run, results)
    assert names(highrank("runs", "--sort", "score")[1])[-2:] == ["lora", "hira"]
    assert names(highrank("runs", "--sort", "method")[1])[-1] == "lora"


def test_a_terminal_gets_a_table_with_a_sum(outputs, highrank, terminal):
    status, out, _ = highrank("runs", "--where", "status=done")
    assert status == 0
    assert "│ 2026-01-01/lora │" in out
    assert "\t" not in out
    assert "2 of 5 runs: 2 done" in out


def test_trials_of_a_rate_search_are_left_out_and_a_run_is_a_folder_too(outputs, highrank):
    shutil.copytree(outputs / "2026-01-01/hira", outputs / "sweep_1/search/trial")
    assert "trial" not in names(highrank("runs")[1])
    assert names(highrank("runs", outputs / "sweep_1/search")[1]) == ["trial"]
    assert names(highrank("runs", outputs / "2026-01-01/lora")[1]) == ["lora"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "runs: a folder is needed, got nowhere, which is not there"),
        (["outputs/notes"], "runs: no run is in outputs/notes"),
        (["outputs/2026-01-01/hira/results.json"], "got outputs/2026-01-01/hira/results.json, a file"),
        (["--where", "metod=hira"], "no run has the key metod, got --where metod=hira; did you mean 'method'"),
        (["--where", "method"], "--where takes key=value, got --where method; use: highrank runs"),
        (["--sort", "colour"], "invalid choice: 'colour'"),
        (["outputs", "outputs"], "use: highrank runs [FOLDER]"),
    ],
)
def test_what_cannot_be_listed_is_said_with_what_can(outputs, highrank, words, said):
    status, _, err = highrank("runs", *words)
    assert status == 2
    assert said in err


def test_values_are_compared_as_what_they_are():
    assert same(0.005, "5e-3")
    assert same(True, "true")
    assert same(None, "null")
    assert same("w0", "'w0'")
    assert same(["q", "v"], "[q,v]")
    assert not same(0.005, "small")
    assert not same(1, "true")
    assert not same([1], "[1")


def test_some_keys_of_a_config_are_read_as_in_the_whole(two_runs, tmp_path):
    whole = read_config(two_runs / "hira")
    for key in ("protocol", "betas", "lr", "task"):  # texts of several lines, lists, numbers, mappings
        assert read_config(two_runs / "hira", {"method", key}) == {"method": whole["method"], key: whole[key]}
    assert read_config(tmp_path) == {}
    for text in ("method: [", "- a\n", "lr: 1\n", ""):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"run: config\.yaml is damaged"):
            read_config(tmp_path)


def test_a_value_that_no_run_has_is_said_with_those_there_are(outputs, highrank):
    status, out, err = highrank("runs", "--where", "method=bitfit")
    assert (status, out.count("\n")) == (0, 1)
    assert "no run has method=bitfit; there are: hira, lora\n" in err
