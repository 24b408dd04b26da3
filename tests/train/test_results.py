"""The run directory: one run each, never written over, always whole files."""

import errno
import io
import json
import os
import re
import shutil

import pytest

from highrank.base import files
from highrank.base.errors import UserError
from highrank.base.files import write_atomic
from highrank.base.saved import read_results
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.model.backbones import load_backbone
from highrank.train.results import RunDirectory
from highrank.train.saved import load_run, read_run

WORDS = ["method=lora", "r=2", "model=tiny_llama", "placement=[q]", "max_steps=2", "batch_size=2"]
WORDS += ["task.n_train=4", "task.n_test=1", "eval_before=false"]


def snapshot(folder):
    """Returns path -> (content, time of change) of every file."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def run(folder, *words):
    return main(["run", *WORDS, f"run_dir={folder}", *words])


def directory(folder, *words):
    return RunDirectory(compose_run([*WORDS, f"run_dir={folder}", *words]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIGHRANK_CACHE", str(folder.parent / "cache"))
        assert run(folder) == 0
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr("highrank.run.fine_tune", lambda *_: pytest.fail("trained"))


def test_a_run_leaves_its_files_and_what_made_it(finished):
    assert {"config.yaml", "results.json", "adapter", "checkpoints", "predictions"} <= set(os.listdir(finished))
    found = read_results(finished)
    assert found["status"] == "done"
    assert found["config_hash"] == compose_run(WORDS).hash
    expected = {"git", "versions", "model", "data", "protocol", "params", "metrics", "time", "memory", "tokens", "seed"}
    assert expected <= found.keys()
    assert not list(finished.rglob("*.partial"))


def test_the_last_line_is_the_run_directory_and_a_finished_run_is_not_run_again(finished, capsys, no_training):
    before = snapshot(finished)
    assert run(finished) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == str(finished)
    assert "nothing was run again" in " ".join(output.split())
    assert snapshot(finished) == before


def test_keys_that_change_no_result_make_no_other_run(finished, no_training):
    before = snapshot(finished)
    assert run(finished, "eval_batch_size=7", "output=elsewhere") == 0
    assert snapshot(finished) == before


def test_another_config_in_a_run_directory_is_refused(finished, capsys, no_training):
    before = snapshot(finished)
    assert run(finished, "lr=0.5") == 2
    message = capsys.readouterr().err
    assert "lr=0.001 instead of 0.5" in message
    assert f"run_dir={finished}" in message
    assert "choose another run_dir" in message
    assert snapshot(finished) == before


@pytest.mark.parametrize("content", [b"", b'{"status": "do', b"\xff\xfe", b"[]", b"{}"])
def test_a_damaged_results_file_is_named_and_left_alone(tmp_path, content, capsys, no_training):
    (tmp_path / "results.json").write_bytes(content)
    before = snapshot(tmp_path)
    assert run(tmp_path) == 2
    message = capsys.readouterr().err
    assert "results.json is damaged" in message
    assert str(tmp_path) in message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", "config.yaml", "adapter"])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, name, capsys, no_training):
    (tmp_path / name).write_text("mine")
    before = snapshot(tmp_path)
    assert run(tmp_path) == 2
    assert f"a run directory is empty or holds a run, got run_dir={tmp_path} with ['{name}']" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_an_empty_folder_and_a_planned_one_are_free(tmp_path):
    assert directory(tmp_path).read().get("status") != "done"
    (tmp_path / "plan.json").write_text("{}")
    assert directory(tmp_path).read().get("status") != "done"


def test_a_run_killed_at_any_write_can_be_started_again(tmp_path, monkeypatch):
    """Whichever file the kill leaves as the last one, the same run is let in and another one is not."""
    written = []

    def killed_after(count):
        def write(path, data):
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(path.name)
            write_atomic(path, data)

        return write

    for count in (0, 1, 2):
        folder = tmp_path / str(count)
        written.clear()
        monkeypatch.setattr("highrank.train.results.write_atomic", killed_after(count))
        if count < 2:
            with pytest.raises(KeyboardInterrupt):
                directory(folder).open()
        else:
            directory(folder).open()
        assert directory(folder).read().get("status") != "done"
        if count:
            with pytest.raises(UserError, match="keeps its config"):
                directory(folder, "seed=1").read()


def test_a_second_try_keeps_nothing_of_the_first(tmp_path):
    first = directory(tmp_path)
    first.open()
    first.write(status="failed", error="RuntimeError: x")
    second = directory(tmp_path)
    assert second.read().get("status") != "done"
    second.open()
    assert "error" not in read_results(tmp_path)


def test_checkpoints_that_cannot_be_deleted_are_not_gone_on_from(tmp_path, monkeypatch):
    """With resume=never: else the run would silently take them up."""
    folder = directory(tmp_path, "resume=never")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only"):
        folder.kept({}, {}, [])
    monkeypatch.undo()
    assert folder.kept({}, {}, []) == {}
    assert not (tmp_path / "checkpoints").exists()


def test_results_are_merged_key_by_key(tmp_path):
    folder = directory(tmp_path)
    folder.open()
    folder.write(steps=2)
    folder.write(status="done")
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["steps"], found["status"], found["seed"]) == (2, "done", 0)


def test_predictions_are_one_object_a_line_in_order(tmp_path):
    folder = directory(tmp_path)
    folder.open()
    rows = [{"id": "b", "text": "§\n"}, {"id": "a", "text": ""}]
    folder.write_predictions("set", rows)
    lines = (tmp_path / "predictions" / "set.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, step, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data):
            super().write(data[:2])
            raise OSError("disk full")

    def fail(*_):
        raise OSError("disk full")

    file = tmp_path / "results.json"
    write_atomic(file, b"old")
    if step == "write":
        monkeypatch.setattr(files, "open", FullDisk, raising=False)
    else:
        monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    monkeypatch.undo()
    write_atomic(file, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("results.json", b"new")]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("results.json", errno.EROFS),
        ("last.ckpt", errno.ENOSPC),
        ("adapter.json", errno.EACCES),
        ("wordmath.jsonl", errno.EDQUOT),
    ],
)
def test_a_disk_that_refuses_is_one_error_and_the_run_goes_on_later(
    finished, tmp_path, monkeypatch, capsys, name, number
):
    def refuse(old, new, replace=os.replace):
        if os.path.basename(new) == name:
            raise OSError(number, os.strerror(number), str(new))
        replace(old, new)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert run(folder) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: run: its files must be writable, got ")
    assert os.strerror(number) in said
    assert "give the same command again" in said
    assert not list(folder.rglob("*.partial"))
    assert run(folder) == 0
    file = "adapter/adapter.safetensors"
    assert (folder / file).read_bytes() == (finished / file).read_bytes()


def test_a_plan_that_cannot_be_written_is_one_error(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    assert run(tmp_path / "run", "dry_run=true") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        "error: run: its files must be readable and writable, got OSError: [Errno 30] Read-only file system; "
        "make room, or choose another folder"
    )


def test_other_errors_are_not_taken_for_the_disk(tmp_path, monkeypatch):
    def fail(*_):
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConnectionResetError):
        run(tmp_path / "run", "dry_run=true")


def test_a_saved_run_is_read_back_as_the_same_run(finished):
    assert read_run(finished).hash == read_results(finished)["config_hash"]


def test_a_folder_that_holds_no_trained_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run: a run directory holds config\.yaml, got .*, which has no results\.json"):
        read_run(tmp_path)


def test_the_adapter_of_a_try_that_was_not_the_last_is_refused(finished, tmp_path):
    """It was interrupted, went on, and diverged: what lies there is the first try's."""
    copy = shutil.copytree(finished, tmp_path / "run")
    found = {key: value for key, value in read_results(copy).items() if key != "steps"}
    (copy / "results.json").write_text(json.dumps({**found, "status": "diverged"}))
    with pytest.raises(UserError, match=rf"got status=diverged at step 0 of {found['steps_planned']} in"):
        read_run(copy)


