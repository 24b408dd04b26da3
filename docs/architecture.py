"""Draws the rooms of the house from the imports in its files: `python docs/architecture.py` writes docs/architecture.md.

A room is a package or a module right under `highrank`; an arrow goes from a room to one that it imports. Of arrows that
others lead round to, none is drawn.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Architecture

Each package says in its `__init__.py` what it holds and what it may import; `tests/base/test_imports.py` holds that. An arrow
below goes from a room to the rooms it builds on, the next ones down; what those build on is within reach too. What is reached
by name has no arrow: methods and tasks, and from `cli` the module of the command that is typed. The picture is made from the
imports, by `python docs/architecture.py`, and a test compares them.

"""


def rooms() -> Iterator[tuple[str, Path]]:
    """Yields the room of each file of the package, plugins included."""
    for top in ("src/highrank", "methods", "tasks"):
        for file in sorted((ROOT / top).rglob("*.py")):
            inside = file.relative_to(ROOT / top)
            if file.name != "__init__.py":
                yield (inside.parts[0].removesuffix(".py") if top == "src/highrank" else top), file


def arrows() -> dict[str, list[str]]:
    """Returns the rooms that each room imports, all in order of their names."""
    found: dict[str, set[str]] = {}
    for room, file in rooms():
        met = found.setdefault(room, set())
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            met |= {name.split(".")[1] for name in names if name.startswith("highrank.") and name.count(".")}
        met.discard(room)
    return {room: sorted(found[room].intersection(found)) for room in sorted(found)}


def drawn(graph: dict[str, list[str]]) -> str:
    """Returns the picture as a Mermaid flowchart, without arrows that a longer way makes needless."""
    below: dict[str, set[str]] = {}
    for room in TopologicalSorter(graph).static_order():
        below[room] = {*graph[room]}.union(*(below[other] for other in graph[room]))
    lines = []
    for room in graph:
        near = [a for a in graph[room] if not any(a in below[b] for b in graph[room])]
        lines += [f"    {room} --> {other}" for other in near]
    return "```mermaid\nflowchart TD\n" + "\n".join(lines) + "\n```\n"


def table(graph: dict[str, list[str]]) -> str:
    """Returns what each package says of itself, lowest first."""
    lines = ["| room | what is in it, what it imports |", "| --- | --- |"]
    for room in TopologicalSorter(graph).static_order():
        place = ROOT / ("" if room in ("methods", "tasks") else "src/highrank") / room
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        said = ast.get_docstring(ast.parse(file.read_text())) if file.is_file() else None
        if said:
            lines.append(f"| `{room}` | {said.splitlines()[0]} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    graph = arrows()
    return HEAD + drawn(graph) + "\n" + table(graph)


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.md").write_text(page())
