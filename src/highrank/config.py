"""From command-line words to one checked `RunConfig`. Hydra composes and parses; here bare keys find their owner.

    method=hira placement=fc_qkv r=16 task.n_train=640

A bare key is a core key (a field of `RunConfig`) or a field of the chosen method. Dotted keys reach the groups
`method`, `task`, `model`, `protocol` and `trainer`. Everything wrong is one `UserError`, before any weight loads.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from highrank import registry
from highrank.errors import UserError, suggest

GROUPS = ("method", "task", "model", "protocol", "trainer", "experiment")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adam", "sgd")


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """The core keys. One line each: meaning, unit."""

    defaults: list[Any] = dataclasses.field(
        default_factory=lambda: [
            "_self_",
            {"method": "hira"},
            {"task": "wordmath"},
            {"model": "smollm2_135m"},
            {"protocol": "clean"},
            {"trainer": "auto"},
            {"experiment": None},
        ]
    )
    method: Any = None
    """How a weight is adapted: a name, and that method's own fields."""
    task: Any = None
    """What is learned and how it is scored."""
    model: Any = None
    """The backbone: a name, `hf:<id>`, or any name together with `path`."""
    protocol: Any = None
    """Prompt, masking, cut-off, decoding and answer rule."""
    trainer: Any = None
    """Arguments of the Lightning Trainer: accelerator, devices, strategy, precision."""
    path: str | None = None
    """A local folder with config.json, tokenizer and safetensors, used before any other source."""
    placement: Any = "fc_qkv"
    """Which weights are adapted: a set such as fc_qkv, or a list such as [q,down]."""
    layers: Any = "all"
    """Which blocks are adapted: all, 4-11, or a list."""
    fused: str = "auto"
    """One adapter per fused matrix (fused), one per part (split), or fused where all its parts are placed (auto)."""
    architecture: Any = None
    """Paths of the parts in a model that is not built in: {blocks: model.layers, q: self_attn.q_proj, ...}."""
    seed: int = 0
    """Seeds data order, adapter start, new heads and dropout."""
    lr: float | None = None
    """Peak learning rate; default: the method's own starting point."""
    optimizer: str = "adamw"
    """adamw, adam or sgd."""
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    """Adam's decay rates."""
    weight_decay: float = 0.0
    """Decay of parameters whose neutral value is 0; others are never decayed."""
    schedule: str = "linear"
    """constant, linear or cosine, after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of all steps; used when warmup_steps is 0."""
    epochs: float = 1
    """Passes over the training set, unless max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 16
    """Examples per micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    max_grad_norm: float = 1.0
    """Clipping threshold of the global gradient norm; 0 turns clipping off."""
    eval_batch_size: int = 50
    """Examples per evaluation batch; changes speed, not results."""
    eval_before: bool = True
    """Whether the untrained model is evaluated too."""
    output: str = "outputs"
    """Folder under which run directories are made."""
    run_dir: str | None = None
    """Exact run directory; default: <output>/<date>/<name>-<hash>."""
    dry_run: bool = False
    """Load no weights; print what would be adapted and trained, and write plan.json."""


