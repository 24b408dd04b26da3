"""Reads a module without importing it: its docstring, its constants, the fields of a config and what is asked of them.

What lists and completes names answers at once with it, where importing a plugin takes PyTorch's seconds.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from highrank.base.errors import UserError, described

UNKNOWN = "…"
"""Stands in a text for what only running the code would tell."""


@dataclass(frozen=True)
class Field:
    """One field of a config."""

    name: str
    type: str
    default: str | None
    """As it is typed in a command line; None for a field that must be given."""
    meaning: str
    rules: tuple[str, ...] = ()
    """What is asked of a value, in the words of the error message: `>= 1`, `one of plain, mini, bat`."""

    @property
    def choices(self) -> list[str]:
        """Its values, where there are few."""
        if self.type.split(" ")[0] == "bool":
            return ["false", "true"]
        for rule in self.rules:
            listed = rule.removeprefix("one of ")
            if listed != rule or " or " in listed:
                parts = re.split(r", or |, | or ", re.sub(r" \([^)]*\)", "", listed))
                if all(re.fullmatch(r"[\w.+-]+", part) for part in parts):
                    return parts
        return []


class Source:
    """The source of one module.

    Raises:
        UserError: if there is no such module, or it is no Python.
    """

    def __init__(self, module: str):
        self.module = module
        try:
            loader: Any = getattr(importlib.util.find_spec(module), "loader", None)
            self.tree = ast.parse((loader.get_source(module) if hasattr(loader, "get_source") else None) or "")
        except (ImportError, SyntaxError, ValueError) as error:
            raise UserError(
                f"plugin: its file must be there and be Python, got {described(error)} in {module}"
            ) from error

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.tree) or ""

    def constant(self, name: str) -> list[Any]:
        """Returns what a tuple, list or mapping of the module holds (of a mapping the keys), or the one value that it is."""
        definition = self.defined(name)
        return definition[0].values(definition[1]) if definition else []

    def defined(self, name: str) -> "tuple[Source, ast.AST] | None":
        """Returns the class, function or value of a name, and the source in which it is: imports are followed."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return self, node
            if isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == name:
                return self, node.value
            if isinstance(node, ast.Assign):
                for target, value in _pairs(node.targets[0], node.value):
                    if target == name:
                        return self, value
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return Source(node.module).defined(alias.name)
        return None

    def values(self, node: ast.AST) -> list[Any]:
        """Returns the values that a literal holds; of a mapping the keys."""
        if isinstance(node, ast.Constant):
            return [node.value]
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return [value for each in node.elts for value in self.values(each)]
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return [value for key, held in pairs for value in self.values(held if key is None else key)]
        if isinstance(node, ast.Starred):
            return self.values(node.value)
        if isinstance(node, ast.Call) and node.args:  # list(X), tuple(X), sorted(X)
            return self.values(node.args[0])
        return self.constant(node.id) if isinstance(node, ast.Name) else []

    def text(self, node: ast.AST, known: Mapping[str, Any] = {}) -> str:
        """Returns a text as the code would make it; `known` are local names with their values."""
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(part, known) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return self.text(node.value, known)
        if isinstance(node, ast.Name) and node.id in known:
            return str(known[node.id])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
            return self.text(node.func.value).join(map(str, self.values(node.args[0]))) or UNKNOWN
        values = [] if isinstance(node, ast.Call) else self.values(node)
        return str(values[0]) if len(values) == 1 else UNKNOWN

    @property
    def config(self) -> str | None:
        """The name of the config that the module registers its plugin with."""
        for node in self.tree.body:
            for call in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("register_"):
                    return next((ast.unparse(word.value) for word in call.keywords if word.arg == "config"), None)
        return None

    def fields(self, name: str | None, rules: str = "__post_init__") -> list[Field]:
        """Returns the fields of a dataclass, of those it derives from first; `rules` is the function that checks them."""
        definition = self.defined(name) if name else None
        if definition is None or not isinstance(definition[1], ast.ClassDef):
            return []
        source, cls = definition[0], definition[1]
        fields = {field.name: field for base in cls.bases for field in source.fields(ast.unparse(base))}
        after = [*cls.body[1:], ast.Pass()]
        for node, doc in zip(cls.body, after, strict=True):
            if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
                text = doc.value.value if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) else ""
                key = ast.unparse(node.target)
                meaning = " ".join(str(text).split())
                default = _default(node.value)
                if isinstance(node.value, ast.Call) and (held := source.constant(default or "")):
                    default = f"[{','.join(map(str, held))}]"  # list(NAMES)
                fields[key] = Field(key, ast.unparse(node.annotation), default, meaning)
        checks = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == rules]
        said = [rule for check in checks for rule in source._asked(check.body, {})] or self.asked(rules)
        return [with_rules(field, said, list(fields)) for field in fields.values()]

    def asked(self, function: str) -> list[str]:
        """Returns the rules that a function of the module checks."""
        definition = self.defined(function)
        return (
            list(definition[0]._asked(definition[1].body, {}))
            if definition and isinstance(definition[1], ast.FunctionDef)
            else []
        )

    def _asked(self, body: Sequence[ast.stmt], known: Mapping[str, Any]) -> Iterator[str]:
        """Yields the rules that a function checks, from its messages: `raise UserError(...)`, `need(...)`, `one_of(...)`."""
        for node in body:
            if isinstance(node, ast.For):
                for element in getattr(node.iter, "elts", []):
                    bound = {name: self.text(value) for name, value in _pairs(node.target, element)}
                    yield from self._asked(node.body, {**known, **bound})
            elif isinstance(node, ast.If):
                yield from self._asked([*node.body, *node.orelse], known)
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                yield re.sub(r"^[\w …]+: ", "", self.text(node.exc.args[0], known).partition(", got ")[0])
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                call, name = node.value, ast.unparse(node.value.func)
                if name == "need":
                    yield f"{self.text(call.args[1], known)} {self.text(call.args[2], known)}"
                elif name == "one_of":
                    yield f"{self.text(call.args[1], known)} is one of {', '.join(map(str, self.values(call.args[3])))}"


