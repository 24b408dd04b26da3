"""Turns command-line words into a checked run: Hydra composes them, and each bare key goes to the group that has it.

    method=hira placement=fc_qkv r=16 task.n_train=640

A bare key is a core key (a field of `RunConfig`) or a field of the chosen method. Dotted keys reach the groups
`method`, `task`, `model`, `protocol` and `trainer`, and into a method's field (`parts.hira.r`). Everything wrong is one `UserError`, before any weight loads.

A text or path that is nothing in Hydra's grammar (`run_dir=a=b`, `task.train=rows (1).jsonl`) is taken as it stands, from the
first `=` to the end; in quotes (`run_dir='a b'`) it is always a text.
"""

import dataclasses
import functools
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from highrank.base import registry
from highrank.base.errors import UserError, suggest
from highrank.config.build import build, check_files
from highrank.config.run_config import CORE_KEYS, GROUPS, Run, RunConfig
from highrank.data.protocol import Protocol
from highrank.model.tiny import TINY

HYDRA_1_3 = hydra.__version__.startswith("1.3.")
VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if HYDRA_1_3 else {}
"""Hydra 1.3 asks whose defaults are meant; 1.4 has one set."""
STORE_AGAIN: dict[str, Any] = {} if HYDRA_1_3 else {"replace": True}
"""Hydra 1.4 asks whether a config may be stored again under its name."""
CHOOSING = ("experiment", "method", "task")
"""The groups that say which method and task a run has."""
NOT_TEXTS = ("null", "true", "false", "nan", "inf")
"""What Hydra reads as something else than a text."""


def compose_run(words: Sequence[str]) -> Run:
    """Returns the checked run that command-line words describe.

    Raises:
        UserError: for an unknown key or name (with the nearest ones), a wrong type, a value out of range, or a core key
            that names no file.
    """
    run = compose_trained(words)
    check_files(run.core)
    return run


def compose_trained(words: Sequence[str], same_task: bool = False) -> Run:
    """As `compose_run`, for a run that has its adapter already and may do without the files that it was trained with;
    with the `same_task`, without what that looked for too."""
    words = scaled(words)
    method = method_of(words)
    overrides = rewrite(readable(words), [method])
    config = _compose(overrides)
    if any(key_of(word) == "method" for word in words):  # in a preset's place: its fields stay where this one has them
        given = [key_of(word).removeprefix("method.") for word in overrides]
        known = ["name", *given, *(field.name for field in dataclasses.fields(method.config))]
        config.method = {key: value for key, value in config.method.items() if key in known}
    return build(config, trained=same_task)


def key_of(word: str) -> str:
    """Returns the key of a command-line word."""
    return word.partition("=")[0].lstrip("+")


