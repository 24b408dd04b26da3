"""`highrank completion bash|zsh|fish`: a script for the shell's own completion, which asks here what could come next.

The script sends the line up to the cursor to `highrank completion answer` and gets a line per word that could stand there:
the word, a tab, what it means. An answer is due while a person waits, so nothing is imported that imports PyTorch: names,
fields and values are read from files.
"""

import ast
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from highrank.base import registry
from highrank.base.errors import UserError, suggest
from highrank.base.files import run_folders
from highrank.base.source import Field, Source, with_rules
from highrank.config.presets import preset_texts
from highrank.config.trainer_keys import PRECISIONS, STRATEGIES, TRAINER_KEYS
from highrank.model.tiny import TINY

BASH = """\
_highrank() {
    local word
    COMPREPLY=()
    while IFS= read -r word; do
        COMPREPLY+=("$word")
    done < <(printf '%s' "${COMP_LINE:0:COMP_POINT}" | highrank completion answer "$COMP_WORDBREAKS" 2>/dev/null)
}
complete -o nospace -F _highrank highrank
"""
ZSH = """\
#compdef highrank
_highrank() {
    local word meaning
    local -a words_whole words_begun shown_whole shown_begun
    while IFS=$'\\t' read -r word meaning; do
        if [[ $word == *[=/.] ]]; then
            words_begun+=("$word"); shown_begun+=("$word${meaning:+  -- $meaning}")
        else
            words_whole+=("$word"); shown_whole+=("$word${meaning:+  -- $meaning}")
        fi
    done < <(printf '%s' "$LBUFFER" | highrank completion answer 2>/dev/null)
    compadd -l -d shown_whole -a words_whole
    compadd -l -S '' -d shown_begun -a words_begun
}
compdef _highrank highrank
"""
FISH = """\
function __highrank_answer
    printf '%s' (commandline -cp) | highrank completion answer 2>/dev/null
end
complete -c highrank -f -a '(__highrank_answer)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
INSTALL = {
    "bash": 'eval "$(highrank completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(highrank completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": "highrank completion fish > ~/.config/fish/completions/highrank.fish",
}
CATALOGUES = {
    "methods": "method",
    "tasks": "task",
    "models": "model",
    "protocols": "protocol",
    "experiments": "experiment",
}
TAKES_KEYS = r"KEY=VALUE|key=value|task=\.\.\."
TAKES_FOLDERS = r"\bRUN|DIR|SWEEP|FOLDER"
"""What a command's usage says when it takes the one or the other."""
GROUPS = ("method", "task", "model", "protocol", "trainer", "experiment")
"""As in `highrank.config.run_config`, which would take too long to import."""
NEWEST = 50
"""How many runs are offered where nothing has been typed."""


class Offer(NamedTuple):
    """A word that could stand at the cursor; one that is whole is followed by a space."""

    word: str
    meaning: str = ""

    @property
    def whole(self) -> bool:
        return not self.word.endswith(("=", "/", "."))


def command(words: list[str]) -> int:
    shell = words[0] if words else ""
    if shell == "answer":
        return answer(sys.stdin.read(), "".join(words[1:]))
    if shell not in SCRIPTS or len(words) > 1:
        near = suggest(shell, SCRIPTS) if shell else ""
        ways = "\n".join(f"  {way}" for way in INSTALL.values())
        raise UserError(f"completion: a shell is needed, got {' '.join(words) or 'none'}{near}; use:\n{ways}")
    print(f"# {INSTALL[shell]}\n{SCRIPTS[shell]}", end="")
    return 0


def answer(line: str, breaks: str = "") -> int:
    """Prints what could stand at the end of a line: for bash, whose `breaks` split words, what follows the last of them."""
    try:
        offers = list(offered(line))
    except (UserError, OSError):
        return 0
    typed = _split(line)[-1]
    start = max((typed.rfind(mark) for mark in "=:" if mark in breaks), default=-1) + 1
    for offer in offers:
        if breaks:
            print(re.sub(r"([^\w@%+=:,./\[\]-])", r"\\\1", offer.word[start:]) + (" " if offer.whole else ""))
        else:
            print(f"{offer.word}\t{offer.meaning}")
    return 0


def offered(line: str) -> Iterator[Offer]:
    """Yields the words that could stand at the end of a command line."""
    words = _split(line)
    starts = [i for i, word in enumerate(words[:-1]) if Path(word).name == "highrank"]
    *before, typed = words[starts[-1] + 1 if starts else 1 :] or [""]
    for offer in _all(before, typed):
        if offer.word.startswith(typed) and (offer.word != typed or offer.whole):
            yield offer


