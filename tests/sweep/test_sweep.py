"""Sweeps end to end: what is done stays, what fails is recorded, what is killed goes on."""

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from highrank.cli import main

ROOT = Path(__file__).parents[2]
TINY = ["model=tiny_llama", "task.n_train=40", "task.n_test=2", "max_steps=2", "batch_size=2", "placement=q"]

LOADED = re.compile(r"torchao|torch/utils/_pytree\.py.* is an Enum subclass|no triton")


@pytest.fixture
def sweep(tmp_path, capfd):
    """Returns a function that runs a sweep in this process: (exit status, folder, stdout, stderr).

    Of stderr without what torchao, where it is installed, makes of being loaded here and in the processes of the runs.
    """

    def call(*words, tiny=TINY):
        status = main(["run", "-m", f"sweep_dir={tmp_path / 'sweep'}", *tiny, *words])
        out = capfd.readouterr()
        err = "".join(line for line in out.err.splitlines(keepends=True) if not LOADED.search(line))
        return status, tmp_path / "sweep", out.out, err

    return call


def rows(folder):
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def started(folder):
    """Returns how often each run was started: a run prints its plan's title when it starts to work."""
    return {log.stem: log.read_text().count("adapted weights") for log in (folder / "logs").glob("*.txt")}


def test_a_sweep_runs_every_cell_once(sweep):
    status, folder, out, err = sweep("method=hira,hyperadapt", "r=2,4", "seed=0")
    assert (status, err) == (0, "")
    assert out.strip().splitlines()[-1] == str(folder)
    found = rows(folder)
    assert [(row["method"], row["r"]) for row in found] == [("hira", "2"), ("hira", "4"), ("hyperadapt", "")]
    assert {row["status"] for row in found} == {"done"}
    record = json.loads((folder / "sweep.json").read_text())
    assert record["axes"] == {"method": ["hira", "hyperadapt"], "r": [2, 4]}
    for cell, row in zip(record["cells"], found, strict=True):
        results = json.loads((folder / cell["run"] / "results.json").read_text())
        assert results["config_hash"] == cell["config_hash"]
        assert float(row["accuracy"]) == results["metrics"]["final"]["accuracy"]

    status, _, out, _ = sweep("method=hira,hyperadapt", "r=2,4", "seed=0,1")  # three more cells
    assert status == 0
    assert "6 runs, 3 done before" in out
    assert set(started(folder).values()) == {1}
    status, _, _, err = sweep("method=hira", "r=2,4", "seed=0,1")
    assert status == 2
    assert "keeps its cells" in err


def test_a_failing_run_is_recorded_and_the_rest_goes_on(sweep, tmp_path):
    broken = tmp_path / "without_weights"
    broken.mkdir()
    (broken / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "intermediate_size": 32,
                "vocab_size": 300,
            }
        )
    )
    status, folder, out, _ = sweep(f"path=null,{broken}", "method=hyperadapt")
    assert status == 1
    assert [row["status"] for row in rows(folder)] == ["done", "failed"]
    assert "failed: " in out
    assert rows(folder)[1]["accuracy"] == ""


@pytest.mark.parametrize("content", [b"", b'{"status": "done", "metr', b"[]"])
def test_a_damaged_run_is_left_as_it_is_and_the_rest_goes_on(sweep, content):
    """What is left of it may still be mended by hand; before, the sweep wrote `failed` over it."""
    status, folder, *_ = sweep("method=hira,hyperadapt", "r=2")
    assert status == 0
    run = next(folder.glob("hira*"))
    (run / "results.json").write_bytes(content)
    held = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    status, folder, out, _ = sweep("method=hira,hyperadapt", "r=2", "seed=0,1")
    assert status == 1
    assert "4 runs, 1 done before, 1 damaged" in out
    said = " ".join(out.split())
    assert f"warning: {run.name} is left as it is: run: results.json is damaged, got " in said
    assert "bring it back, or move the folder away" in said
    assert sorted(row["status"] for row in rows(folder)) == ["damaged", "done", "done", "done"]
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == held
    assert started(folder)[run.name] == 1
    run.rename(folder.parent / "away")
    assert sweep("method=hira,hyperadapt", "r=2", "seed=0,1")[0] == 0


FOREIGN = ["", "{", "[]", "{}", '{"lr_search": 5, "cells": []}', '{"lr_search": null, "cells": [{"axes": {}}]}', "\xff"]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_damaged_or_foreign_plan_is_named_and_left_alone(sweep, tmp_path, monkeypatch, content):
    """The last but one is of before cells had `asked`."""
    file = tmp_path / "sweep" / "sweep.json"
    file.parent.mkdir()
    file.write_text(content, encoding="latin-1")
    monkeypatch.setattr("highrank.sweep.sweep.Sweep._run", lambda *_: pytest.fail("ran"))
    status, _, _, err = sweep("method=hira")
    assert status == 2
    (said,) = err.splitlines()
    assert said.startswith("error: sweep: sweep.json must be whole, as a sweep wrote it, got ")
    assert f" in {file}; " in said
    assert file.read_text(encoding="latin-1") == content
    assert list(file.parent.iterdir()) == [file]


