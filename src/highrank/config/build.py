"""From a composed config to one checked run."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

from highrank.base import registry
from highrank.base.errors import UserError, suggest
from highrank.base.fields import dataclass_from
from highrank.base.files import shown
from highrank.base.hub import on_hub
from highrank.config.presets import preset_texts
from highrank.config.run_config import CORE_KEYS, LOGGERS, OPTIMIZERS, SCHEDULES, Run, RunConfig
from highrank.config.start import settle
from highrank.config.trainer_keys import check_trainer_keys
from highrank.data.protocol import Protocol
from highrank.model.backbones import DTYPES, fastest_dtype
from highrank.model.placement import PLACEMENTS, parse_placement

MODEL_KEYS = ("name", "hub", "revision", "wheel", "dtype", "attention", "shape", "shuffled", "quantize")
QUANTIZATIONS = ("int8", "int4", "nf4")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


def build(config: Any, trained: bool = False) -> Run:
    """Returns the checked run of a composed config, its paths absolute; whether their files exist is not looked at.

    A task that was `trained` on may miss what its config looks for, a file above all: it is taken as it was then.

    Raises:
        UserError: for an unknown field, a wrong type, or a value out of range.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    for group in ("method", "task", "model", "protocol", "trainer"):
        chosen = values.get(group)
        if not isinstance(chosen, Mapping):
            raise UserError(f"{group}: a name is needed, got {group}={chosen}; choose one with {group}=<name>")
        if group != "trainer" and not isinstance(chosen.get("name"), str):
            raise UserError(f"{group}: a name is a text, got {group}.name={chosen.get('name')}; use {group}=<name>")
    given: dict[str, str] = values.pop("given", None) or {}
    method, method_cfg = _plugin("methods", values["method"], given)
    values["task"].pop("version", None)  # in the config of a saved run
    task, task_cfg = _plugin("tasks", values["task"], given, trained)
    model = {"revision": None, "attention": None, "shuffled": False, **values["model"]}
    if model.get("quantize") is None:
        model.pop("quantize", None)
    trainer = dict(values["trainer"])
    check_trainer_keys(trainer)
    if model.get("dtype") == "auto":
        model["dtype"] = fastest_dtype(str(trainer.get("accelerator", "auto")))
    _check_model(model)
    if "quantize" in model and (not method.family.keeps_base or trainer.get("strategy") == "fsdp"):
        raise UserError(
            f"model: a quantised base stays as it is, on one device or under ddp, got model.quantize="
            f"{model['quantize']} with method={method.name} and trainer.strategy={trainer.get('strategy', 'auto')}"
        )
    if str(trainer.get("precision")) == "32":
        trainer["precision"] = "32-true"
    keys = _absolute(RunConfig, {key: values[key] for key in CORE_KEYS if key in values}, "", given)
    if not method.family.placed:  # such a run is the same whatever the placement
        keys |= {"placement": "all", "layers": "all", "fused": "auto"}
    keys["placement"] = _one_form(keys.get("placement", RunConfig.placement))
    if keys.get("lr") is None:
        keys["lr"] = method.default_lr
    core = RunConfig(**keys)
    _check_core(core)
    core = settle(core, method, method_cfg, given)
    if core.analyze and not method.family.changes_weights:
        raise UserError(
            f"run: analyze needs a method that changes weights, got analyze=true with method={method.name}; "
            "leave analyze out"
        )
    protocol = protocol_for(values["protocol"], task.family)
    _check_patience(core, protocol)
    run = Run(core, method, method_cfg, task, task_cfg, protocol, model, trainer, given=given)
    return _with_others(run, values["protocol"], trained)