def _split(line: str) -> list[str]:
    """Returns the words of a line, the last one as far as it is typed."""
    for end in ("", "'", '"'):
        try:
            words = shlex.split(line + end)
        except ValueError:
            continue
        return [*words, ""] if not words or (not end and line[-1:].isspace()) else words
    return [""]


def _all(before: list[str], typed: str) -> Iterable[Offer]:
    commands = _commands()
    if not before:
        return map(Offer, [*commands, "help"])
    name, *given = before
    if name == "completion":
        return map(Offer, SCRIPTS)
    if name in CATALOGUES:
        return () if given else _names(CATALOGUES[name])
    if name == "run":
        return [Offer("-m", "a sweep")] if typed.startswith("-") else _pairs(given, typed)
    return _of_command(commands[name], given, typed) if name in commands else ()


def _commands() -> dict[str, str]:
    """Returns the function of each command."""
    found = Source("highrank.cli").defined("COMMANDS")
    table: dict[str, str] = ast.literal_eval(found[1]) if found and isinstance(found[1], ast.expr) else {}
    return table


def _of_command(place: str, given: list[str], typed: str) -> Iterator[Offer]:
    """Yields what could stand in a command, as its function says: options, their values, folders, keys."""
    usage, options = _words_of(*place.split(":"))
    option = options.get(given[-1]) if given else None
    if option is not None:
        if given[-1] == "--where":
            yield from _pairs(given, typed)
        yield from map(Offer, option) if option else _folders(typed)
    elif typed.startswith("-"):
        yield from map(Offer, options)
    else:
        if re.search(TAKES_FOLDERS, usage):
            yield from _folders(typed)
        if re.search(TAKES_KEYS, usage):
            yield from _pairs(given, typed)


def _words_of(module: str, function: str) -> tuple[str, dict[str, list[str] | None]]:
    """Returns the texts of a command's function, its usage among them, and its options, those too that it has helpers add:
    the choices of each, empty where it takes another value, None for a switch."""
    source = Source(module)
    found = source.defined(function)
    said: list[str] = []
    options: dict[str, list[str] | None] = {}
    for node in ast.walk(found[1]) if found else ():
        if isinstance(node, ast.Constant | ast.JoinedStr):
            said.append(source.text(node))
        if not isinstance(node, ast.Call) or not node.args:
            continue
        if isinstance(node.func, ast.Name) and ast.unparse(node.args[0]) == "parser":
            options |= _words_of(module, node.func.id)[1]
        elif ast.unparse(node.func).endswith(".add_argument"):
            words = {word.arg: word.value for word in node.keywords}
            choices = [str(value) for value in source.values(words["choices"])] if "choices" in words else []
            switch = "store_true" in map(source.text, words.values())
            names = [name for name in map(source.text, node.args) if name.startswith("-")]
            options |= dict.fromkeys(names, None if switch else choices)
    return " ".join(said), options


def _names(group: str) -> Iterator[Offer]:
    """Yields the names in a group of the config."""
    if group in ("method", "task"):
        yield from map(Offer, sorted(registry.available(f"{group}s")))
        return
    yield from (Offer(name) for name, _ in preset_texts(group))
    if group == "model":
        yield from (Offer(f"tiny_{name}") for name in TINY)


def _pairs(given: list[str], typed: str) -> Iterator[Offer]:
    """Yields keys, or the values of the key that is typed; in a list of values, the next one."""
    key, equals, value = typed.partition("=")
    fields = {**_core(key), **_of_chosen("method", given, ""), **_of_group(key, given)}
    if not equals:
        yield from (Offer(f"{group}=", "a name") for group in GROUPS)
        yield from (Offer(f"{group}.", f"keys of the {group}") for group in GROUPS[:-1] if group != "method")
        yield from (Offer(f"{name}=", field.meaning) for name, field in fields.items())
        return
    last = max(value.rfind(mark) for mark in ",[") + 1
    start, part = f"{key}={value[:last]}", value[last:]
    if key in GROUPS:
        yield from (Offer(start + name) for name, _ in _names(key))
        if key == "task" and "/" in part:
            name = part.partition("/")[0]
            yield from (Offer(f"{start}{name}/{member}") for member in _choices(_plugin("tasks", name).get("member")))
        return
    field = fields.get(key)
    yield from (Offer(start + choice) for choice in _choices(field))
    if field is not None and field.type.startswith("str") and not field.choices:
        yield from (Offer(f"{start}{path}") for path, _ in _files(part))


