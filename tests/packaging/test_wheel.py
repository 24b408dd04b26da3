"""The built wheel holds what the tree holds, and works where the tree is not."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from build_wheel import ROOT, pip

pytestmark = pytest.mark.packaging

FOLDERS = {"highrank": "src/highrank", "highrank/methods": "methods", "highrank/tasks": "tasks"}
FOLDERS["highrank/configs"] = "configs"

NAMES_SCRIPT = """
import json, sys
import highrank, highrank.cli
from highrank.base import registry
from highrank.config.words import _options, packaged_configs, register_configs
register_configs()
with packaged_configs():
    groups = {group: _options(group) for group in ("method", "task", "model", "protocol", "trainer")}
code = highrank.cli.main(["methods"])
code += highrank.cli.main(["run", "method=lora", "model=tiny_llama", "dry_run=true", "run_dir=planned"])
plugins = {group: registry.available(group) for group in ("methods", "tasks")}
files = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "highrank"]
print(json.dumps({"files": files, "code": code, "groups": groups, "plugins": plugins}))
"""


@pytest.fixture(scope="module")
def contents(wheel):
    with zipfile.ZipFile(wheel) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


def tree_files():
    """Returns path in the wheel -> file in the tree."""
    files = {}
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml", ".html") or file.name == "py.typed":
                files[f"{package}/{file.relative_to(ROOT / folder).as_posix()}"] = file
    return files


def test_the_wheel_holds_every_file_of_the_tree_and_no_other(contents):
    packed = {name for name in contents if ".dist-info/" not in name}
    expected = set(tree_files())
    assert packed == expected
    assert any(name.startswith("highrank/configs/model/") for name in packed)


def test_every_file_is_packed_as_it_is(contents):
    for name, file in tree_files().items():
        assert contents[name] == file.read_bytes(), name


def test_the_wheel_brings_one_top_level_name(contents):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {name.split("/")[0] for name in contents} == {"highrank", f"highrank-{version}.dist-info"}


def test_the_metadata_says_what_pyproject_says(contents):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name,) = (n for n in contents if n.endswith(".dist-info/METADATA"))
    found = Parser().parsestr(contents[name].decode())
    assert (found["Name"], found["Version"]) == (project["name"], project["version"])
    assert found["License-Expression"] == project["license"]
    assert found["License-File"] == "LICENSE"
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in contents)
    assert found["Summary"] == project["description"]
    assert set(found["Requires-Python"].split(",")) == set(project["requires-python"].split(","))
    assert found.get_payload().strip() == (ROOT / project["readme"]).read_text().strip()
    required = {re.split("[<>=;]", line)[0] for line in found.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {re.split("[<>=;]", line)[0] for line in project["dependencies"]}
    (scripts,) = (contents[n].decode() for n in contents if n.endswith(".dist-info/entry_points.txt"))
    assert "highrank = highrank.cli:main" in scripts


def names(cwd, **variables):
    """Returns what `highrank` resolves to and lists, seen from `cwd`."""
    env = {**os.environ, "HIGHRANK_CACHE": str(cwd / "cache"), **variables}
    command = [sys.executable, "-c", NAMES_SCRIPT]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel in a folder of its own that comes first on the path, used from an empty folder."""
    target, cwd = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("cwd")
    pip("install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel))
    return target, cwd, names(cwd, PYTHONPATH=os.pathsep.join([os.environ["PYTHONPATH"], str(target)]))


def test_the_installed_wheel_lists_methods_and_plans_a_run(installed):
    target, cwd, found = installed
    assert len(found["files"]) > 10
    assert all(Path(file).is_relative_to(target) for file in found["files"])
    assert found["code"] == 0
    assert json.loads((cwd / "planned" / "plan.json").read_text())["params"]["trainable"] > 0


def test_wheel_and_checkout_have_the_same_names(installed, tmp_path):
    _, _, found = installed
    checkout = names(tmp_path)
    assert all(Path(file).is_relative_to(ROOT) for file in checkout["files"])
    for key in ("groups", "plugins"):
        assert found[key] == checkout[key]