def _with_others(run: Run, protocol: Mapping[str, Any], trained: bool) -> Run:
    """Returns the run with the tasks of `eval_also`, whose key then holds every value of theirs; of a protocol, which a task's
    family may have changed, only one that is not the run's own."""
    asked = run.core.eval_also
    if asked is None:
        return run
    if isinstance(asked, str):
        asked = [asked]
    if not isinstance(asked, Mapping):
        asked = dict.fromkeys(asked, None) if isinstance(asked, list) else {}
    if not asked or not all(isinstance(name, str) and isinstance(v, Mapping | None) for name, v in asked.items()):
        raise UserError(
            f"run: eval_also is a list of tasks, or a mapping of tasks to their fields, got eval_also={run.core.eval_also}; "
            "write eval_also=[gsm8k] or 'eval_also={gsm8k: {n_test: 40}}'"
        )
    others: dict[str, Run] = {}
    for name, given in asked.items():
        fields = {key: value for key, value in (given or {}).items() if key not in ("protocol", "version")}
        task, cfg = _plugin("tasks", {"name": name, **fields}, {}, trained)
        kept = (given or {}).get("protocol")
        rules = dataclass_from(Protocol, kept, "protocol") if kept else protocol_for(protocol, task.family)
        others[name] = dataclasses.replace(run, task=task, task_cfg=cfg, protocol=rules)
    also = {
        name: {
            "version": other.task.version,
            **dataclasses.asdict(other.task_cfg),
            **({} if other.protocol == run.protocol else {"protocol": dataclasses.asdict(other.protocol)}),
        }
        for name, other in others.items()
    }
    core = dataclasses.replace(run.core, eval_also=also)
    others = {name: dataclasses.replace(other, core=core) for name, other in others.items()}
    return dataclasses.replace(run, core=core, also=others)


def _check_patience(core: RunConfig, protocol: Protocol) -> None:
    if core.patience is not None and not protocol.num_validation:
        raise UserError(
            f"run: patience counts validations on held-out examples, got patience={core.patience} with "
            "protocol.num_validation=0; hold some out with protocol.num_validation=<n>"
        )
    if core.patience is None and core.min_delta:
        raise UserError(f"run: min_delta belongs to patience, got min_delta={core.min_delta} alone; add patience=<n>")


def check_files(core: RunConfig) -> None:
    """Raises UserError unless the files and folders that the core keys name exist."""
    for key, kind, exists in (("general_text", "file", os.path.isfile), ("path", "folder", os.path.isdir)):
        path = getattr(core, key)
        if path is not None and not exists(path):
            raise UserError(f"run: {key} must be an existing {kind}, got {key}={shown(path)}")


def _check_model(model: Mapping[str, Any]) -> None:
    def need(ok: bool, key: str, rule: str) -> None:
        if not ok:
            raise UserError(f"model: {key} {rule}, got model.{key}={model.get(key)}")

    unknown = [key for key in model if key not in MODEL_KEYS]
    if unknown:
        raise UserError(f"model: unknown key, got model.{unknown[0]}{suggest(unknown[0], MODEL_KEYS)}")
    dtype, attention, wheel = model.get("dtype"), model["attention"], model.get("wheel")
    need(isinstance(dtype, str) and dtype in DTYPES, "dtype", f"is one of auto, {', '.join(DTYPES)}")
    need(
        attention is None or (isinstance(attention, str) and attention in ATTENTIONS),
        "attention",
        f"is one of {', '.join(ATTENTIONS)}, or null",
    )
    for key in ("hub", "revision"):
        need(model.get(key) is None or isinstance(model[key], str), key, "must be a text or null")
    need(isinstance(model["shuffled"], bool), "shuffled", "must be true or false")
    need(model.get("quantize", "int8") in QUANTIZATIONS, "quantize", f"is one of {', '.join(QUANTIZATIONS)}, or null")
    need(model.get("shape") is None or isinstance(model["shape"], Mapping), "shape", "must be a mapping or null")
    keys = ("package", "version", "sha256")
    need(
        wheel is None
        or (
            isinstance(wheel, Mapping) and all(key in wheel for key in keys) and ("gguf" in wheel or "folder" in wheel)
        ),
        "wheel",
        f"must be a mapping with {', '.join(keys)} and gguf or folder, or null",
    )


def _one_form(placement: Any) -> Any:
    """Returns a placement's one spelling, so that [q,v] and qv are the same run: a named set, else its ordered parts.

    `all` stays by name only: it takes the parts there are, where a list asks for each of them.
    """

    parts = parse_placement(placement)
    if isinstance(placement, str):
        return placement
    return next((name for name, set_parts in PLACEMENTS.items() if set_parts == parts and name != "all"), list(parts))


