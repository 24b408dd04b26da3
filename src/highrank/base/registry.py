"""Finds methods and tasks by name.

A built-in plugin is a file in `highrank.methods` or `highrank.tasks`: its name is the file's name, so nothing is
imported to list them and only the chosen one is imported to use it. An out-of-tree plugin is an entry point in the
group `highrank.methods` or `highrank.tasks`, `name = "package.module"`.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from highrank.base.errors import UserError, suggest
from highrank.base.source import Source

_registered: dict[str, dict[str, type]] = {"methods": {}, "tasks": {}}


def available(group: str) -> dict[str, str]:
    """Returns name -> module of every plugin in `group` ("methods" or "tasks"), without importing any.

    Raises:
        UserError: if two plugins claim one name.
    """
    package = importlib.import_module(f"highrank.{group}")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    modules = {name: f"highrank.{group}.{name}" for name in names}
    for entry in _entry_points(f"highrank.{group}", tuple((path, _changed(path)) for path in sys.path)):
        if entry.name in modules and modules[entry.name] != entry.value:
            raise UserError(
                f"{group}: a name belongs to one plugin, got {entry.name!r} from both {modules[entry.name]} and "
                f"{entry.value}; uninstall one or rename its entry point"
            )
        modules[entry.name] = entry.value
    return modules


@functools.cache
def _entry_points(group: str, places: tuple[tuple[str, int], ...]) -> tuple[importlib.metadata.EntryPoint, ...]:
    """Returns what is installed in `group`; read once for `places`, the import path and when its folders changed, since
    that reads every installed package's metadata and a sweep asks for each of its cells."""
    return tuple(importlib.metadata.entry_points(group=group))


def _changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


def first_lines(group: str) -> dict[str, str]:
    """Returns name -> first line of its file's docstring of every plugin in `group`, without importing any."""
    return {name: Source(module).doc.partition("\n")[0] for name, module in sorted(available(group).items())}


def load(group: str, name: str) -> type:
    """Imports and returns the plugin class `name`.

    Raises:
        UserError: for an unknown name (with the nearest ones), or a plugin that fails to import or to register.
    """
    modules = available(group)
    kind = group.rstrip("s")
    if name not in modules:
        raise UserError(f"{kind}: unknown name, got {kind}={name}{suggest(name, modules)}")
    try:
        importlib.import_module(modules[name])
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{kind} {name}: the plugin must import, got {type(error).__name__} from {modules[name]}: {error}"
        ) from error
    if name not in _registered[group]:
        raise UserError(
            f"{kind} {name}: the plugin must register a class under its own name, got none in {modules[name]}"
        )
    return _registered[group][name]


def _register(group: str, name: str, cls: type) -> None:
    module = cls.__module__
    if not module.startswith(f"highrank.{group}.") and module.split(".")[0] == group:
        raise UserError(f"{group}: import plugins as highrank.{group}.{name}, got a second copy named {module}")
    owner = _registered[group].get(name)
    if owner is not None and owner.__module__ != module:
        raise UserError(
            f"{group}: a name belongs to one plugin, got {name!r} from both {owner.__module__} and {module}"
        )
    _registered[group][name] = cls


def later_field(default: Any) -> Any:
    """Returns a config field that is younger than runs of its plugin: a run with the default has the hash it had without."""
    return dataclasses.field(default=default, metadata={"later": True})


def register_method(config: type) -> Callable[[type], type]:
    """Class decorator: makes a `Method` known under its file's name, with `config` as its fields.

    Raises:
        UserError: for a class that is no method, or not what the contract says.
    """

    def decorate(cls: Any) -> Any:
        cls.name, cls.config = cls.__module__.rsplit(".", 1)[-1], config
        if not hasattr(cls, "check_class"):
            raise UserError(
                f"method {cls.name}: a method derives from Method or WholeModelMethod of highrank.plugin, got "
                f"class {cls.__qualname__}"
            )
        cls.check_class()
        _register("methods", cls.name, cls)
        return cls

    return decorate


def register_task(config: type) -> Callable[[type], type]:
    """Class decorator: makes a `Task` known under its file's name, with `config` as its fields.

    Raises:
        UserError: for a class that is no task, or not what the contract says.
    """

    def decorate(cls: Any) -> Any:
        cls.name, cls.config = cls.__module__.rsplit(".", 1)[-1], config
        if not hasattr(cls, "check_class"):
            raise UserError(
                f"task {cls.name}: a task derives from Task of highrank.plugin, got class {cls.__qualname__}"
            )
        cls.check_class()
        _register("tasks", cls.name, cls)
        return cls

    return decorate