def _pairs(target: ast.AST, value: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yields the names of an assignment with what each is given."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for each, given in zip(target.elts, value.elts, strict=True):
            yield from _pairs(each, given)
    elif isinstance(target, ast.Name):
        yield target.id, value


def _default(node: ast.AST | None) -> str | None:
    if isinstance(node, ast.Call):  # later_field(x), path_field(x), field(default_factory=x)
        given = {word.arg: word.value for word in node.keywords}
        inner = given.get("default") or given.get("default_factory") or (node.args[0] if node.args else None)
        inner = inner.body if isinstance(inner, ast.Lambda) else inner
        return {"dict": "{}", "list": "[]"}.get(ast.unparse(inner), _default(inner)) if inner else None
    if isinstance(node, ast.Constant):
        named = {None: "null", True: "true", False: "false"}
        return named[node.value] if node.value is None or isinstance(node.value, bool) else str(node.value)
    return ast.unparse(node) if node else None


def with_rules(field: Field, said: Sequence[str], names: Sequence[str]) -> Field:
    """Returns a field with those of the rules that begin with its name, or name it and begin with no one field."""
    reworded = []
    for rule in said:
        first, _, rest = rule.partition(" ")
        of_one = first in names and not rest.startswith("and ")
        if UNKNOWN in rule:
            continue
        if of_one and first == field.name:
            reworded.append(re.sub(r"^(must be|is|are) (?!not )", "", rest))
        elif not of_one and re.search(rf"(?<![\w.]){re.escape(field.name)}(?!\w)", rule):
            reworded.append(rule)
    return Field(field.name, field.type, field.default, field.meaning, (*field.rules, *reworded))
