"""Reads a finished run back from its folder: its config, the words that make it, its model."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from highrank.base.console import say
from highrank.base.errors import UserError, described, refused_by_disk, suggest
from highrank.base.files import shown
from highrank.base.hub import fetched
from highrank.base.saved import instead, read_config, read_results
from highrank.config.build import build
from highrank.config.run_config import CORE_KEYS, UNHASHED, Run, as_given, config_hash
from highrank.config.start import content
from highrank.config.words import compose_trained, register_configs, spelled
from highrank.data.task import Task
from highrank.model.adapters import Adapters
from highrank.model.backbones import DTYPES, Backbone
from highrank.train.build import build_model, load_plain
from highrank.train.results import changed, model_files

GIVEN_ANEW = (
    "task",
    "protocol",
    "trainer",
    "path",
    "model.dtype",
    "model.attention",
    "model.quantize",
    "eval_batch_size",
    "start_from",
)
"""What may be given anew for a trained adapter; everything else is what it was trained with."""

MOST_LOST = 0.1
"""Share of a merged update that rounding may take before it is said."""


def read_run(folder: Path | str, words: Sequence[str] = ()) -> Run:
    """Returns the checked run whose directory this is, with the keys in `words` given anew.

    Raises:
        UserError: if the folder holds no config, or no saved adapter; or for a word that would change the adapter.
    """
    folder = Path(folder)
    if not (folder / "results.json").is_file():
        raise UserError(f"run: a run directory holds config.yaml, got {folder}, {instead(folder)}")
    for needed in ("config.yaml", "adapter/adapter.json"):
        if not (folder / needed).is_file():
            raise UserError(f"run: a run directory holds {needed}, got {folder}; has the run finished training?")
    results = read_results(folder, needed=("model",))
    over = results["status"] == "done" or results.get("stopped")
    if not over and results.get("steps", 0) < results.get("steps_planned", 0):
        raise UserError(
            f"run: an adapter is used when its training is over, got status={results['status']} at step "
            f"{results.get('steps', 0)} of {results['steps_planned']} in {folder}; give the run's command again: it goes on"
        )
    register_configs()
    values = read_config(folder)
    try:
        stated = config_hash(values)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"run: config.yaml is damaged, got {described(error)} in {folder}") from error
    if stated != results["config_hash"]:
        raise UserError(
            f"run: config.yaml must be the one trained with, got hash {stated[:12]}… instead of "
            f"{results['config_hash'][:12]}… in {folder}; bring it back, or train again under another run_dir"
        )
    run = build(OmegaConf.create(values), trained=True)
    return _with(run, words) if words else run


def _with(run: Run, words: Sequence[str]) -> Run:
    keys = [word.partition("=")[0] for word in words]
    for key, word in zip(keys, words, strict=True):
        if key not in GIVEN_ANEW and not key.startswith(("task.", "protocol.", "trainer.")):
            raise UserError(
                f"run: a saved adapter is used as it was trained, got {word}{suggest(key, GIVEN_ANEW)}; only these can be "
                f"given anew: {', '.join(GIVEN_ANEW)}"
            )
    kept = [word for word in words_of(run) if not any(_replaces(key, word.partition("=")[0]) for key in keys)]
    return compose_trained([*kept, *words], same_task=not any(key.split(".")[0] == "task" for key in keys))


def _replaces(key: str, old: str) -> bool:
    return old == key or old.startswith(f"{key}.")


def words_of(run: Run, typed: bool = False) -> list[str]:
    """Returns the command-line words that make this run: the chosen names, then every value that is not their default;
    paths absolute, or as they were `typed`."""
    resolved, words = as_given(run.resolved) if typed else run.resolved, _choices(run)
    words += [f"{key}={spelled(value)}" for key, value in _given(run.method.config, resolved["method"]).items()]
    fields = _given(run.task.config, resolved["task"])
    words += [f"task.{key}={spelled(value)}" for key, value in fields.items() if key != "member" or not value]
    usual = _usual(tuple(words))
    for group in ("model", "protocol", "trainer"):
        words += [
            f"{group}.{key}={spelled(value)}"
            for key, value in resolved[group].items()
            if key not in usual[group] or value != usual[group][key]
        ]
    words += [
        f"{key}={spelled(resolved[key])}" for key in CORE_KEYS if key not in UNHASHED and resolved[key] != usual[key]
    ]
    return words


def _given(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plugin's fields whose value is not their default; one without a default has always been given."""
    fields = dataclasses.fields(config)
    made = {field.name: field.default_factory() for field in fields if field.default_factory is not dataclasses.MISSING}
    return {f.name: values[f.name] for f in fields if values[f.name] != made.get(f.name, f.default)}


@functools.cache
def _usual(chosen: tuple[str, ...]) -> dict[str, Any]:
    return compose_trained(chosen, same_task=True).resolved


def _choices(run: Run) -> list[str]:
    member, name, hub = getattr(run.task_cfg, "member", None), run.model["name"], run.model.get("hub") or ""
    return [
        f"method={run.method.name}",
        f"task={run.task.name}" + (f"/{member}" if member else ""),
        f"model=hf:{hub}" if hub.split("/")[-1] == name else f"model={name}",
        f"protocol={run.protocol.name}",
    ]