def test_a_dry_run_writes_nothing(sweep):
    status, folder, out, _ = sweep("method=hira,hyperadapt", "r=2,4", "dry_run=true", "lr_search=3")
    assert status == 0
    assert not folder.exists()
    assert "3 runs, 0 done before, and at most 9 runs to search" in " ".join(out.split())


def test_two_sweeps_in_one_folder(sweep, tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    with (folder / "sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, _, err = sweep("seed=0,1")
    assert status == 2
    assert "one sweep at a time" in err
    (folder / "sweep.lock").unlink()
    (folder / "thesis.tex").write_text("x")
    assert sweep("seed=0,1")[0] == 2


def test_every_arm_gets_the_same_search(sweep):
    words = ["method=hira,hyperadapt", "r=2", "seed=1,2", "lr_search=[1e-4,1e-2]", "protocol.num_validation=4"]
    status, folder, _, err = sweep(*words)
    assert (status, err) == (0, "")
    record = json.loads((folder / "sweep.json").read_text())
    search = record["lr_search"]
    assert (search["values"], search["seed"]) == ([1e-4, 1e-2], 1)
    assert [arm["axes"] for arm in search["arms"]] == [{"method": "hira"}, {"method": "hyperadapt"}]
    for arm in search["arms"]:
        assert [trial["lr"] for trial in arm["trials"]] == [1e-4, 1e-2]
        best = min(arm["trials"], key=lambda trial: trial["loss"])
        assert (arm["lr"], arm["at_edge"]) == (best["lr"], True)
        for trial in arm["trials"]:
            results = json.loads((folder / "search" / trial["run"] / "results.json").read_text())
            assert results["validation"] == {"loss": trial["loss"], "n": 4}
            assert "final" not in results.get("metrics", {})  # no test set was looked at
    assert [float(row["lr"]) for row in rows(folder)] == [arm["lr"] for arm in search["arms"] for _ in range(2)]
    assert sweep(*words)[0] == 0
    assert set(started(folder).values()) == {1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lr_search=1"], "lr_search is a list"),
        (["lr_search=[1e-3]"], "lr_search is a list"),
        (["lr_search=[1e-3,-1]"], "lr_search is a list"),
        (["lr_search=fast"], "lr_search is a list"),
        (["lr_search=[1e-3,1e-3]"], "lr_search is a list"),
        (["lr_search=3", "lr=1e-3"], "either searched or given"),
        (["lr_search_most=5"], "lr_search_most=5 without lr_search; give both"),
        (["lr_search=3", "lr_search_most=2"], "from lr_search's 3 to 20, got lr_search_most=2"),
        (["lr_search=[1e-3,1e-2]", "lr_search_most=many"], "from lr_search's 2 to 20, got lr_search_most=many"),
        (["jobs=0"], "jobs is a whole number"),
        (["launcher=slrum"], "did you mean 'slurm'"),
        (["run_dir=x"], "use sweep_dir"),
        (["scale=small"], "scale belongs to an experiment"),
    ],
)
def test_bad_words(sweep, words, said):
    status, folder, _, err = sweep("seed=0,1", *words)
    assert status == 2
    assert said in err
    assert not folder.exists()


def command(folder):
    words = ["method=hira,hyperadapt", "r=2", "seed=0,1,2", *TINY, "max_steps=12"]
    return [sys.executable, str(ROOT / "run.py"), "-m", *words, f"sweep_dir={folder}"]


def test_a_killed_sweep_goes_on(tmp_path):
    """Killed twice, once with its runs and once alone: nothing is lost, nothing done twice, the table is the same."""
    whole = subprocess.run(command(tmp_path / "whole"), capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed"
    done = 0
    for wanted, group in ((1, True), (3, False)):
        process = subprocess.Popen(
            command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            done = sum('"status": "done"' in f.read_text() for f in folder.glob("*/results.json"))
            if done >= wanted:
                break
            time.sleep(0.05)
        assert done >= wanted
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
    last = subprocess.run(command(folder), capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert f"{done} done before" in last.stdout or done < 6
    assert (folder / "table.csv").read_text() == (tmp_path / "whole" / "table.csv").read_text()
    for log in (folder / "logs").glob("*.txt"):
        assert log.read_text().count(": done") <= 1, log.name  # 0: killed between its results and its last table


def test_ctrl_c_stops_the_sweep_and_its_run(tmp_path):
    process = subprocess.Popen(
        [*command(tmp_path / "sweep"), "seed=0,1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "sweep").glob("*/results.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    states = [tmp_path / "sweep" / cell["run"] / "results.json" for cell in record["cells"]]
    found = [json.loads(file.read_text())["status"] for file in states if file.exists()]
    assert "running" not in found
    assert len(found) < len(record["cells"])
