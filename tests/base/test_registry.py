"""Plugins: found by file name or entry point, refused with their source named."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import safetensors.torch

from highrank.base import registry
from highrank.base.errors import UserError
from highrank.cli import main
from highrank.data.scoring import MEASURES
from highrank.data.task import MEASURED
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.testing import check_task

ROOT = Path(__file__).parents[2]

METHOD = '''
"""shift: W' = W + c, one number per weight."""

from dataclasses import dataclass

import torch
from highrank.plugin import Method, register_method


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    start: float = 0.0
    """First value of c."""


@register_method(config=ShiftConfig)
class Shift(Method):
    def __init__(self, in_features, out_features, cfg, shared=None):
        super().__init__(in_features, out_features, cfg, shared)
        self.c = torch.nn.Parameter(torch.empty(1))

    def reset_parameters(self, W, site):
        torch.nn.init.constant_(self.c, self.cfg.start)

    def effective_weight(self, W):
        return W + self.c

    @classmethod
    def num_trainable(cls, in_features, out_features, cfg):
        return 1
'''


def install(folder, distribution, group="methods", **entries):
    """Makes `folder`, once on the path, look like it holds an installed distribution with these plugins."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[highrank.{group}]", *lines, ""]))


def plug_in(site, name, text, group="methods"):
    """Installs a plugin whose module holds this text."""
    (site / "mine").mkdir()
    (site / "mine" / f"{name}.py").write_text(text)
    install(site, "mine", group=group, **{name: f"mine.{name}"})


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder on the import path; what plugins register here is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_registered", {group: dict(had) for group, had in registry._registered.items()})
    before = set(sys.modules)
    yield tmp_path
    for name, module in list(sys.modules.items()):  # those that register; torch cannot be imported twice
        ours = str(getattr(module, "__file__", None)).startswith(str(tmp_path)) or name == "mine"
        if name not in before and (ours or name.startswith(("highrank.methods", "highrank.tasks"))):
            del sys.modules[name]


@pytest.mark.parametrize(("group", "name", "near"), [("methods", "lroa", "'lora'"), ("tasks", "wordmat", "'wordmath'")])
def test_an_unknown_name_gives_near_matches(group, name, near):
    with pytest.raises(UserError, match=f"unknown name, got {group[:-1]}={name}; did you mean .*{near}"):
        registry.load(group, name)


def test_a_name_that_is_near_nothing_gives_the_whole_list():
    with pytest.raises(UserError) as error:
        registry.load("methods", "zzzzzz")
    assert "it is one of: " + ", ".join(sorted(registry.available("methods"))) in str(error.value)


def test_listing_imports_no_plugin():
    code = "import sys; from highrank.base import registry; print(registry.available('methods')); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, torch_imported = done.stdout.splitlines()
    assert "'hira': 'highrank.methods.hira'" in listed
    assert torch_imported == "False"


def test_the_name_of_a_plugin_is_its_files_name():
    for name, module in registry.available("methods").items():
        cls = registry.load("methods", name)
        assert cls.__module__ == module
        assert cls.name == name


def test_files_that_open_with_an_underscore_are_no_plugins(tmp_path, monkeypatch):
    for name in ("_private", "public"):
        (tmp_path / f"{name}.py").touch()
    package = importlib.import_module("highrank.tasks")
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    assert list(registry.available("tasks")) == ["public"]


NEW = "    no_decay = ('c',)\n\n    def __init__"
BAD_CLASSES = {
    "no base": (
        "class Shift(Method):",
        "class Shift(torch.nn.Module):",
        "a method derives from Method or WholeModelMethod",
    ),
    "no config": ("config=ShiftConfig", "config=None", "its config is a dataclass, got config=None"),
    "nothing counted": ("def num_trainable", "def counted", "the class must define num_trainable, got none in Shift"),
    "no definition": ("def effective_weight", "def effective", "the class must define effective_weight, got none in"),
    "no classmethod": ("@classmethod\n    def num_t", "def num_t", "num_trainable must be a classmethod, got a plain"),
    "a text": (NEW, NEW.replace("('c',)", "'c'"), "no_decay is a tuple of parameter names, .* got no_decay='c'"),
    "no rate": (NEW, NEW.replace("no_decay = ('c',)", "default_lr = None"), "default_lr is a positive number, got"),
    "factors": (NEW, NEW.replace("no_decay", "lr_factors"), "lr_factors maps parameter names to numbers"),
    "family": (NEW, NEW.replace("no_decay = ('c',)", "family = 'weights'"), "family is a class of adapters"),
    "one example": (
        NEW,
        NEW.replace("no_decay = ('c',)", "examples = {'start': 1.0}"),
        "examples is a tuple of at least",
    ),
    "no example": (
        NEW,
        NEW.replace("no_decay = ('c',)", "examples = ()"),
        "examples is a tuple of at least one mapping",
    ),
    "other example": (
        *(NEW, NEW.replace("no_decay = ('c',)", "examples = ({'begin': 1.0},)")),
        "examples name fields of its config, got begin; it has: start",
    ),
    "peft": (NEW, NEW.replace("no_decay = ('c',)", "peft = 'LORA'"), "peft is a PeftForm or None, got peft='LORA'"),
    "peft's fields": (
        *(NEW, NEW.replace("no_decay = ('c',)", "peft = highrank.plugin.PeftForm(type='LORA', fields={'rank': 'r'})")),
        "peft name fields of its config, got rank; it has: start",
    ),
}


@pytest.mark.parametrize("case", BAD_CLASSES)
def test_a_class_is_checked_when_it_registers(site, case):
    right, wrong, message = BAD_CLASSES[case]
    source = METHOD.replace("    def __init__", NEW).replace("import torch\n", "import torch\nimport highrank.plugin\n")
    assert source.count(right) == 1
    plug_in(site, "shift", source.replace(right, wrong))
    with pytest.raises(UserError, match=f"^method shift: {message}") as error:
        registry.load("methods", "shift")
    assert "\n" not in str(error.value)


TASK = '''
"""rhyme: two words."""

