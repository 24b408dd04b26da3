"""The shape that a file's content must have for those who read it, and what of it has another.

A shape is a type, `float` standing for whole numbers too; a function that says yes or no, its docstring what is asked for; a
set of texts, one of which it must be; a tuple of shapes, one of which it must have; a list with the shape of each element;
or a mapping from keys to shapes, in which `key?` may be missing and `...` stands for every other key.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST = 60
"""Characters of a value that a message shows."""


def read_json(file: Path, shape: Any) -> Any:
    """Returns what a file of JSON holds, which has this shape.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON, or of another shape.
    """
    try:
        content = json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError("brackets within brackets without end") from error
    return shaped(content, shape)


def shaped(content: Any, shape: Any) -> Any:
    """Returns the content, which has this shape.

    Raises:
        ValueError: if it has another, with the first place where it has.
    """
    if wrong := _wrong(content, shape, ""):
        raise ValueError(wrong)
    return content


def amount(value: Any) -> bool:
    """a number from 0 on"""
    return _is(value, float) and math.isfinite(value) and value >= 0


def plain(value: Any) -> bool:
    """a text, a number, true, false, null, or lists and mappings of these"""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
    return all(map(plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)


def _wrong(value: Any, shape: Any, at: str) -> str:
    """Returns where a value is not as its shape asks, or nothing."""
    if isinstance(shape, dict) and isinstance(value, Mapping):
        return _wrong_in(value, shape, f"{at}." if at else "")
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (_wrong(each, shape[0], f"{at}[{i}]") for i, each in enumerate(value))), "")
    if isinstance(shape, tuple):
        found = [_wrong(value, each, at) for each in shape]
        within = [wrong for wrong in found if not wrong.startswith(f"{at}=")]
        if within:  # nothing is wrong, or something inside
            return "" if "" in found else within[0]
    elif _is(value, shape):
        return ""
    text = json.dumps(value, default=str)
    shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return f"{at}={shown}, which must be {_words(shape)}" if at else f"{shown}, which must be {_words(shape)}"


def _wrong_in(value: Mapping[Any, Any], shape: Mapping[Any, Any], start: str) -> str:
    names = {str(key).removesuffix("?") for key in shape}
    if other := next((key for key in value if not isinstance(key, str)), None):
        return f"the key {start}{other}, which must be a text"
    for key, inner in shape.items():
        name = str(key).removesuffix("?")
        if key is ...:
            others = (_wrong(each, inner, f"{start}{other}") for other, each in value.items() if other not in names)
            wrong = next(filter(None, others), "")
        elif name in value:
            wrong = _wrong(value[name], inner, f"{start}{name}")
        else:
            wrong = "" if key.endswith("?") else f"no {start}{name}"
        if wrong:
            return wrong
    return ""


def _is(value: Any, shape: Any) -> bool:
    if isinstance(shape, frozenset):
        return isinstance(value, str) and value in shape
    if isinstance(shape, type):
        kinds = (float, int) if shape is float else (shape,)
        return isinstance(value, kinds) and (shape is bool or not isinstance(value, bool))
    return value is None if shape is None else callable(shape) and bool(shape(value))


def _words(shape: Any) -> str:
    if isinstance(shape, frozenset):
        return f"one of {', '.join(sorted(shape))}"
    if isinstance(shape, tuple):
        return " or ".join(map(_words, shape))
    if isinstance(shape, dict | list):
        return "a mapping" if isinstance(shape, dict) else "a list"
    named = {None: "null", str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return named.get(shape) or str(shape.__doc__)
