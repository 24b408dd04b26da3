"""A damaged run: one line that names the file and the fault, whoever reads it; the others stay in the tables."""

import json

import pytest
import yaml

import highrank as library
from highrank.base.errors import UserError
from highrank.report import figures
from highrank.report.dashboard import write_run
from highrank.train.pace import Times

FAULTS = {
    "empty": ("results.json", ""),
    "half": ("results.json", '{"status": "done", "config_'),
    "no text": ("results.json", "\xff"),
    "a list": ("results.json", "[]"),
    "brackets without end": ("results.json", "[" * 20_000),
    "no status": ("results.json", {"status": ...}),
    "an unknown status": ("results.json", {"status": "finished"}),
    "a hash of another type": ("results.json", {"config_hash": 3}),
    "a number for times": ("results.json", {"time": 3}),
    "a text for a time": ("results.json", {"time": {"train_s": "long"}}),
    "no number for a time": ("results.json", {"time": {"train_s": float("nan")}}),
    "a list for scores": ("results.json", {"metrics": {"final": []}}),
    "a number for sets": ("results.json", {"metrics": {"final": {"sets": 3}}}),
    "a text for a score": ("results.json", {"metrics": {"final": {"accuracy": "high"}}}),
    "counts without percent": ("results.json", {"params": {"trainable": 3, "total": 4}}),
    "steps of another type": ("results.json", {"steps_planned": "many"}),
    "data without names": ("results.json", {"data": [{}]}),
    "a model without a name": ("results.json", {"model": {}}),
    "no validation loss": ("results.json", {"validation": {}}),
    "no yaml": ("config.yaml", "method: [a"),
    "a yaml list": ("config.yaml", "- method"),
    "an empty config": ("config.yaml", ""),
    "a text for the method": ("config.yaml", {"method": "hira"}),
    "a list for the task": ("config.yaml", {"task": []}),
    "a text for the rate": ("config.yaml", {"lr": "fast"}),
    "a set": ("config.yaml", "method: {name: hira}\nr: !!set {a}"),
    "a key that is no text": ("config.yaml", "method: {name: hira, 1: 2}"),
}


@pytest.fixture(params=FAULTS)
def damaged(outputs, request):
    """Returns a run in which one file is damaged, and the name of the file."""
    run = outputs / "2026-01-01/damaged"
    (run / "results.json").write_bytes((run.parent / "hira/results.json").read_bytes())
    name, change = FAULTS[request.param]
    text = change
    if isinstance(change, dict):
        held = {**yaml.safe_load((run / name).read_text()), **change}
        held = {key: value for key, value in held.items() if value is not ...}
        text = json.dumps(held) if name == "results.json" else yaml.safe_dump(held)
    (run / name).write_text(text, encoding="latin-1")
    return run, name


def test_it_stands_among_the_others_and_alone_is_one_error(damaged, highrank, monkeypatch):
    run, file = damaged
    monkeypatch.setattr(figures, "draw", lambda results: [])
    said = f"run: {file} is damaged, got "
    read = [] if file == "results.json" else ["--where", "lr=0.005", "--where", "task=wordmath", "--where", "r=2"]
    status, out, err = highrank("runs", *read)
    assert status == 0
    assert len(out.splitlines()) == 6 if not read else "outputs/2026-01-01/hira\tdone" in out
    assert err.startswith(f"{run}: {said}")
    assert err.count("\n") == 1
    for words in (["show", run], ["watch", run], ["show", run.parent / "lora", "--against", run]):
        status, out, err = highrank(*words)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {said}")
        assert err.count("\n") == 1
    for words in (["analyze", run], ["eval", run], ["merge", run, "--out", "new"]):
        status, _, err = highrank(*words)
        assert status == 2
        assert err.startswith(f"error: {said}")
        assert err.count("\n") == 1
    with pytest.raises(UserError, match=said):
        library.load(run)
    status, out, _ = highrank("report", run.parent, "--out", "report", "--mix", "data")
    assert status == 0
    assert f"not in the tables: damaged: damaged ({said}" in out
    Times([run.parent.parent])
    write_run(run)


@pytest.mark.parametrize("command", ["eval", "merge", "analyze"])
def test_what_is_no_run_is_said_with_what_it_is(outputs, highrank, command):
    words = ["--out", "new"] if command == "merge" else []
    (outputs / "s").mkdir()
    (outputs / "s/sweep.json").write_text("{}")
    for folder, said in (
        ("nowhere", "which is not there"),
        ("outputs/notes", "which has no results.json"),
        ("outputs/s", "sweep"),
    ):
        status, _, err = highrank(command, folder, *words)
        assert status == 2
        assert said in err
        assert err.count("\n") == 1
