"""How long a run will take, told from finished runs like it and from nothing else."""

import json

import pytest

from highrank.base.saved import read_results
from highrank.config.words import compose_run
from highrank.train.pace import Times, about, near_of, pace_of, source

WORDS = ["model=tiny_llama", "task.n_train=16", "task.n_test=2", "batch_size=4", "method=hira", "r=2", "max_steps=12"]


def finished(steps, train_s, pace="p", **times):
    times = {"setup_s": 10.0, **times, "train_s": train_s}
    return {"status": "done", "pace": pace, "steps": steps, "time": {**times, "total_s": sum(times.values())}}


def write(folder, results):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"config_hash": "", **results}))


def test_the_middle_and_the_ends_of_what_runs_like_it_took(tmp_path):
    for place, results in {
        "2026-01-01/a": finished(10, 20.0),
        "2026-01-02/b": finished(20, 20.0, eval_final_s=5.0),
        "sweep_1/search/c": finished(100, 600.0),
        "sweep_1/other": finished(100, 1.0, pace="q"),
        "sweep_1/short": finished(3, 300.0),  # the first steps are slower
        "failed": {**finished(100, 1.0), "status": "failed"},
        "older": {key: value for key, value in finished(100, 1.0).items() if key != "pace"},
    }.items():
        write(tmp_path / place, results)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_text("{")
    times = Times([tmp_path, tmp_path])  # a folder named twice is read once
    found = times.expect("p", 50)
    assert (found.seconds, found.least, found.most, found.runs) == (10 + 50 * 2, 10 + 5 + 50, 10 + 50 * 6, 3)
    assert str(found) == "about 1 min 50 s (1 min 5 s to 5 min 10 s)"
    assert times.expect("p", 3).runs == 4  # as many steps as this one
    assert times.expect("nothing like it", 50) is None


def test_what_waited_for_a_run_counts_its_start():
    times = Times()
    times.add(finished(10, 20.0, pace=None), "p", lasted=37.0)
    assert times.expect("p", 10).seconds == 37
    assert times.expect("p", 20).seconds == 57


@pytest.mark.parametrize(
    ("words", "alike", "near"),
    [
        (["seed=3", "lr=1e-4", "max_steps=99", "run_dir=elsewhere", "patience=2", "schedule=cosine"], True, True),
        (["r=4"], False, True),
        (["method=lora"], False, True),
        (["placement=[q,v]"], False, True),
        (["batch_size=8"], False, False),
        (["model=tiny_phi3"], False, False),
        (["protocol.max_length=64"], False, False),
        (["eval_batch_size=1"], False, False),
        (["eval_before=false"], False, False),
    ],
)
def test_what_a_run_is_like(words, alike, near):
    run, other = (
        compose_run([*WORDS, "protocol.num_validation=2"]),
        compose_run([*WORDS, "protocol.num_validation=2", *words]),
    )
    assert (pace_of(run, 1) == pace_of(other, 1)) is alike
    assert (near_of(run) == near_of(other)) is near
    assert pace_of(run, 1) != pace_of(run, 2)


def test_a_dry_run_tells_the_time_once_it_has_been_measured(run_cli, tmp_path):
    dry = [*WORDS, "seed=1", "max_steps=24", "dry_run=true", f"run_dir={tmp_path / 'dry'}"]
    status, out, _ = run_cli(*dry)
    assert status == 0
    assert "no run like it has finished in" in out
    assert json.loads((tmp_path / "dry/plan.json").read_text())["time_s"] is None
    status, out, _ = run_cli(*WORDS, f"run_dir={tmp_path / 'outputs' / 'first'}")
    assert status == 0
    assert "time, measured" not in out
    results = read_results(tmp_path / "outputs" / "first")
    assert results["threads"] >= 1
    status, out, _ = run_cli(*dry)
    assert "from 1 run like it in" in " ".join(out.split())
    planned = json.loads((tmp_path / "dry/plan.json").read_text())["time_s"]
    parts = {key: value for key, value in results["time"].items() if key != "total_s"}
    assert planned["seconds"] == pytest.approx(sum(parts.values()) + 12 * parts["train_s"] / 12)
    assert planned["runs"] == 1


def test_words():
    assert about(60, 59.8, 60.2) == "about 1 min 0 s"
    assert (source(1, "outputs"), source(6, "outputs")) == (
        "from 1 run like it in outputs",
        "from 6 runs like it in outputs",
    )
