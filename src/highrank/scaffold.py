"""`highrank new method NAME`, `highrank new task NAME`: a package of one plugin, its entry point and its test."""

import keyword
import re
import shlex
from pathlib import Path

from highrank.base import registry
from highrank.base.console import say
from highrank.base.errors import UserError, suggest
from highrank.base.options import Words
from highrank.train.saved import check_new, written_whole

METHOD = '''"""NAME: what it does in a line.

    W' = diag(a) W

Replace the formula, the fields and the functions below by your own; `highrank check NAME` says whether they keep the contract.
"""

from dataclasses import dataclass

import torch
from highrank.plugin import Method, register_method


@dataclass(frozen=True, kw_only=True)
class CLASSConfig:
    start: float = 1.0
    """First value of a."""


@register_method(config=CLASSConfig)
class CLASS(Method):
    no_decay = ("a",)

    def __init__(self, in_features, out_features, cfg, shared=None):
        super().__init__(in_features, out_features, cfg, shared)
        self.a = torch.nn.Parameter(torch.empty(out_features))

    def reset_parameters(self, W, site):
        torch.nn.init.constant_(self.a, self.cfg.start)

    def effective_weight(self, W):
        return self.a[:, None] * W

    @classmethod
    def num_trainable(cls, in_features, out_features, cfg):
        return out_features
'''
TASK = '''"""NAME: what it asks in a line.

Replace the questions below by your own; `highrank check NAME` says whether they keep the contract.
"""

import hashlib
import random
from dataclasses import dataclass

from highrank.plugin import Example, Task, register_task


@dataclass(frozen=True, kw_only=True)
class CLASSConfig:
    n_train: int = 64
    """Training examples."""
    n_test: int = 16
    """Test examples."""


@register_task(config=CLASSConfig)
class CLASS(Task):
    kind = "generate"
    family = "math"
    version = 1

    def train(self):
        return self._examples("train", self.cfg.n_train)

    def test(self):
        return {"NAME": self._examples("test", self.cfg.n_test)}

    def sources(self):
        sets = {"train": self.train(), "test": self.test()["NAME"]}
        return [
            {"name": f"NAME/{name}", "rows": len(rows), "sha256": hashlib.sha256(repr(rows).encode()).hexdigest()}
            for name, rows in sets.items()
        ]

    def _examples(self, split, n):
        draw = random.Random(f"NAME/{split}")
        pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(n)]
        return [
            Example(f"{split}-{i}", f"What is {a} + {b}?", f"The answer is {a + b}.", str(a + b))
            for i, (a, b) in enumerate(pairs)
        ]
'''
PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "highrank-DASHED"
version = "0.1.0"
dependencies = ["highrank"]

[project.entry-points."highrank.KINDs"]
NAME = "highrank_NAME.NAME"

[tool.setuptools]
packages = ["highrank_NAME"]
"""
TEST = '''"""The contract that every KIND keeps."""

from highrank.testing import check_KIND


def test_it_keeps_the_contract():
    assert check_KIND("NAME")
'''
KINDS = {"method": METHOD, "task": TASK}


def command(words: list[str]) -> int:
    parser = Words("new", "method|task NAME [--out DIR]")
    parser.add_argument("kind")
    parser.add_argument("name")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(words)
    kind, name = str(options.kind), str(options.name)
    if kind not in KINDS:
        raise UserError(f"new: a method or a task can be made, got {kind}{suggest(kind, KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"new: a name is a Python name in small letters, digits and _, got {name}; as my_{kind}")
    if name in registry.available(f"{kind}s"):
        raise UserError(f"new: a name belongs to one plugin, got {name}, which there is already; choose another")
    out = check_new("new", options.out or Path(f"highrank-{name.replace('_', '-')}"))
    with written_whole("new", out) as folder:
        files = {
            "pyproject.toml": PROJECT,
            f"highrank_{name}/__init__.py": "",
            f"highrank_{name}/{name}.py": KINDS[kind],
            f"tests/test_{name}.py": TEST,
        }
        for place, text in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(_filled(text, kind, name), encoding="utf-8")
    say(
        f"next:\n  pip install -e {shlex.quote(str(out))}\n  highrank check {name}\n  highrank run {kind}={name} model=tiny_llama"
    )
    print(out)
    return 0


def _filled(text: str, kind: str, name: str) -> str:
    cls = "".join(part.capitalize() for part in name.split("_"))
    for mark, value in {"DASHED": name.replace("_", "-"), "NAME": name, "CLASS": cls, "KIND": kind}.items():
        text = text.replace(mark, value)
    return text
