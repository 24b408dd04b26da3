"""What there is: `highrank methods`, `tasks`, `models`, `protocols` and `experiments`, each by itself or with one name.

The lists are read from files, nothing is imported for them; one name's page counts on the default model.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import yaml

from highrank.base import registry
from highrank.base.console import say
from highrank.base.errors import UserError, suggest
from highrank.base.options import Words
from highrank.base.source import Field, Source
from highrank.config.presets import preset_texts
from highrank.find.table import show, show_facts
from highrank.model.tiny import TINY

KINDS = {"generate": "texts", "classify": "classes", "regress": "numbers", "classify_images": "classes of images"}
MODELS = {
    "generate": "",
    "classify": " model=minilm_l6",
    "regress": " model=minilm_l6",
    "classify_images": " model=tiny_vit",
}
"""What an example of each kind of task says of the model."""
TASKS = {"generate": "", "classify": " task=glue/cola", "classify_images": " task=images"}
"""What an example with a model for each kind of task says of the task."""


def methods(words: list[str]) -> int:
    name = _name("methods", words)
    if name is None:
        show(
            ["method", "W'", "fields (defaults)"],
            list(_plugins("methods", _formula)),
            "highrank methods NAME says more",
        )
        return 0
    source = _source("methods", name)
    fields = source.fields(source.config)
    before, after = parts(source.doc)
    say(before)
    _show_fields(fields, "")
    say(f"\n{after}")
    show_facts(method_facts(name, fields))
    return 0


def tasks(words: list[str]) -> int:
    name = _name("tasks", words)
    if name is None:
        show(["task", "what", "fields (defaults)"], list(_plugins("tasks", _title)), "highrank tasks NAME says more")
        return 0
    name, _, member = name.partition("/")
    source = _source("tasks", name)
    facts = list(_task_facts(name, member, source.doc))
    say(f"{source.doc}\n")
    _show_fields(source.fields(source.config), "task.")
    show_facts(facts)
    return 0


def models(words: list[str]) -> int:
    name = _name("models", words)
    presets = read_presets("model")
    tiny = {f"tiny_{each}": f"random, two layers, for tests: {each}" for each in TINY}
    if name is None:
        rows = [(each, about, values["hub"], values["dtype"]) for each, (about, values) in presets.items()]
        rows += [
            (
                "hf:ID",
                "any causal model or encoder, of texts or images, on the Hub: hf:Qwen/Qwen2.5-0.5B",
                "ID",
                "bfloat16",
            )
        ]
        rows += [(each, about, "built in code", "float32") for each, about in tiny.items()]
        show(["model", "what", "from", "dtype"], rows, "path=FOLDER reads any of them from a folder")
        return 0
    _check("models", name, [*presets, *tiny])
    about, values = presets.get(name, (tiny.get(name, ""), {}))
    say(f"{name}: {about}")
    show_facts([*_flat(values), *_model_facts(name)])
    return 0


def protocols(words: list[str]) -> int:
    name = _name("protocols", words)
    presets = read_presets("protocol")
    if name is None:
        rows = [(each, values["version"], about) for each, (about, values) in presets.items()]
        show(["protocol", "version", "what"], rows, "highrank protocols NAME says more")
        return 0
    _check("protocols", name, list(presets))
    about, values = presets[name]
    say(f"{name}: {about}")
    say("")
    families = values.pop("families", {})
    meanings = {field.name: field.meaning for field in Source("highrank.data.protocol").fields("Protocol")}
    rows = [(key, _shown(value), meanings.get(key, "")) for key, value in values.items()]
    for family, keys in families.items():
        rows += [(f"{key} of {family} tasks", _shown(value), meanings.get(key, "")) for key, value in keys.items()]
    show(["key", "value", "meaning"], rows)
    example = f"highrank run protocol={name} protocol.max_length=256"
    show_facts([("other keys", "as they are by default: docs/tasks.md"), ("example", example)])
    return 0


def experiments(words: list[str]) -> int:
    name = _name("experiments", words)
    presets = read_presets("experiment")
    if name is None:
        rows = [(each, _axes(values.get("sweep")), about) for each, (about, values) in presets.items()]
        show(
            ["experiment", "axes of -m", "what"],
            rows,
            "those called _small fit two cores; highrank experiments NAME says more",
        )
        return 0
    _check("experiments", name, list(presets))
    about, values = presets[name]
    say(f"{name}: {about}")
    say("")
    small = f"{name}_small"
    defaults = [pair for each in values.pop("defaults", []) for pair in each.items()]
    chosen = [(key.removeprefix("override /"), value) for key, value in defaults]
    sweep = values.pop("sweep", None) or {}
    show_facts([*chosen, *_flat(values), *((f"sweep: {key}", _shown(axis)) for key, axis in sweep.items())])
    say(f"example: highrank run experiment={name}")
    if sweep:
        say(f"all of {_axes(sweep)}: highrank run -m experiment={name}")
    if small in presets:
        say(f"on two cores: highrank run -m experiment={name} scale=small  (highrank experiments {small})")
    return 0


def read_presets(group: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns name -> (what its file says of it, its values) of every preset of a config group."""
    found = {}
    for name, text in preset_texts(group):
        head = takewhile(lambda line: line.startswith("#"), text.splitlines())
        comment = [line.removeprefix("#").strip() for line in head]
        about = " ".join(line for line in comment if not line.startswith(("@package", "python run.py")))
        found[name] = about, yaml.load(text, yaml.CSafeLoader) or {}
    return found


def _name(command: str, words: Sequence[str]) -> str | None:
    parser = Words(command, "[NAME]")
    parser.add_argument("name", nargs="?")
    name: str | None = parser.parse_args(list(words)).name
    return name