from dataclasses import dataclass

from highrank.plugin import Example, Task, register_task


@dataclass(frozen=True, kw_only=True)
class RhymeConfig:
    n: int = 4


@register_task(config=RhymeConfig)
class Rhyme(Task):
    kind = "generate"
    family = "math"
    version = 1
    metrics = ("accuracy",)

    def train(self):
        return [Example(str(i), "What rhymes with cat?", "hat", "hat") for i in range(self.cfg.n)]

    def test(self):
        return {"rhyme": [Example("a", "What rhymes with log?", "dog", "dog")]}

    def sources(self):
        return [{"name": "rhyme", "rows": self.cfg.n, "sha256": "0"}]
'''
BAD_TASKS = {
    "right": ("metrics", "metrics", ""),
    "no base": ("class Rhyme(Task)", "class Rhyme", "a task derives from Task of highrank.plugin, got class Rhyme"),
    "no config": ("config=RhymeConfig", "config=None", "its config is a dataclass, got config=None"),
    "no family": ("    family =", "    familly =", "the class must define family, got none in Rhyme"),
    "no version": ("    version =", "    versoin =", "the class must define version, got none in Rhyme"),
    "no sources": ("def sources", "def source", "the class must define sources, got none in Rhyme"),
    "a number": ('family = "math"', "family = 3", "family is a text, as .*, got family=3"),
    "a text": ("version = 1", 'version = "1"', "version is a whole number >= 1, got version='1'"),
    "no kind": ('kind = "generate"', "pass", "kind is one of generate, classify, .*, got kind=None"),
    "another kind": ('kind = "generate"', 'kind = "write"', "kind is one of generate, .*, got kind='write'"),
    "one metric": ('("accuracy",)', '"accuracy"', "metrics is a tuple of names, .*, got metrics='accuracy'"),
    "another metric": ('("accuracy",)', '("acuracy",)', "unknown metric, got metrics with acuracy; define it in"),
    "one class": ('kind = "generate"', 'kind = "classify"', "num_labels is a whole number >= 2 .* got num_labels=1"),
    "other sources": ('"rows": self.cfg.n, ', "", r"sources\(\) returns a list of mappings .*, got no \[0\]\.rows"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_a_task_is_checked_before_it_trains(site, case, run_cli, monkeypatch):
    right, wrong, message = BAD_TASKS[case]
    assert right in TASK
    plug_in(site, "rhyme", TASK.replace(right, wrong), group="tasks")
    if message:
        monkeypatch.setattr("highrank.run.train", lambda *_: pytest.fail("trained"))
    status, _, err = run_cli("task=rhyme", "model=tiny_llama", "max_steps=1", "eval_before=false")
    assert status == (2 if message else 0), err
    if message:
        (line,) = [line for line in err.splitlines() if "error" in line]
        assert re.search(f"^error: task rhyme: {message}", line)


BROKEN = {
    "forward": (
        "    def effective_weight",
        "    def forward(self, x, W, bias=None):\n        return x @ W.T\n\n    def effective_weight",
    ),
    "raises": ("        return W", "        return W / nothing"),
    "count": ("return 1", "return 2"),
}
SAID = {
    "forward": "method shift: forward must be F.linear with effective_weight, got a difference of",
    "raises": r"method shift: it must not raise, got NameError: name 'nothing' is not defined at .*shift.py:\d+",
    "count": "method shift: num_trainable must be what trains, got 2 for 1",
}


@pytest.mark.parametrize("case", ["", *BROKEN])
def test_a_method_from_outside_is_held_to_the_contract(site, case, capsys):
    right, wrong = BROKEN.get(case, ("", ""))
    assert right in METHOD
    plug_in(site, "shift", METHOD.replace(right, wrong) if case else METHOD)
    status = main(["check", "shift"])
    out, err = capsys.readouterr()
    if not case:
        assert (status, err) == (0, "")
        assert "ok\tshift: forward is effective_weight\n" in out
        assert "ok\tshift: its adapter is saved and loaded\n" in out
    else:
        assert status == 2
        assert re.match(f"error: {SAID[case]}", err)
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("Example(str(i)", 'Example("i"', "task rhyme: every id must be given once, got one again in train"),
        ("range(self.cfg.n)", "range(0)", "task rhyme: a set must hold examples, got none in train"),
        (
            '[Example("a", "What rhymes with log?", "dog", "dog")]',
            '["dog"]',
            "has Example as records, got str in rhyme",
        ),
        ('return {"rhyme"', "return {rhyme", "it must not raise, got NameError"),
    ],
)
def test_a_task_from_outside_is_held_to_the_contract(site, right, wrong, message):
    assert right in TASK
    plug_in(site, "rhyme", TASK, group="tasks")
    assert check_task("rhyme")[-1] == "rhyme: 4 examples to train on, 1 test sets, the same each time"
    del sys.modules["mine.rhyme"]
    (site / "mine" / "rhyme.py").write_text(TASK.replace(right, wrong) + "\n\n# changed")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=message):
        check_task("rhyme")


@pytest.mark.parametrize("kind", ["method", "task"])
def test_a_new_package_keeps_the_contract_and_runs(site, kind, monkeypatch, capsys, run_cli):
    monkeypatch.chdir(site)
    assert main(["new", kind, "my_own"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "highrank-my-own"
    package = site / "highrank-my-own"
    project = tomllib.loads((package / "pyproject.toml").read_text())
    assert project["project"]["entry-points"] == {f"highrank.{kind}s": {"my_own": "highrank_my_own.my_own"}}
    monkeypatch.syspath_prepend(str(package))
    install(site, "mine", group=f"{kind}s", my_own="highrank_my_own.my_own")
    test = runpy.run_path(str(package / "tests" / "test_my_own.py"))
    test["test_it_keeps_the_contract"]()
    words = [f"{kind}=my_own", "model=tiny_llama", "max_steps=1", "eval_before=false"]
    assert run_cli(*words, *(["task.n_test=2"] if kind == "task" else ["task.n_train=4", "task.n_test=2"]))[0] == 0
    assert main(["new", kind, "my_own", "--out", "elsewhere"]) == 2
    assert "which there is already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "new: the following arguments are required: kind, name; use: highrank new method|task NAME"),
        (["methd", "x"], "new: a method or a task can be made, got methd; did you mean 'method'?"),
        (["method", "My-Own"], "new: a name is a Python name in small letters, digits and _, got My-Own; as my_method"),
        (["task", "class"], "new: a name is a Python name in small letters, digits and _, got class; as my_task"),
        (["method", "hira"], "new: a name belongs to one plugin, got hira, which there is already"),
        (["method", "other", "--out", "full"], "new: the output folder must be new or empty, got --out full"),
        (["method", "other", "--out", "full/file"], "new: the output folder must be new or empty, got --out full/file"),
    ],
)
def test_what_cannot_be_made_is_one_error_and_nothing_is_written(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert main(["new", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["full", "full/file"]


def test_the_metrics_that_need_no_measure_are_those_there_are():
    assert set(MEASURES) == set(MEASURED)


BAD_ADAPTERS = {
    "count": ("return 1", "return 2", "num_trainable must be what trains, got 2 for 1 at model.layers.0.*c \\(1,\\)"),
    "no_decay": (NEW, NEW.replace("('c',)", "('b',)"), "no_decay names parameters, got b; it has: c"),
    "lr_factors": (
        NEW,
        NEW.replace("no_decay = ('c',)", "lr_factors = {'d': 2.0}"),
        "lr_factors names parameters, got d",
    ),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_an_adapter_is_compared_with_its_class_when_it_is_attached(site, case, run_cli):
    right, wrong, message = BAD_ADAPTERS[case]
    source = METHOD.replace("    def __init__", NEW)
    assert source.count(right) == 1
    plug_in(site, "shift", source.replace(right, wrong))
    status, _, err = run_cli("method=shift", "model=tiny_llama", "task.n_train=4", "task.n_test=2", "max_steps=1")
    assert status == 2
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert re.search(f"error: method shift: {message}", line)


def test_an_adapter_of_the_whole_model_is_counted_too(monkeypatch):
    prefix = registry.load("methods", "prefix")
    monkeypatch.setattr(prefix, "num_trainable", classmethod(lambda cls, model, cfg: 5))
    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    with pytest.raises(
        UserError, match=r"method prefix: num_trainable must be what trains, got 5 for .* the whole model"
    ):
        attach(backbone.model, [], prefix, prefix.config(num_virtual_tokens=2))


def test_a_name_of_a_built_in_is_refused_with_both_owners(site):
    install(site, "theirs", lora="theirs.lora")
    with pytest.raises(UserError) as error:
        registry.load("methods", "hira")
    assert "got 'lora' from both highrank.methods.lora and theirs.lora" in str(error.value)


def test_a_name_of_two_distributions_is_refused_with_both_owners(site):
    install(site, "first", shift="first.shift")
    install(site, "second", shift="second.shift")
    with pytest.raises(UserError, match="got 'shift' from both") as error:
        registry.available("methods")
    assert {"first.shift", "second.shift"} <= set(str(error.value).replace(";", "").split())


def test_two_classes_of_one_name_are_refused_with_both_owners(site):
    for package in ("first", "second"):
        (site / package).mkdir()
        (site / package / "shift.py").write_text(METHOD)
    importlib.import_module("first.shift")
    with pytest.raises(UserError, match=r"got 'shift' from both first\.shift and second\.shift"):
        importlib.import_module("second.shift")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", "must import, got ModuleNotFoundError from broken: No module named 'no_such_module'"),
        ("1 / 0", "must import, got ZeroDivisionError from broken: division by zero"),
        ("def f(:", "must import, got SyntaxError from broken: "),
        ("", "must register a class under its own name, got none in broken"),
    ],
)
def test_a_plugin_that_does_not_import_or_register_is_an_error_that_names_it(site, source, message):
    (site / "broken.py").write_text(source)
    install(site, "theirs", broken="broken")
    with pytest.raises(UserError) as error:
        registry.load("methods", "broken")
    assert message in str(error.value)
    assert str(error.value).startswith("method broken: ")


def test_a_second_copy_under_the_folders_name_is_refused(site, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(UserError, match=r"as highrank\.methods\.lora, got a second copy named methods\.lora"):
        importlib.import_module("methods.lora")


@pytest.fixture(scope="module")
def out_of_tree(tmp_path_factory):
    """A dry run and a run of two steps with a method from another distribution, found by its entry point."""
    site, cwd = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("cwd")
    (site / "their_pkg").mkdir()
    (site / "their_pkg" / "shift.py").write_text(METHOD)
    install(site, "their_pkg", shift="their_pkg.shift")
    script = """
    from highrank.cli import main
    words = ["run", "method=shift", "start=0.5", "model=tiny_llama", "placement=[q,down]"]
    print("planned", main([*words, "run_dir=planned", "dry_run=true"]))
    small = ["max_steps=2", "batch_size=2", "task.n_train=4", "task.n_test=1", "eval_before=false", "run_dir=done"]
    print("done", main([*words, *small]))
    """
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(site)]),
        "HIGHRANK_CACHE": str(cwd / "cache"),
    }
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return cwd, done.stdout.splitlines()


def test_an_out_of_tree_method_is_planned_like_any_other(out_of_tree):
    cwd, output = out_of_tree
    assert "planned 0" in output
    assert json.loads((cwd / "planned" / "plan.json").read_text())["params"]["trainable"] == 4


def test_an_out_of_tree_method_trains_and_is_saved_like_any_other(out_of_tree):
    cwd, output = out_of_tree
    assert output[-1] == "done 0"
    assert json.loads((cwd / "done" / "results.json").read_text())["status"] == "done"
    card = json.loads((cwd / "done" / "adapter" / "adapter.json").read_text())
    assert (card["method"], card["fields"]) == ("shift", {"start": 0.5})
    trained = safetensors.torch.load_file(cwd / "done" / "adapter" / "adapter.safetensors")
    assert len(trained) == 4
    assert all(c.item() != 0.5 for c in trained.values())