def protocol_for(values: Mapping[str, Any], family: str) -> Protocol:
    """Returns a protocol as it treats tasks of one family.

    Raises:
        UserError: for an unknown key or family, a wrong type, a value out of range, or no prompt for the family.
    """

    families = values.get("families") or {}
    if not isinstance(families, Mapping) or not all(isinstance(keys, Mapping) for keys in families.values()):
        raise UserError(
            f"protocol {values['name']}: families is a mapping of a family to its keys, got families={families}; "
            "set a key with protocol.families.<family>.<key>=<value>"
        )
    known = {family, *_families()}
    for name in families:
        if name not in known:
            raise UserError(f"protocol {values['name']}: unknown family, got families.{name}{suggest(name, known)}")
    given = {key: value for key, value in values.items() if key != "families"}
    merged = {**families.get(family, {}), **given}
    if "name" in merged and "template" not in merged:
        raise UserError(
            f"protocol {merged['name']}: it has no prompt for tasks of the family {family}, got protocol={merged['name']}; "
            f"these have one: {', '.join(_with_prompt(family))}; or give protocol.template=<text with {{instruction}}>"
        )
    return dataclass_from(Protocol, merged, "protocol")


def _with_prompt(family: str) -> list[str]:
    """Returns the names of this package's protocols that have a prompt for tasks of a family."""
    presets = {name: yaml.safe_load(text) for name, text in preset_texts("protocol")}
    return [name for name, keys in presets.items() if "template" in {**keys, **keys["families"].get(family, {})}]


@functools.cache
def _families() -> frozenset[str]:
    """Returns the families of all tasks; one that cannot be imported is no matter of a run on another."""
    families = set()
    for name in registry.available("tasks"):
        with contextlib.suppress(UserError):
            task: Any = registry.load("tasks", name)
            families.add(task.family)
    return frozenset(families)


def _plugin(group: str, values: Mapping[str, Any], given: dict[str, str], trained: bool = False) -> tuple[Any, Any]:
    name = values["name"]
    cls: Any = registry.load(group, name)
    fields = {k: v for k, v in values.items() if k != "name"}
    fields = _absolute(cls.config, fields, f"{group.removesuffix('s')}.", given)
    return cls, dataclass_from(cls.config, fields, name, trained)


def _absolute(cls: type, values: Mapping[str, Any], prefix: str, given: dict[str, str]) -> dict[str, Any]:
    """Returns a config's values with relative paths made absolute, and notes in `given` how they were typed."""
    fields = dict(values)
    for field in dataclasses.fields(cls):
        path = fields.get(field.name)
        if not field.metadata.get("path") or not isinstance(path, str) or not path or on_hub(path):
            continue
        if not os.path.isabs(path):
            fields[field.name], given[f"{prefix}{field.name}"] = os.path.abspath(path), path
    return fields


def _check_core(core: RunConfig) -> None:
    def need(ok: bool, key: str, rule: str) -> None:
        if not ok:
            raise UserError(f"run: {key} {rule}, got {key}={getattr(core, key)}")

    for key in ("lr", "head_lr"):
        rate = getattr(core, key)
        need(rate is None or (math.isfinite(rate) and rate > 0), key, "must be a positive number")
    need(core.schedule in SCHEDULES, "schedule", f"is one of {', '.join(SCHEDULES)}")
    need(core.optimizer in OPTIMIZERS, "optimizer", f"is one of {', '.join(OPTIMIZERS)}")
    need(core.fused in ("auto", "fused", "split"), "fused", "is auto, fused or split")
    need(len(core.betas) == 2 and all(0 <= b < 1 for b in core.betas), "betas", "are two numbers in [0, 1)")
    need(core.logger in LOGGERS, "logger", f"is one of {', '.join(LOGGERS)}")
    need(core.resume in ("auto", "never"), "resume", "is auto or never")
    for key in ("batch_size", "accumulate", "eval_batch_size", "checkpoint_every"):
        need(getattr(core, key) >= 1, key, "must be >= 1")
    need(core.patience is None or core.patience >= 1, "patience", "must be >= 1, or null")
    for key in ("weight_decay", "max_grad_norm", "min_delta"):
        need(math.isfinite(getattr(core, key)) and getattr(core, key) >= 0, key, "must be a finite number >= 0")
    need(core.warmup_steps >= 0, "warmup_steps", "must be >= 0")
    need(0 <= core.seed < 2**32, "seed", f"must be in [0, {2**32 - 1}]")
    need(0 <= core.warmup_ratio <= 1, "warmup_ratio", "must be in [0, 1]")
    need(math.isfinite(core.epochs) and core.epochs > 0, "epochs", "must be > 0 and finite")
    need(core.max_steps is None or core.max_steps >= 1, "max_steps", "must be >= 1")