def spelled(value: Any) -> str:
    """Returns a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{spelled(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and (
        value.lower() in NOT_TEXTS or not re.fullmatch(r"[a-zA-Z_/][a-zA-Z0-9_/.+-]*", value)
    ):
        return _in_quotes(value)
    return str(value)


def _in_quotes(text: str) -> str:
    return "'" + re.sub(r"(\\+)('|$)", r"\1\1\2", text).replace("'", "\\'") + "'"


def parse(word: str) -> Any:
    """Returns Hydra's reading of a word.

    Raises:
        UserError: if it is not in Hydra's grammar, with the word in quotes.
    """
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"config: {first}, got {word}; for a text as it stands write {quoted(word)}") from error


def quoted(word: str) -> str:
    """Returns a word whose value is a text as it stands, ready to paste into a shell."""
    key, _, value = word.partition("=")
    literal = f"{key}={_in_quotes(value)}"
    return f'"{literal}"' if not re.search(r'["$`\\!]', literal) else shlex.quote(literal)


def readable(words: Sequence[str], multirun: bool = False) -> list[str]:
    """Returns the words in Hydra's grammar, texts and paths that are not in it, or that it reads as something else, in quotes.

    A comma separates values with `multirun`; without, it belongs to a path.

    Raises:
        UserError: for another word outside the grammar.
    """
    paths, texts = _text_keys(words)
    return [_readable(word, key_of(word) in paths, key_of(word) in texts, multirun) for word in words]


def _readable(word: str, is_path: bool, is_text: bool, multirun: bool) -> str:
    key, _, value = word.partition("=")
    literal = f"{key}={spelled(value)}"
    try:
        override = parse(word)
    except UserError as error:
        if not (is_path or is_text):
            raise
        if multirun and "," in value:
            raise UserError(f"{error}, and each of several texts in quotes of its own") from error
        return literal
    if override.is_sweep_override():
        if is_path and multirun and Path(value).exists():
            raise UserError(f"sweep: a comma separates values, got the one path {word}; write {quoted(word)}")
        one = (is_path and not multirun) or "," not in value
        return literal if one and (is_path or is_text) else word
    return word if not (is_path or is_text) or isinstance(override.value(), str | None) else literal


def given_text(word: str) -> str | None:
    """Returns the one text that a word gives, whatever commas it has."""
    text: str | None = parse(_readable(word, True, True, False)).value()
    return text


def _text_keys(words: Sequence[str]) -> tuple[set[str], set[str]]:
    """Returns the keys that hold a path and those that hold a text, for the methods and tasks that the words choose."""
    names: dict[str, list[str]] = {"method": [], "task": []}
    for word in words:
        if key_of(word) in names:
            names[key_of(word)] += [name.split("/")[0] for name in word.partition("=")[2].split(",")]
    configs: list[tuple[str, Any]] = [("", RunConfig), ("protocol.", Protocol)]
    with suppress(UserError):  # whatever is wrong with a name is said where it is used
        single = (w for w in words if key_of(w) in CHOOSING and "," not in w)
        chosen = _chosen(tuple(r for w in single for r in _rewrite_group(w)))
        for group, name in zip(names, chosen, strict=True):
            for each in {name, *names[group]}:
                plugin: Any = registry.load(f"{group}s", each)
                config = plugin.config
                configs += [(f"{group}.", config), *([("", config)] if group == "method" else [])]
    paths, texts = {"run_dir", "output"}, {f"model.{key}" for key in ("name", "hub", "revision")}
    for start, config in configs:
        hints = get_type_hints(config)
        texts |= {f"{start}{name}" for name, hint in hints.items() if hint in (str, str | None)}
        paths |= {f"{start}{field.name}" for field in dataclasses.fields(config) if field.metadata.get("path")}
    return paths, texts


def scaled(words: Sequence[str]) -> list[str]:
    """Returns the words with `experiment=<name> scale=small` as `experiment=<name>_small`; scale=paper changes nothing.

    Raises:
        UserError: for another scale, or without an experiment.
    """
    scales = [word.partition("=")[2] for word in words if key_of(word) == "scale"]
    kept = [word for word in words if key_of(word) != "scale"]
    if not scales:
        return kept
    if scales[-1] not in ("paper", "small"):
        raise UserError(f"command line: scale is paper or small, got scale={scales[-1]}")
    if not any(word.startswith("experiment=") for word in kept):
        raise UserError(
            f"command line: scale belongs to an experiment, got scale={scales[-1]} without experiment=<name>"
        )
    ending = "_small" if scales[-1] == "small" else ""
    return [word + ending if word.startswith("experiment=") else word for word in kept]


def method_of(words: Sequence[str]) -> Any:
    """Returns the method class that command-line words choose.

    Raises:
        UserError: for a word that is none, or an unknown name.
    """
    for word in words:
        _check_word(word)
    groups = [w for w in words if key_of(w) in CHOOSING]
    return registry.load("methods", _chosen(tuple(r for w in groups for r in _rewrite_group(w)))[0])


@functools.cache
def _chosen(groups: tuple[str, ...]) -> tuple[str, str]:
    """Returns the names of the chosen method and task."""
    register_configs()
    config = _compose(groups)
    return str(config.method.name), str(config.task.name)


def _check_word(word: str) -> None:
    key, equals, _ = word.partition("=")
    if word.startswith("~"):
        raise UserError(f"command line: a key cannot be taken away, got {word}; give it a value instead: key=value")
    if key.lstrip("+").replace("/", ".").split(".")[0] == "hydra":
        raise UserError(
            f"command line: Hydra only composes the config, so its own keys change nothing, got {word}; "
            "use output or run_dir for where a run goes"
        )
    if not equals:
        raise UserError(f"command line: give key=value, got {word}")


def rewrite(words: Sequence[str], methods: Sequence[Any]) -> list[str]:
    """Returns Hydra overrides for `words`: bare method fields become `++method.<field>`.

    Raises:
        UserError: for a key that neither the core nor any of `methods` has.
    """
    for method in methods:
        clash = [f.name for f in dataclasses.fields(method.config) if f.name in (*CORE_KEYS, *GROUPS)]
        if clash:
            raise UserError(f"method {method.name}: a field must not be called like a core key, got {', '.join(clash)}")
    out = []
    for word in words:
        key, _, value = word.partition("=")
        bare = key.lstrip("+")
        if bare in GROUPS:
            out += _rewrite_group(word)
        elif bare in CORE_KEYS:
            out.append(word)
        elif "." in bare and bare.split(".")[0] in GROUPS:
            out.append(f"++{bare}={value}")
        elif any(bare.split(".")[0] in (f.name for f in dataclasses.fields(m.config)) for m in methods):
            reached = [key_of(other).removeprefix("method.") for other in words if "." in key_of(other)]
            within = [key.split(".")[1] for key in reached if key.startswith(f"{bare}.")]
            out.append(f"++method.{bare}={_as_mapping(bare, value, within) if within else value}")
        else:
            raise UserError(_unknown_key(bare, methods))
    return out


def _as_mapping(key: str, value: str, within: Sequence[str]) -> str:
    """Returns a list of names as a mapping of each to nothing, so that other words can reach `within` it.

    Raises:
        UserError: for a word that reaches for what the list does not name.
    """
    names = parse(f"x={value}").value()
    if isinstance(names, list) and (beyond := [name for name in within if name not in map(str, names)]):
        raise UserError(f"{key}: a field belongs to what is in the list, got {key}.{beyond[0]} with {key}={value}")
    return spelled(dict.fromkeys(names, {})) if isinstance(names, list) else value  # noqa: RUF024  # it is only spelled


def _unknown_key(key: str, methods: Sequence[Any]) -> str:
    fields = {m.name: [f.name for f in dataclasses.fields(m.config)] for m in methods}
    owned = "; ".join(
        f"{name} has no field {key!r}; it has: {', '.join(names) or 'none'}" for name, names in fields.items()
    )
    known = {*CORE_KEYS, *GROUPS, *(f for names in fields.values() for f in names)}
    near = suggest(key, known)
    return f"{owned}; and no core key is called {key!r}{near if 'mean' in near else '; core keys: highrank run --help'}"


def _rewrite_group(word: str) -> list[str]:
    key, _, value = word.lstrip("+").partition("=")
    if (key, value) == ("experiment", "null"):  # the default, which Hydra takes from no override
        return []
    if key == "task" and "/" in value:
        name, _, member = value.partition("/")
        return [f"task={name}", f"++task.member={member}"]
    if key == "model" and value.startswith("hf:"):
        hub, _, revision = value.removeprefix("hf:").partition("@")
        pinned = [f"++model.revision={spelled(revision)}"] if revision else []
        return ["model=hf", f"++model.name={spelled(hub.split('/')[-1])}", f"++model.hub={spelled(hub)}", *pinned]
    return [f"{key}={value}"]


def packaged_configs() -> Any:
    """Returns the context in which Hydra reads the configs of this package."""
    return initialize_config_module("highrank.configs", **VERSION_BASE)


def _compose(overrides: Sequence[str]) -> Any:
    try:
        OverridesParser.create().parse_overrides(list(overrides))
        GlobalHydra.instance().clear()
        with packaged_configs():
            for override in overrides:
                key, _, value = override.partition("=")
                if key in GROUPS:
                    _check_choice(key, value)
            return compose("highrank", overrides=list(overrides))
    except UserError:
        raise
    except (
        HydraException,
        OmegaConfBaseException,
        TypeError,
        ValueError,
    ) as error:  # the last two: a key within a list
        cause = error.__cause__ or error
        first = str(cause).strip().splitlines()[0]
        key = getattr(cause, "full_key", None) or ""
        given = [word for word in overrides if word.lstrip("+").partition("=")[0] == key] or overrides
        raise UserError(f"config: {first}, got {' '.join(given)}") from error


def _check_choice(group: str, value: str) -> None:
    if group in ("method", "task"):
        known = set(registry.available(group + "s"))
        known |= {option for option in _options(group) if "/" in option}
    else:
        known = set(_options(group))
    if value not in known and not (group == "experiment" and value == "null"):
        raise UserError(f"{group}: unknown name, got {group}={value}{suggest(value, known)}")


@functools.cache
def _options(group: str) -> list[str]:
    """Returns every choice of a config group, nested ones as `folder/name`."""
    loader = GlobalHydra.instance().config_loader()
    names = list(loader.get_group_options(group, ObjectType.CONFIG))
    for folder in loader.get_group_options(group, ObjectType.GROUP):
        names += [f"{folder}/{name}" for name in loader.get_group_options(f"{group}/{folder}", ObjectType.CONFIG)]
    return sorted(set(names))


def register_configs() -> None:
    """Makes the core keys and the names of all plugins known to Hydra; imports no plugin."""

    store = functools.partial(ConfigStore.instance().store, **STORE_AGAIN)
    store(name="highrank", node=RunConfig)
    for name in registry.available("methods"):
        store(group="method", name=name, node={"name": name})
    for name in registry.available("tasks"):
        store(group="task", name=name, node={"name": name})
    for name in TINY:
        store(group="model", name=f"tiny_{name}", node={"name": f"tiny_{name}", "dtype": "float32"})
    store(group="model", name="hf", node={"name": "hf", "hub": None, "dtype": "bfloat16"})