def test_a_run_on_another_base_is_refused(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    found = read_results(copy)
    found["model"]["sha"] = "another"
    (copy / "results.json").write_text(json.dumps(found))
    message = r"the base must be the one trained on, got sha256 of tiny_llama seed 0… instead of tiny_llama another… in"
    with pytest.raises(UserError, match=message):
        load_run(copy)
    (copy / "results.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load_run(copy)


@pytest.fixture(scope="module")
def on_a_folder(tmp_path_factory):
    """A model folder and a run on it that was stopped after training."""
    base, run_dir = tmp_path_factory.mktemp("base") / "model", tmp_path_factory.mktemp("runs") / "run"
    tiny = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    tiny.model.save_pretrained(base)
    tiny.tokenizer.save_pretrained(base)
    assert run(run_dir, "model=hf:someone/tiny", "model.dtype=float32", f"path={base}") == 0
    return base, run_dir


def without_files(found):
    del found["model"]["files"]


def with_files(**digests):
    return lambda found: found["model"]["files"].update(digests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_files(**{"config.json": "c" * 64}), r"got sha256 of config.json \w{12}… instead of config.json c{12}…"),
        (with_files(**{"merges.txt": "d" * 64}), r"got sha256 of none instead of merges.txt d{12}…"),
        (with_files(**{"model.safetensors": "e" * 64}), r"got sha256 of model.safetensors \w{12}… instead of"),
        (lambda found: found["model"].update(sha="a commit"), None),  # the files decide: it may come from elsewhere
        (without_files, None),  # a run of before they were recorded
        (lambda found: (without_files(found), found["model"].update(sha="f" * 64)), r"got sha256 of tiny \w{12}… inst"),
    ],
)
def test_what_changed_of_a_base_is_named(on_a_folder, tmp_path, capsys, change, message):
    """Evaluation and merging are refused, and going on after a kill as well."""
    copy = shutil.copytree(on_a_folder[1], tmp_path / "run")
    found = read_results(copy)
    change(found)
    (copy / "results.json").write_text(json.dumps(found))
    if message is None:
        load_run(copy)
    else:
        with pytest.raises(UserError, match="the base must be the one trained on, " + message):
            load_run(copy)
        assert main(["merge", str(copy), "--out", str(tmp_path / "merged")]) == 2
        assert not (tmp_path / "merged").exists()
    del found["metrics"]
    (copy / "results.json").write_text(json.dumps({**found, "status": "running"}))  # killed before its evaluation
    words = ["model=hf:someone/tiny", "model.dtype=float32", f"path={on_a_folder[0]}"]
    capsys.readouterr()
    assert run(copy, *words) == (2 if message else 0)
    if message:
        assert re.search("an unfinished run goes on with the model it had, " + message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("old", "new", "refused"),
    [("lr: 0.001", "lr: 0.1", True), ("n_train: 4", "n_train: 5", True), ("output: outputs", "output: moved", False)],
)
def test_an_edited_config_is_refused(finished, tmp_path, old, new, refused):
    copy = shutil.copytree(finished, tmp_path / "run")
    file = copy / "config.yaml"
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    if not refused:
        read_run(copy)
        return
    message = r"config.yaml must be the one trained with, got hash \w{12}… instead of .*; bring it back, or train again"
    with pytest.raises(UserError, match=message):
        read_run(copy)


@pytest.mark.parametrize("content", ["", "[a]", "method: [a", "? [1]\n: 2", "method: ${nowhere}", "method: {r: 1}"])
def test_a_damaged_config_is_named(finished, tmp_path, content):
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml (is damaged|must be the one trained with), got .* in .*run"):
        read_run(copy)