def _choices(field: Field | None) -> list[str]:
    return field.choices if field else []


def _core(key: str) -> dict[str, Field]:
    """Returns the core keys and those of a sweep; the values of the one that is typed where they are in files of their own."""
    placements = Source("highrank.model.placement").constant("PLACEMENTS") if key == "placement" else ["fc_qkv"]
    launchers = Source("highrank.sweep.launch").constant("LAUNCHERS") if key == "launcher" else ["local"]
    extra = {
        "scale": ("paper or small", "Of an experiment: as in the paper, or for two cores."),
        "lr_search": ("", "Of a sweep: learning rates to try per method, or how many."),
        "lr_search_most": ("", "Of a sweep: to how many an arm's rates may grow while the best is the first or last."),
        "launcher": (f"one of {', '.join(launchers)}", "Of a sweep: where its runs execute."),
        "jobs": ("", "Of a sweep: runs at once."),
        "sweep_dir": ("", "Of a sweep: its folder."),
    }
    fields = {field.name: field for field in Source("highrank.config.build").fields("RunConfig", "_check_core")}
    fields["placement"] = replace(fields["placement"], rules=(f"one of {', '.join(placements)}",))
    fields |= {
        name: Field(name, "str" if "dir" in name else "", None, said, (rule,)) for name, (rule, said) in extra.items()
    }
    return {name: field for name, field in fields.items() if name not in ("defaults", "sweep", *GROUPS)}


def _of_group(key: str, given: list[str]) -> dict[str, Field]:
    """Returns the dotted keys of the group that a key begins with."""
    group = key.partition(".")[0]
    if "." not in key:
        return {}
    if group in ("method", "task"):
        return _of_chosen(group, given, f"{group}.")
    fields = []
    if group == "protocol":
        fields = Source("highrank.data.protocol").fields("Protocol")
    elif group == "model":
        source = Source("highrank.config.build")
        names = source.constant("MODEL_KEYS")
        fields = [with_rules(Field(name, "", None, ""), source.asked("_check_model"), names) for name in names]
    elif group == "trainer":
        known = {"precision": PRECISIONS, "strategy": STRATEGIES, "accelerator": ("auto", "cpu", "gpu")}
        rules = {name: (f"one of {', '.join(values)}",) for name, values in known.items()}
        fields = [Field(name, "", None, "", rules.get(name, ())) for name in TRAINER_KEYS]
    return {f"{group}.{field.name}": field for field in fields}


def _of_chosen(group: str, given: list[str], start: str) -> dict[str, Field]:
    """Returns the fields of the methods or the task that a line chooses, by an experiment too, or of the default one."""
    default = {"method": "hira", "task": "wordmath"}[group]
    for word in given:
        key, _, value = word.partition("=")
        if key == "experiment":
            preset = dict(preset_texts("experiment")).get(value, "")
            found = re.search(rf"override /{group}: (\w+)", preset)
            default = found[1] if found else default
    names = next((w.partition("=")[2] for w in reversed(given) if w.startswith(f"{group}=")), default)
    return {
        f"{start}{field.name}": field
        for name in names.split(",")
        for field in _plugin(f"{group}s", name.partition("/")[0]).values()
    }


def _plugin(group: str, name: str) -> dict[str, Field]:
    module = registry.available(group).get(name)
    if module is None:
        return {}
    source = Source(module)
    return {field.name: field for field in source.fields(source.config)}


def _folders(typed: str) -> Iterator[Offer]:
    """Yields runs, sweeps and the folders on the way to them; before anything is typed, the newest runs of all."""
    if not typed and Path("outputs").is_dir():
        runs = sorted(run_folders(Path("outputs")), key=lambda run: run.stat().st_mtime, reverse=True)
        yield from (Offer(str(run)) for run in runs[:NEWEST])
    for path, folder in _files(typed):
        if folder:
            holds = [name for name in ("results.json", "sweep.json") if (Path(path) / name).is_file()]
            if holds:
                yield Offer(path.rstrip("/"))
            if holds != ["results.json"]:
                yield Offer(path)


def _files(typed: str) -> Iterator[tuple[str, bool]]:
    """Yields what a path that is being typed could become, folders with a slash behind them, and whether it is one."""
    start = typed[: typed.rfind("/") + 1]
    for entry in sorted(os.scandir(start or "."), key=lambda each: each.name):
        if not entry.name.startswith("."):
            yield f"{start}{entry.name}{'/' if entry.is_dir() else ''}", entry.is_dir()