def source_of(run: Run) -> tuple[Path, Run]:
    """Returns the directory and the run that a run started from.

    Raises:
        UserError: if it is not there or has not finished; if it is not what it was.
    """
    folder = fetched("start_from", str(run.core.start_from))
    try:
        source = read_run(folder)
    except UserError as error:
        raise UserError(f"start_from: {str(error).removeprefix('run: ')}") from error
    if (held := content(folder)) != run.core.start_hash:
        raise UserError(
            f"start_from: the run must be the one started from, got {str(held)[:12]}… instead of "
            f"{str(run.core.start_hash)[:12]}… in {folder}; bring it back, or give its place with start_from=<folder>"
        )
    return folder, source


def load_base(run: Run, task: Task) -> Backbone:
    """Returns the backbone that a run adapts: the plain one or, with start_as=merged, the one with the merged weights of the
    run that it started from, in this run's dtype."""
    if run.core.start_as != "merged":
        return load_plain(run, task)
    folder, source = source_of(run)
    source = dataclasses.replace(source, model=run.model, core=dataclasses.replace(source.core, path=run.core.path))
    backbone, adapters = build_model(source, task, load_base(source, task))
    check_base(folder, backbone)
    adapters.load(folder / "adapter")
    backbone.model.float()
    dtype = DTYPES[run.model["dtype"]]
    lost = update_lost(adapters.merging(), dtype)
    if lost > MOST_LOST:
        say(
            f"warning: {run.model['dtype']} rounds away {lost:.0%} of the update merged from {shown(folder)}; "
            "model.dtype=float32 keeps it"
        )
    merged = adapters.unload().to(dtype).eval()
    weights = dataclasses.replace(backbone.source, sha=f"{backbone.source.sha}+{run.core.start_hash}")
    return Backbone(merged, backbone.tokenizer, weights, lost)


@torch.no_grad()
def update_lost(merging: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> float:
    """Returns, of pairs W and W', the share of Σ |ΔW| in entries whose W' rounds to what W rounds to in `dtype`."""
    kept = total = 0.0
    for W, merged in merging:
        update = (merged - W).abs().double()
        survives = merged.to(dtype) != W.to(dtype)
        kept, total = kept + float(update[survives].sum()), total + float(update.sum())
    return 1 - kept / total if total else 0.0


def begin(run: Run, task: Task, base: Backbone | None = None) -> tuple[Backbone, Adapters]:
    """Returns a run's backbone, loaded unless it is given as `base`, and its adapters as training begins with them: with
    start_as=adapter, those of another run."""
    backbone, adapters = build_model(run, task, base or load_base(run, task))
    if run.core.start_as == "adapter":
        folder, _ = source_of(run)
        check_base(folder, backbone)
        adapters.load(folder / "adapter")
    return backbone, adapters


def load_run(folder: Path | str, words: Sequence[str] = ()) -> tuple[Run, Backbone, Adapters]:
    """Returns the run, its backbone and its adapters with their trained values."""
    run = read_run(folder, words)
    task = run.make_task()
    backbone, adapters = build_model(run, task, load_base(run, task))
    check_base(folder, backbone)
    adapters.load(Path(folder) / "adapter")
    return run, backbone, adapters


def check_base(folder: Path | str, backbone: Backbone) -> None:
    """Raises UserError unless the backbone is the one that the run was trained on."""
    recorded = read_results(Path(folder))["model"]
    new, old = model_files({"name": recorded["name"], **vars(backbone.source)}, recorded)
    if new != old:
        raise UserError(
            f"run: the base must be the one trained on, got {changed(new, old)} in {backbone.source.location} for "
            f"{folder}; give the right folder with path=<folder>"
        )


def check_plain(part: str, run: Run, folder: Path | str) -> None:
    """Raises UserError for a run on another run's merged weights: what is written apart from its base needs one with a name."""
    if run.core.start_as == "merged":
        raise UserError(
            f"{part}: an adapter's base must be a model with a name, got a run on another run's merged weights "
            f"(start_as=merged) in {folder}; `highrank merge RUN --out DIR` writes the adapted model instead"
        )


def check_new(part: str, out: Path | str) -> Path:
    """Returns the output folder of a command.

    Raises:
        UserError: if it exists and is not empty, or nothing can be written where it would be.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{part}: the output folder must be new or empty, got --out {out}; choose another")
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    with _writing(part, out), tempfile.TemporaryDirectory(dir=existing):
        return out


@contextmanager
def _writing(part: str, out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not refused_by_disk(error):
            raise
        raise UserError(
            f"{part}: the output folder must be writable, got --out {out} ({type(error).__name__}: {error}); make room, "
            "or choose another"
        ) from error


@contextmanager
def written_whole(part: str, out: Path) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `out` in one rename if nothing goes wrong inside.

    Raises:
        UserError: if the disk refuses.
    """
    with _writing(part, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            ready = Path(scratch) / "ready"
            ready.mkdir()
            yield ready
            os.replace(ready, out)
