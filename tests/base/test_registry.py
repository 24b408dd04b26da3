"""Plugins: found by file name or entry point, refused with their source named."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch

from highrank.base import registry
from highrank.base.errors import UserError

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


def install(folder, distribution, **entries):
    """Makes `folder`, once on the path, look like it holds an installed distribution with these methods."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[highrank.methods]", *lines, ""]))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder on the import path; what plugins register here is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_registered", {group: dict(had) for group, had in registry._registered.items()})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
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
