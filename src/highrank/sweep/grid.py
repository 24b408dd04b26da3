"""From the words of a sweep to its cells: `method=hira,lora r=8,16 seed=0,1,2`, in Hydra's grammar.

    key=a,b            an axis: every value with every value of the other axes
    cases=[{r1:2,r2:30},{r1:4,r2:28}]     keys that vary together
    experiment=<name>  a preset, whose section `sweep` gives the axes that the command line does not

A key that one method of the sweep has and another lacks is left out for the other: hyperadapt with r=8 and with r=16 is
one cell. A cell's words are what `run.py` takes.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Glob
from omegaconf import OmegaConf

from highrank import configs
from highrank.base import registry
from highrank.base.errors import UserError
from highrank.config.run_config import CORE_KEYS, GROUPS, Run
from highrank.config.words import compose_run, key_of, method_of, parse, readable, spelled


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    words: tuple[str, ...]
    """What `run.py` takes."""
    axes: dict[str, Any]
    """The value of each swept key that this run has."""
    run: Run

    @property
    def folder(self) -> str:
        return f"{self.run.name}_{self.run.hash[:8]}"

    @property
    def arm(self) -> dict[str, Any]:
        """The axes without the seed: what is compared."""
        return {key: value for key, value in self.axes.items() if key != "seed"}

    @property
    def settled_words(self) -> tuple[str, ...]:
        """The words with the dtype that this machine chose: the cell may run on one that would choose another."""
        kept = [word for word in self.words if key_of(word) != "model.dtype"]
        return (*kept, f"model.dtype={self.run.model['dtype']}")

    def with_words(self, *words: str) -> "Cell":
        """Returns the cell with some keys given anew."""
        keys = {key_of(word) for word in words}
        kept = [word for word in self.words if key_of(word) not in keys]
        return Cell((*kept, *words), self.axes, compose_run([*kept, *words]))


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a sweep's words say."""

    axes: dict[str, list[Any]]
    """Every swept key with its values, in the words' order."""
    cells: list[Cell]


def expand(words: Sequence[str]) -> Grid:
    """Returns the grid of a sweep's words: every cell checked, and cells that mean the same run once.

    Raises:
        UserError: naming every cell that cannot be, or if nothing is swept.
    """
    fixed, axes = _split(words)
    given = {key_of(word) for word in fixed}.union(*(choice for choices in axes.values() for choice in choices))
    preset = _preset_axes(fixed)
    for key, choices in preset.items():
        kept = [{name: value for name, value in choice.items() if name not in given} for choice in choices]
        if any(kept):
            axes.setdefault(key, kept)
    axes = dict(sorted(axes.items(), key=lambda axis: axis[0] != "method"))  # a method's own keys come after it
    combinations = [_merged(choice) for choice in itertools.product(*axes.values())]
    planned = [([*fixed, *_words(values)], values) for values in combinations]
    methods = {method_of(words) for words, _ in planned}
    methods |= {registry.load("methods", name) for name in _by_key(preset).get("method", [])}
    cells: dict[str, Cell] = {}
    problems: list[tuple[Mapping[str, Any], UserError]] = []
    for all_words, chosen in planned:
        cell_words = [word for word in all_words if not _foreign(key_of(word), method_of(all_words), methods)]
        left = {key_of(word) for word in cell_words}
        try:
            cell = Cell(tuple(cell_words), {k: v for k, v in chosen.items() if k in left}, compose_run(cell_words))
            cells.setdefault(cell.run.hash, cell)
        except UserError as error:
            problems.append((chosen, error))
    refuse(problems)
    return Grid(_by_key(axes), list(cells.values()))


def refuse(problems: Sequence[tuple[Mapping[str, Any], UserError]]) -> None:
    """Raises one UserError over all cells that cannot be, each problem once; does nothing if there is none."""
    first = {str(error): " ".join(_words(axes)) for axes, error in reversed(problems)}
    if first:
        listed = "\n".join(f"  {where or 'every cell'}: {error}" for error, where in reversed(first.items()))
        raise UserError(
            f"sweep: every cell must be a possible run, got {len(first)} problems; nothing was started\n{listed}"
        )


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, list[dict[str, Any]]]]:
    """Returns the words with one value, and per axis its choices, each a mapping of keys to values."""
    fixed: list[str] = []
    axes: dict[str, list[dict[str, Any]]] = {}
    for word in words:
        if "=" not in word:
            raise UserError(f"command line: give key=value, got {word}")
    for word in readable(words, multirun=True):
        key, override = key_of(word), parse(word)
        if key == "cases":
            axes["cases"] = _cases(override.value())
            continue
        if not override.is_sweep_override():
            fixed.append(word)
        elif not override.is_discrete_sweep() or isinstance(override.value(), Glob):
            raise UserError(f"sweep: an axis has listed values, got {word}; write {key}=a,b,c or {key}=range(a,b)")
        else:
            axes[key] = [{key: parse(f"{key}={value}").value()} for value in override.sweep_string_iterator()]
    return fixed, axes


def typed(text: str) -> Any:
    """Returns what YAML text spells, as OmegaConf reads it: 1e-3 is a number, which YAML 1.1 takes for a text."""
    values: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
    return values["value"]


def preset_of(words: Sequence[str]) -> str | None:
    """Returns the chosen preset's name."""
    names = [word.partition("=")[2] for word in words if key_of(word) == "experiment"]
    return names[-1] if names else None


def _preset_axes(fixed: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Returns the axes in the section `sweep` of the chosen preset."""
    preset = preset_of(fixed)
    file = Path(configs.__path__[0]) / "experiment" / f"{preset}.yaml" if preset else None
    if file is None or not file.is_file():
        return {}
    values: Any = OmegaConf.to_container(OmegaConf.load(file))
    section = values.get("sweep") or {}
    return {
        key: _cases(choices) if key == "cases" else [{key: choice} for choice in choices]
        for key, choices in section.items()
    }


def _cases(values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not values or not all(isinstance(case, Mapping) for case in values):
        raise UserError(
            f"sweep: cases is a list of mappings, got cases={values}; write cases=[{{r1:2,r2:30}},{{r1:4,r2:28}}]"
        )
    return [{str(key): value for key, value in case.items()} for case in values]


def _merged(choice: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for values in choice for key, value in values.items()}


def _by_key(axes: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    for choices in axes.values():
        for choice in choices:
            for key, value in choice.items():
                if value not in values.setdefault(key, []):
                    values[key].append(value)
    return values


def _words(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value if key in GROUPS else spelled(value)}" for key, value in values.items()]


def _foreign(key: str, method: Any, methods: Iterable[Any]) -> bool:
    """Whether a key is a field of another method of the sweep, or within one, and not of this one."""
    first = key.removeprefix("method.").split(".")[0]

    def has(owner: Any) -> bool:
        return any(field.name == first for field in dataclasses.fields(owner.config))

    return first not in CORE_KEYS and first not in GROUPS and not has(method) and any(map(has, methods))
