"""Imports go down the stairs alone: a package knows those below it, a plugin knows the door, and no circle is left."""

import ast
import runpy
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ("base", "model", "data", "config", "train")
KNOWS = {
    **{"base": (), "model": ("base",), "data": ("base",), "config": CORE[:3], "train": CORE[:4], "plugin": CORE[:3]},
    **{"report": CORE, "interop": CORE, "analysis": (*CORE, "report"), "run": (*CORE, "report", "analysis")},
    **{"worker": (*CORE, "report", "analysis", "run"), "sweep": (*CORE, "report", "find")},
    "library": CORE,
    "find": CORE,
    "testing": (*CORE, "library"),
    "scaffold": CORE,
    "__init__": ("library",),
    "methods": ("plugin", "model.kernels", "model.backbones", "model.placement"),
    "methods.__init__": ("base.registry",),
    "tasks": ("plugin", "data.answers", "data.sources"),
}
"""What each package or module may import of ours, beside itself and the folder `configs`; `cli` may import anything."""
LATE = {
    "cli": ("highrank", "ast", "inspect", "itertools"),
    **dict.fromkeys(("interop.commands", "find.catalogue"), ("highrank",)),
    "find.doctor": ("highrank", "torch", "huggingface_hub"),
    "base.hub": ("huggingface_hub",),
    "model.backbones": ("transformers", "sentencepiece"),
    "model.language": ("transformers",),
    "model.tiny": ("transformers", "tokenizers"),
    "model.weights": ("transformers", "huggingface_hub"),
    "methods.prefix": ("transformers",),
    **dict.fromkeys(("model.sharding", "train.fsdp"), ("torch",)),
    "train.devices": ("lightning",),
    "train.loggers": ("lightning", "wandb"),
    "data.sources": ("datasets", "pyarrow"),
    "tasks.convai2": ("nltk", "torch", "torchmetrics"),
    "interop.lm_eval": ("lm_eval",),
    "model.quantised": ("torchao", "bitsandbytes"),
    "sweep.launch": ("ray", "submitit"),
}
"""What is imported inside functions: for commands that start at once, a dry run without Lightning, and the extras."""


def files():
    for top, start in (("src/highrank", ""), ("methods", "methods."), ("tasks", "tasks.")):
        for file in (ROOT / top).rglob("*.py"):
            yield start + ".".join(file.relative_to(ROOT / top).with_suffix("").parts), ast.parse(file.read_text())


def imports(tree):
    """Yields every module or name that a file imports, and whether it does so inside a function."""
    late = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from ((start + alias.name, id(node) in late) for alias in node.names)


def test_imports_go_down_the_stairs():
    modules = dict(files())
    wrong, graph, left = [], {}, {(module, root) for module, roots in LATE.items() for root in roots}
    for module, tree in modules.items():
        own = module.split(".")[0]
        for name, late in imports(tree):
            root, _, rest = name.partition(".")
            if late and root not in LATE.get(module, ()):
                wrong.append(f"{module} imports {name} inside a function")
            if late:
                left.discard((module, root))
            if root == "highrank" and own != "cli":
                knows = (own, "configs", *KNOWS.get(module, KNOWS[own]))
                if not any(f"{rest}.".startswith(f"{known}.") for known in knows):
                    wrong.append(f"{module} may not import {name}")
                met = rest if rest in modules else rest.rpartition(".")[0]
                graph.setdefault(module, set()).add(met)
    assert wrong == []
    assert left == set()  # what no function imports any more is not in the list
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_picture_of_the_rooms_is_that_of_the_imports():
    draw = runpy.run_path(str(ROOT / "docs" / "architecture.py"))
    assert (ROOT / "docs" / "architecture.md").read_text() == draw["page"](), "make it again: docs/architecture.py"
