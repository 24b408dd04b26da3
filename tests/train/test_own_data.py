"""One's own data: what was trained on it loads, merges, exports and is analysed without it, from anywhere."""

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import yaml

from highrank.base import registry
from highrank.cli import main
from highrank.config.run_config import config_hash
from highrank.config.words import compose_run
from highrank.plugin import Example, Task, UserError, path_field
from highrank.train.saved import load_run, read_run, words_of

pytestmark = pytest.mark.integration

ROWS = [{"instruction": f"{i} + 1?", "output": f"{i + 1}"} for i in range(6)]
TINY = ["model=tiny_llama", "method=lora", "r=2", "placement=qv", "lr=1e-2", "max_steps=1", "batch_size=2"]
QUICK = [*TINY, "eval_before=false", "protocol.max_new_tokens=2"]


def write(file, rows=ROWS):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was trained in one folder, with relative paths, whose data is gone."""
    home = tmp_path_factory.mktemp("home")
    write(home / "data" / "train.jsonl")
    write(home / "data" / "test.jsonl", [{"instruction": "9 + 9?", "output": "18"}])
    (home / "general.txt").write_text("A general text.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = ["task=jsonl", "task.train=data/train.jsonl", "task.test=data/test.jsonl", "general_text=general.txt"]
        assert main(["run", *QUICK, *words, "run_dir=run"]) == 0
        assert main(["run", *QUICK, *words, "run_dir=run"]) == 0  # the same run: nothing is done again
    (home / "data").rename(home / "moved")
    (home / "general.txt").unlink()
    return home / "run"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_paths_are_saved_absolute_and_the_hash_is_that_of_what_was_typed(trained):
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    home = trained.parent
    assert saved["task"]["train"] == str(home / "data" / "train.jsonl")
    assert saved["general_text"] == str(home / "general.txt")
    assert saved["given"] == {
        "general_text": "general.txt",
        "task.test": "data/test.jsonl",
        "task.train": "data/train.jsonl",
    }
    typed = {**saved, "task": {**saved["task"], "train": "data/train.jsonl", "test": "data/test.jsonl"}}
    typed["general_text"] = "general.txt"
    del typed["given"]
    assert config_hash(saved) == config_hash(typed) == json.loads((trained / "results.json").read_text())["config_hash"]


def test_without_its_data_it_loads_merges_exports_and_is_analysed(trained, elsewhere, capsys):
    run, _, _ = load_run(trained)
    assert run.hash == json.loads((trained / "results.json").read_text())["config_hash"]
    assert main(["merge", str(trained), "--out", "merged", "--force"]) == 0
    assert "general sentences" in capsys.readouterr().err
    assert main(["export", str(trained), "--format", "peft", "--out", "exported"]) == 0
    card = (elsewhere / "exported" / "README.md").read_text()
    assert "task.train=data/train.jsonl" in card  # shown as it was typed
    assert main(["analyze", str(trained)]) == 0


def test_evaluation_names_the_file_that_is_gone_before_any_weight_loads(trained, elsewhere, capsys, monkeypatch):
    monkeypatch.setattr("highrank.train.build.load_backbone", lambda *args: pytest.fail("weights were loaded"))
    assert main(["eval", str(trained)]) == 2
    err = capsys.readouterr().err
    gone = str(trained.parent / "data" / "test.jsonl")
    assert err == f"error: task jsonl: test must be an existing file, got task.test={gone!r}\n"


def evaluated(capsys, *words):
    assert main(["eval", *map(str, words)]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    return json.loads(out)["sets"], err


def test_evaluation_takes_the_data_from_where_it_is_now(trained, elsewhere, capsys):
    moved = trained.parent / "moved"
    sets, err = evaluated(capsys, trained, f"task.test={moved / 'test.jsonl'}")
    assert sets["test"]["n"] == 1
    assert sets["test"]["leaked"] is None  # nobody can know
    assert "leaked is null" in err
    write(elsewhere / "new.jsonl", [*ROWS[:2], {"instruction": "7 + 7?", "output": "14"}])
    sets, err = evaluated(capsys, trained, "task.test=new.jsonl", f"task.train={moved / 'train.jsonl'}")
    assert (sets["test"]["n"], sets["test"]["leaked"]) == (3, 2)
    assert "leaks are counted against" in err
    sets, _ = evaluated(capsys, trained, "task=jsonl", "task.test=new.jsonl")
    assert (sets["test"]["n"], sets["test"]["leaked"]) == (3, None)
    sets, _ = evaluated(capsys, trained, "task=wordmath", "task.n_test=2")
    assert sets["wordmath"]["n"] == 2


def test_the_words_of_a_run_make_it_again(trained, elsewhere):
    run = read_run(trained)
    moved = trained.parent / "moved"
    moved.rename(trained.parent / "data")
    write(trained.parent / "general.txt", [])
    try:
        again = compose_run(words_of(run))
    finally:
        (trained.parent / "data").rename(moved)
        (trained.parent / "general.txt").unlink()
    assert again.task_cfg == run.task_cfg
    assert again.core.general_text == run.core.general_text


def test_a_missing_file_is_told_before_weights_load(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("highrank.train.build.load_backbone", lambda *args: pytest.fail("weights were loaded"))
    write(tmp_path / "train.jsonl")
    for words, name in ((["task.train=no.jsonl"], "train='no.jsonl'"), (["task.train=train.jsonl"], "test=''")):
        assert main(["run", *QUICK, "task=jsonl", *words]) == 2
        assert f"must be an existing file, got task.{name}" in capsys.readouterr().err
        assert main(["run", *QUICK, "task=jsonl", *words, "task.n_train=5", "dry_run=true"]) == 2
        assert f"must be an existing file, got task.{name}" in capsys.readouterr().err


def test_a_base_that_was_moved_is_given_anew(tmp_path, monkeypatch, capsys):
    from highrank.model.backbones import load_backbone

    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    words = [*QUICK, "model=hf:own", "model.dtype=float32", "path=base", "task.n_train=4", "task.n_test=1"]
    assert main(["run", *words, "run_dir=run"]) == 0
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    load_run(tmp_path / "run")
    shutil.move(tmp_path / "base", tmp_path / "other")
    with pytest.raises(UserError, match=r"a local path is a folder with config.json, got path=.*/base"):
        load_run(tmp_path / "run")
    load_run(tmp_path / "run", ["path=../other"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinesConfig:
    file: str = path_field()
    times: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskingConfig(LinesConfig):
    def __post_init__(self):
        if not Path(self.file).is_file():
            raise UserError(f"own_lines: no file, got file={self.file}")


class Lines(Task):
    """A plugin with required fields."""

    name, config, kind, family, version = "own_lines", LinesConfig, "generate", "instruction", 1

    def train(self):
        with open(self.cfg.file) as lines:
            texts = [line.strip() for line in lines] * self.cfg.times
        return [Example(str(i), text, text, text) for i, text in enumerate(texts)]

    def test(self):
        return {"lines": self.train()[:1]}

    def sources(self):
        return [{"name": self.cfg.file, "rows": len(self.train()), "sha256": "0" * 64}]


@pytest.fixture
def plugin(monkeypatch):
    module = types.ModuleType("own_lines")
    monkeypatch.setitem(sys.modules, "own_lines", module)
    monkeypatch.setitem(registry._registered["tasks"], "own_lines", Lines)
    found = registry.available

    def available(group):
        return {**found(group), **({"own_lines": "own_lines"} if group == "tasks" else {})}

    monkeypatch.setattr(registry, "available", available)


@pytest.mark.parametrize("config", [LinesConfig, AskingConfig])
def test_so_does_any_plugin_with_required_fields(plugin, config, tmp_path, elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(Lines, "config", config)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("one two\nthree four\n")
    assert main(["run", *QUICK, "task=own_lines", "task.file=lines.txt"]) == 2
    assert "own_lines: times must be given, got none; it has: file, times" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="leak audit"):
        assert main(["run", *QUICK, "task=own_lines", "task.file=lines.txt", "task.times=2", "run_dir=run"]) == 0
    (tmp_path / "lines.txt").rename(tmp_path / "there.txt")
    monkeypatch.chdir(elsewhere)
    run = tmp_path / "run"
    assert main(["merge", str(run), "--out", "merged", "--force"]) == 0
    assert main(["export", str(run), "--format", "peft", "--out", "exported"]) == 0
    assert main(["analyze", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run)]) == 2
    err = capsys.readouterr().err
    assert err == f"error: task own_lines: a file must exist, got {tmp_path / 'lines.txt'}\n"
    assert main(["eval", str(run), "protocol.max_new_tokens=1"]) == 2
    assert f"a file must exist, got {tmp_path / 'lines.txt'}" in capsys.readouterr().err
    assert main(["eval", str(run), "task.file=none.txt"]) == 2
    assert "none.txt" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="leak audit"):
        assert main(["eval", str(run), f"task.file={tmp_path / 'there.txt'}"]) == 0