CORE_KEYS = tuple(f.name for f in dataclasses.fields(RunConfig) if f.name not in ("defaults", *GROUPS))
UNHASHED = ("output", "run_dir", "dry_run", "eval_batch_size")
"""Keys that do not change a run's results."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How examples become tokens and outputs become answers; a YAML in configs/protocol is one instance."""

    name: str
    version: int
    """Raised whenever the tokens, the decoding or the answer rule change."""
    template: str
    """Prompt with {instruction}; the target follows directly."""
    eos: bool = True
    """Whether targets end in the end-of-text token and train on it."""
    bos: bool = True
    """Whether the tokenizer's own special tokens open the prompt."""
    mask_prompt: bool = True
    """Whether the loss covers target tokens only."""
    max_length: int = 512
    """Most tokens of prompt and target; longer examples are left out of training and counted."""

    def __post_init__(self) -> None:
        if "{instruction}" not in self.template:
            raise UserError(f"protocol {self.name}: the template needs {{instruction}}, got template={self.template!r}")
        if self.max_length < 1:
            raise UserError(f"protocol {self.name}: max_length must be >= 1, got max_length={self.max_length}")

    @property
    def hash(self) -> str:
        return digest(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Run:
    """One checked run: the core keys, and the chosen plugins with their own configs built."""

    core: RunConfig
    method: Any
    """The Method class."""
    method_cfg: Any
    task: Any
    """The Task class."""
    task_cfg: Any
    protocol: Protocol
    model: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def resolved(self) -> dict[str, Any]:
        """Every value that the run uses, as primitives."""
        core = {key: getattr(self.core, key) for key in CORE_KEYS}
        return {
            "method": {"name": self.method.name, **dataclasses.asdict(self.method_cfg)},
            "task": {"name": self.task.name, **dataclasses.asdict(self.task_cfg)},
            "model": self.model,
            "protocol": dataclasses.asdict(self.protocol),
            "trainer": self.trainer,
            **core,
        }

    @property
    def hash(self) -> str:
        """sha256 over every key that can change the result."""
        return digest({k: v for k, v in self.resolved.items() if k not in UNHASHED})

    @property
    def name(self) -> str:
        placement = self.core.placement
        place = placement if isinstance(placement, str) else "+".join(placement)
        parts = [self.method.name, place]
        if hasattr(self.method_cfg, "r"):
            parts.append(f"r{self.method_cfg.r}")
        parts += [self.task.name.replace("/", "-"), self.model["name"].replace("/", "-"), f"s{self.core.seed}"]
        return "_".join(parts)


def digest(value: Any) -> str:
    """Returns the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def compose_run(words: Sequence[str]) -> Run:
    """Returns the checked run that command-line words describe.

    Raises:
        UserError: for an unknown key or name (with the nearest ones), a wrong type, or a value out of range.
    """
    register_configs()
    groups = [w for w in words if w.split("=")[0].lstrip("+~") in GROUPS]
    groups = [rewritten for w in groups for rewritten in _rewrite_group(w)]
    method = registry.load("methods", _compose(groups).method.name)
    return build(_compose(rewrite(words, [method])))


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
        bare = key.lstrip("+~")
        if "=" not in word:
            raise UserError(f"command line: give key=value, got {word}")
        if bare in GROUPS:
            out += _rewrite_group(word)
        elif bare.startswith("hydra.") or bare in CORE_KEYS:
            out.append(word)
        elif "." in bare and bare.split(".")[0] in GROUPS:
            out.append(f"++{bare}={value}")
        elif any(bare in (f.name for f in dataclasses.fields(m.config)) for m in methods):
            out.append(f"++method.{bare}={value}")
        else:
            raise UserError(_unknown_key(bare, methods))
    return out


def _unknown_key(key: str, methods: Sequence[Any]) -> str:
    fields = {m.name: [f.name for f in dataclasses.fields(m.config)] for m in methods}
    owned = "; ".join(
        f"{name} has no field {key!r}; it has: {', '.join(own) or 'none'}" for name, own in fields.items()
    )
    known = {*CORE_KEYS, *GROUPS, *(f for own in fields.values() for f in own)}
    near = suggest(key, known)
    return f"{owned}; and no core key is called {key!r}{near if 'mean' in near else '; core keys: highrank run --help'}"


def _rewrite_group(word: str) -> list[str]:
    key, _, value = word.partition("=")
    if key == "model" and value.startswith("hf:"):
        return ["model=hf", f"++model.name='{value.removeprefix('hf:').split('/')[-1]}'", f"++model.hub='{value[3:]}'"]
    return [word]


def _compose(overrides: Sequence[str]) -> Any:
    try:
        OverridesParser.create().parse_overrides(list(overrides))
        GlobalHydra.instance().clear()
        with initialize_config_module("highrank.configs", version_base="1.3"):
            for override in overrides:
                key, _, value = override.partition("=")
                if key in GROUPS:
                    _check_choice(key, value)
            return compose("highrank", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        first = str(cause).strip().splitlines()[0]
        raise UserError(f"config: {first}, got {' '.join(overrides)}") from error


def _check_choice(group: str, value: str) -> None:
    if group in ("method", "task"):
        known = set(registry.available(group + "s"))
        known |= {option for option in _options(group) if "/" in option}
    else:
        known = set(_options(group))
    if value not in known and value != "null":
        raise UserError(f"{group}: unknown name, got {group}={value}{suggest(value, known)}")


def _options(group: str) -> list[str]:
    """Returns every choice of a config group, nested ones as `folder/name`."""
    from hydra.core.object_type import ObjectType

    loader = GlobalHydra.instance().config_loader()
    names = list(loader.get_group_options(group, ObjectType.CONFIG))
    for folder in loader.get_group_options(group, ObjectType.GROUP):
        names += [f"{folder}/{name}" for name in loader.get_group_options(f"{group}/{folder}", ObjectType.CONFIG)]
    return sorted(set(names))


def register_configs() -> None:
    """Makes the core keys and the names of all plugins known to Hydra; imports no plugin."""
    from highrank.backbones import TINY

    store = ConfigStore.instance()
    store.store(name="highrank", node=RunConfig)
    for name in registry.available("methods"):
        store.store(group="method", name=name, node={"name": name})
    for name in registry.available("tasks"):
        store.store(group="task", name=name, node={"name": name})
    for name in TINY:
        store.store(group="model", name=f"tiny_{name}", node={"name": f"tiny_{name}", "dtype": "float32"})
    store.store(group="model", name="hf", node={"name": "hf", "hub": None, "dtype": "bfloat16"})


MODEL_KEYS = ("name", "hub", "revision", "wheel", "dtype", "shape", "shuffled")


def build(config: Any) -> Run:
    """Returns the checked run of a composed config.

    Raises:
        UserError: for an unknown field, a wrong type, or a value out of range.
    """
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)
    method, method_cfg = _plugin("methods", values["method"])
    task, task_cfg = _plugin("tasks", values["task"])
    model = {"revision": None, "shuffled": False, **values["model"]}
    unknown = [key for key in model if key not in MODEL_KEYS]
    if unknown:
        raise UserError(f"model: unknown key, got model.{unknown[0]}{suggest(unknown[0], MODEL_KEYS)}")
    from highrank.backbones import DTYPES

    if model["dtype"] not in DTYPES:
        raise UserError(f"model: dtype is one of {', '.join(DTYPES)}, got model.dtype={model['dtype']}")
    core = RunConfig(**{key: values[key] for key in CORE_KEYS})
    if core.lr is None:
        core.lr = method.default_lr
    _check_core(core)
    protocol = dataclass_from(Protocol, values["protocol"], "protocol")
    return Run(core, method, method_cfg, task, task_cfg, protocol, model, dict(values["trainer"]))


def _plugin(group: str, values: Mapping[str, Any]) -> tuple[Any, Any]:
    name = values["name"]
    cls: Any = registry.load(group, name)
    return cls, dataclass_from(cls.config, {k: v for k, v in values.items() if k != "name"}, name)


def dataclass_from(cls: type, values: Mapping[str, Any], owner: str) -> Any:
    """Returns an instance of a config dataclass from primitives, types checked and converted by OmegaConf.

    Raises:
        UserError: for a key that the dataclass lacks, or a value of another type.
    """
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)
    known = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{owner} has no field {key!r}; it has: {', '.join(known) or 'none'}{_mean(key, known)}")
        try:
            schema = OmegaConf.merge(schema, {key: value})
        except OmegaConfBaseException as error:
            field = next(f for f in dataclasses.fields(cls) if f.name == key)
            kind = getattr(field.type, "__name__", str(field.type))
            raise UserError(f"{owner}: {key} must be of type {kind}, got {key}={value}") from error
    return OmegaConf.to_object(schema)


def _mean(key: str, known: Sequence[str]) -> str:
    near = suggest(key, known)
    return near if "mean" in near else ""


def _check_core(core: RunConfig) -> None:
    def need(ok: bool, key: str, rule: str) -> None:
        if not ok:
            raise UserError(f"run: {key} {rule}, got {key}={getattr(core, key)}")

    assert core.lr is not None
    need(math.isfinite(core.lr) and core.lr > 0, "lr", "must be a positive number")
    need(core.schedule in SCHEDULES, "schedule", f"is one of {', '.join(SCHEDULES)}")
    need(core.optimizer in OPTIMIZERS, "optimizer", f"is one of {', '.join(OPTIMIZERS)}")
    need(core.fused in ("auto", "fused", "split"), "fused", "is auto, fused or split")
    need(len(core.betas) == 2 and all(0 <= b < 1 for b in core.betas), "betas", "are two numbers in [0, 1)")
    for key in ("batch_size", "accumulate", "eval_batch_size"):
        need(getattr(core, key) >= 1, key, "must be >= 1")
    for key in ("weight_decay", "warmup_steps", "max_grad_norm", "seed"):
        need(getattr(core, key) >= 0, key, "must be >= 0")
    need(0 <= core.warmup_ratio <= 1, "warmup_ratio", "must be in [0, 1]")
    need(core.epochs > 0, "epochs", "must be > 0")
    need(core.max_steps is None or core.max_steps >= 1, "max_steps", "must be >= 1")
    need(core.path is None or Path(core.path).is_dir(), "path", "must be an existing folder")