def _check(command: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        longer = [each for each in known if each.startswith(name)]
        raise UserError(f"{command}: unknown name, got {name}{suggest(name, longer or known)}")


def _source(group: str, name: str) -> Source:
    modules = registry.available(group)
    _check(group, name, list(modules))
    return Source(modules[name])


def _plugins(group: str, what: Any) -> Iterator[tuple[str, str, str]]:
    for name, module in sorted(registry.available(group).items()):
        try:
            source = Source(module)
        except UserError as error:
            yield name, str(error), ""
            continue
        fields = source.fields(source.config)
        typed = [f.name if f.default is None else f"{f.name}={f.default}" for f in fields]
        yield name, what(source.doc), ", ".join(typed) or "none"


def _title(doc: str) -> str:
    return doc.partition("\n")[0].partition(": ")[2]


def _formula(doc: str) -> str:
    """Returns the formula of a method's file: its first indented line or the one of W', or else its title."""
    lines = (line.strip() for line in doc.splitlines() if line.startswith(("    ", "W' =")))
    first = next(lines, _title(doc))
    return re.split(r",? {3,}", first)[0].rstrip(",")


def parts(doc: str) -> tuple[str, str]:
    """Returns what a method's file says of the method, and what it says of papers and other code."""
    before, source, after = doc.partition("\nSource:")
    return before.rstrip() + "\n", f"{source}{after}".lstrip("\n") + "\n"


def _show_fields(fields: Sequence[Field], start: str) -> None:
    rows = [(start + f.name, f.type, f.default or "none", f.meaning, "; ".join(f.rules)) for f in fields]
    if rows:
        show(["field", "type", "default", "meaning", "values"], rows)
    else:
        say("It has no fields.")


def _flat(values: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{key}.")
        elif start + key != "name":
            yield start + key, _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, str) and "\n" in value else str(value)


def _axes(sweep: Mapping[str, Any] | None) -> str:
    """Returns a preset's axes with the number of values of each."""
    return " × ".join(f"{len(axis) if isinstance(axis, list) else 1} {key}" for key, axis in (sweep or {}).items())


def example(name: str, fields: Sequence[Field]) -> list[str]:
    """Returns the words of a run with a method: what must be given, and its first field to see how one is set."""
    from highrank.config.words import spelled

    cls: Any = registry.load("methods", name)
    needed = [f"{f.name}={spelled(cls.examples[0][f.name])}" for f in fields if f.default is None]
    typed = [f"{f.name}={f.default}" for f in fields[:1] if f.default not in (None, "null")]
    return [f"method={name}", *needed, *typed]


def method_facts(name: str, fields: Sequence[Field]) -> Iterator[tuple[str, str]]:
    """Yields what is known of a method with its default fields: what trains on the default model, its rate, an example."""
    from highrank.config.words import compose_run
    from highrank.model.backbones import empty_model, model_config
    from highrank.train.build import adapted_views
    from highrank.train.plan import count

    cls: Any = registry.load("methods", name)
    words = example(name, fields)
    try:
        run = compose_run(words)
        model = empty_model(model_config(run.model, None))
        params = count(model, adapted_views(run, model), cls, run.method_cfg)
        where = f" with placement={run.core.placement}" if cls.family.placed else ""
        frozen = f", {params.frozen_extra:,} frozen beside it" if params.frozen_extra else ""
        trains = f"{params.trainable:,} ({params.percent:.4f} %){frozen}, on {run.model['name']}{where}"
    except UserError as error:
        trains = f"not on the default model: {error}"
    yield "trains", trains
    yield "learning rate", f"{cls.default_lr:g}, unless lr is given"
    yield "can be merged", "yes" if cls.mergeable else "no"
    yield "in PEFT", cls.peft.type if cls.peft else "no such type"
    yield "example", shlex.join(["highrank", "run", *words])
    if all(field.default is not None for field in fields):
        other = "lora" if name != "lora" else "hira"
        yield "beside another", f"highrank run -m method={name},{other} seed=0,1,2 lr_search=5"


def _task_facts(name: str, member: str, doc: str) -> Iterator[tuple[str, str]]:
    from highrank.base.fields import dataclass_from

    cls: Any = registry.load("tasks", name)
    task = cls(dataclass_from(cls.config, {"member": member} if member else {}, name), 0)
    yield "kind", KINDS[task.kind]
    yield "protocols treat it as", task.family
    yield "measured", ", ".join(task.metrics)
    yield "version", str(task.version)
    shown = re.search(rf"`(task={name}(?:/\w+)?(?: task\.[^`]+)?)`", " ".join(doc.split()))
    words = f"task={name}/{member}" if member else shown[1] if shown else f"task={name}"
    yield "example", f"highrank run {words}{MODELS[task.kind]}"


def _model_facts(name: str) -> Iterator[tuple[str, str]]:
    from highrank.config.words import compose_run
    from highrank.model.backbones import empty_model, model_config
    from highrank.model.placement import resolve
    from highrank.model.tiny import ENCODERS, IMAGE_ENCODERS

    run = compose_run([f"model={name}"])
    config = model_config(run.model, None)
    kind = "classify" if config.model_type in ENCODERS else "generate"
    kind = "classify_images" if config.model_type in IMAGE_ENCODERS else kind
    model = empty_model(config, kind)
    parts = Counter(view.part for view in resolve(model, "all"))
    yield "parameters", f"{sum(p.numel() for p in model.parameters()):,}"
    yield "placement=all", ", ".join(f"{part} × {number}" for part, number in parts.items())
    yield "example", f"highrank run model={name}{TASKS[kind]}"
