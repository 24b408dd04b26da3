"""What the code imports is what pyproject.toml declares: at the top of a file of the base alone."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = ("src", "methods", "tasks")
CALLED = {"yaml": "pyyaml", "hydra": "hydra-core", "lm_eval": "lm-eval", "PIL": "pillow", "google": "protobuf"}
"""Distributions whose modules have another name."""
FOR_OTHERS = {
    "accelerate": "transformers reads GGUF with it",
    "gguf": "transformers reads GGUF with it",
    "tiktoken": "transformers reads tiktoken files with it",
}
"""Base dependencies that no file of ours imports, and who does."""
WITH_TORCH = {"triton"}
"""What PyTorch's builds for a GPU bring; `kernels` looks whether it is there."""


def names(requirements):
    return {re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-") for line in requirements}


BASE = names(PROJECT["dependencies"])
EXTRAS = names(line for extra, lines in PROJECT["optional-dependencies"].items() if extra != "test" for line in lines)


def imports(node, guarded=False):
    """Yields each distribution that a tree imports, and whether inside a function or a `try`."""
    for child in ast.iter_child_nodes(node):
        modules = []
        if isinstance(child, ast.Import):
            modules = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and not child.level:
            modules = [child.module]
        for module in modules:
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top != "highrank":
                yield CALLED.get(top, top.replace("_", "-")), guarded
        yield from imports(child, guarded or isinstance(child, ast.FunctionDef | ast.Try))


def imported():
    """Yields (file, distribution, guarded) for each import of another's package."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for name, guarded in imports(ast.parse(file.read_text())):
                yield str(file.relative_to(ROOT)), name, guarded


def test_an_import_is_of_a_base_dependency_or_where_it_is_used_of_an_extra():
    found = list(imported())
    assert len({file for file, _, _ in found}) > 20
    undeclared = [
        (file, name) for file, name, guarded in found if name not in BASE | WITH_TORCH | (EXTRAS if guarded else set())
    ]
    assert undeclared == []


def test_each_base_dependency_is_needed():
    assert {name for _, name, _ in imported() if name in BASE} | FOR_OTHERS.keys() == BASE


def test_each_extra_is_known_to_pip_as_its_errors_name_it():
    """`pip install 'highrank[name]'` in an error or a warning names an extra that exists."""
    named = set()
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"highrank\[(\w+)\]", file.read_text()))
    assert named == set(PROJECT["optional-dependencies"]) - {"test", "bench"}
