"""From command-line words to one checked `RunConfig`. Hydra composes and parses; here bare keys find their owner.

    method=hira placement=fc_qkv r=16 task.n_train=640

A bare key is a core key (a field of `RunConfig`) or a field of the chosen method. Dotted keys reach the groups
`method`, `task`, `model`, `protocol` and `trainer`. Everything wrong is one `UserError`, before any weight loads.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from highrank import registry
from highrank.errors import UserError, suggest
from highrank.protocol import Protocol, digest

HYDRA_1_3 = hydra.__version__.startswith("1.3.")
VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if HYDRA_1_3 else {}
"""Hydra 1.3 asks whose defaults are meant; 1.4 has one set."""
STORE_AGAIN: dict[str, Any] = {} if HYDRA_1_3 else {"replace": True}
"""Hydra 1.4 asks whether a config may be stored again under its name."""
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
    # only in presets: the axes that `-m` sweeps, {key: [values]}, and `cases` of keys that vary together
    sweep: Any = None
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
    head_lr: float | None = None
    """Peak learning rate of a new head on an encoder, where it shall not be the adapter's; default: lr."""
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
    warmup_ratio: float = 0.06
    """Warm-up as a share of all steps; used when warmup_steps is 0."""
    epochs: float = 1
    """Passes over the training set, unless max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 8
    """Examples per micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    max_grad_norm: float = 1.0
    """Clipping threshold of the global gradient norm; 0 turns clipping off."""
    compile: bool = False
    """Whether the training step runs the model through torch.compile."""
    checkpoint_activations: bool = False
    """Whether blocks are computed again in backward instead of keeping their activations."""
    auto_microbatch: bool = False
    """Whether a batch that does not fit into memory is computed in halves, quarters, ...: the same steps, slower."""
    eval_batch_size: int = 50
    """Examples per evaluation batch; changes speed, not results."""
    eval_before: bool = True
    """Whether the untrained model is evaluated too."""
    eval_test: bool = True
    """Whether the test sets are evaluated at all; a search over the held-out examples needs none."""
    general_text: str | None = None
    """File of general text (.txt by lines, or a field `text`) on which forgetting is measured after training."""
    analyze: bool = False
    """Whether the singular values of ΔW are analysed after training (see highrank analyze)."""
    output: str = "outputs"
    """Folder under which run directories are made."""
    run_dir: str | None = None
    """Exact run directory; default: <output>/<date>/<name>-<hash>."""
    resume: str = "auto"
    """auto: an unfinished run goes on where it stopped; never: it starts afresh."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints; one is also written every ten minutes, at a signal and at the end."""
    dry_run: bool = False
    """Load no weights; print what would be adapted and trained, and write plan.json."""


CORE_KEYS = tuple(f.name for f in dataclasses.fields(RunConfig) if f.name not in ("defaults", "sweep", *GROUPS))
UNHASHED = (
    *("output", "run_dir", "resume", "checkpoint_every", "dry_run"),
    *("eval_batch_size", "auto_microbatch", "analyze"),
)
"""Keys that do not change a run's results."""


LATER: dict[str, Any] = {"head_lr": None}
"""Keys younger than the first runs, and what their absence from a saved config means."""


def config_hash(values: Mapping[str, Any]) -> str:
    """Returns the sha256 over every key of a resolved config that can change the result; a younger one where given."""
    return digest({key: value for key, value in values.items() if key not in UNHASHED and value != LATER.get(key, ...)})


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
            "task": {"name": self.task.name, "version": self.task.version, **dataclasses.asdict(self.task_cfg)},
            "model": self.model,
            "protocol": dataclasses.asdict(self.protocol),
            "trainer": self.trainer,
            **core,
        }

    @property
    def hash(self) -> str:
        return config_hash(self.resolved)

    @property
    def name(self) -> str:
        placement = self.core.placement
        place = placement if isinstance(placement, str) else "+".join(placement)
        member = getattr(self.task_cfg, "member", None)
        parts = [self.method.name, place] if self.method.site == "weight" else [self.method.name]
        if hasattr(self.method_cfg, "r"):
            parts.append(f"r{self.method_cfg.r}")
        parts += [
            "-".join([self.task.name, *([member] if member else [])]),
            self.model["name"].replace("/", "-"),
            f"s{self.core.seed}",
        ]
        return "_".join(parts)


def compose_run(words: Sequence[str]) -> Run:
    """Returns the checked run that command-line words describe.

    Raises:
        UserError: for an unknown key or name (with the nearest ones), a wrong type, or a value out of range.
    """
    words = scaled(words)
    method = method_of(words)
    overrides = rewrite(words, [method])
    config = _compose(overrides)
    if any(key_of(word) == "method" for word in words):  # in a preset's place: its fields stay where this one has them
        given = [key_of(word).removeprefix("method.") for word in overrides]
        known = ["name", *given, *(field.name for field in dataclasses.fields(method.config))]
        config.method = {key: value for key, value in config.method.items() if key in known}
    return build(config)


def key_of(word: str) -> str:
    """Returns the key of a command-line word."""
    return word.partition("=")[0].lstrip("+")


NOT_TEXTS = ("null", "true", "false", "nan", "inf")
"""What Hydra reads as something else than a text."""


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
    if isinstance(value, str) and (value.lower() in NOT_TEXTS or not re.fullmatch(r"[a-zA-Z_/][\w/.+-]*", value)):
        return "'" + re.sub(r"(\\+)('|$)", r"\1\1\2", value).replace("'", "\\'") + "'"
    return str(value)


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
    groups = [w for w in words if w.split("=")[0].lstrip("+") in GROUPS]
    return registry.load("methods", _chosen_method(tuple(r for w in groups for r in _rewrite_group(w))))


@functools.cache
def _chosen_method(groups: tuple[str, ...]) -> str:
    register_configs()
    return str(_compose(groups).method.name)


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
    key, _, value = word.lstrip("+").partition("=")
    if (key, value) == ("experiment", "null"):  # the default, which Hydra takes from no override
        return []
    if key == "task" and "/" in value:
        name, _, member = value.partition("/")
        return [f"task={name}", f"++task.member={member}"]
    if key == "model" and value.startswith("hf:"):
        return ["model=hf", f"++model.name='{value.removeprefix('hf:').split('/')[-1]}'", f"++model.hub='{value[3:]}'"]
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
    except (HydraException, OmegaConfBaseException) as error:
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

    store = functools.partial(ConfigStore.instance().store, **STORE_AGAIN)
    store(name="highrank", node=RunConfig)
    for name in registry.available("methods"):
        store(group="method", name=name, node={"name": name})
    for name in registry.available("tasks"):
        store(group="task", name=name, node={"name": name})
    for name in TINY:
        store(group="model", name=f"tiny_{name}", node={"name": f"tiny_{name}", "dtype": "float32"})
    store(group="model", name="hf", node={"name": "hf", "hub": None, "dtype": "bfloat16"})


MODEL_KEYS = ("name", "hub", "revision", "wheel", "dtype", "attention", "shape", "shuffled", "quantize")
QUANTIZATIONS = ("int8", "int4", "nf4")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


def build(config: Any) -> Run:
    """Returns the checked run of a composed config.

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
    method, method_cfg = _plugin("methods", values["method"])
    values["task"].pop("version", None)  # in the config of a saved run
    task, task_cfg = _plugin("tasks", values["task"])
    model = {"revision": None, "attention": None, "shuffled": False, **values["model"]}
    if model.get("quantize") is None:
        model.pop("quantize", None)
    _check_model(model)
    trainer = dict(values["trainer"])
    _check_trainer(trainer)
    if "quantize" in model and (method.replaces_base or trainer.get("strategy") == "fsdp"):
        raise UserError(
            f"model: a quantised base stays as it is, on one device or under ddp, got model.quantize="
            f"{model['quantize']} with method={method.name} and trainer.strategy={trainer.get('strategy', 'auto')}"
        )
    if str(trainer.get("precision")) == "32":
        trainer["precision"] = "32-true"
    core = RunConfig(**{key: values[key] for key in CORE_KEYS if key in values})
    if method.site != "weight" or method.replaces_base:  # such a run is the same whatever the placement
        core.placement, core.layers, core.fused = "all", "all", "auto"
    core.placement = _one_form(core.placement)
    if core.lr is None:
        core.lr = method.default_lr
    _check_core(core)
    if core.analyze and method.site != "weight":
        raise UserError(
            f"run: analyze needs a method that changes weights, got analyze=true with method={method.name}; "
            "leave analyze out"
        )
    protocol = protocol_for(values["protocol"], task.family)
    return Run(core, method, method_cfg, task, task_cfg, protocol, model, trainer)


def _check_model(model: Mapping[str, Any]) -> None:
    from highrank.backbones import DTYPES

    def need(ok: bool, key: str, rule: str) -> None:
        if not ok:
            raise UserError(f"model: {key} {rule}, got model.{key}={model.get(key)}")

    unknown = [key for key in model if key not in MODEL_KEYS]
    if unknown:
        raise UserError(f"model: unknown key, got model.{unknown[0]}{suggest(unknown[0], MODEL_KEYS)}")
    dtype, attention, wheel = model.get("dtype"), model["attention"], model.get("wheel")
    need(isinstance(dtype, str) and dtype in DTYPES, "dtype", f"is one of {', '.join(DTYPES)}")
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
    from highrank.placement import PLACEMENTS, parse_placement

    parts = parse_placement(placement)
    if isinstance(placement, str):
        return placement
    return next((name for name, own in PLACEMENTS.items() if own == parts and name != "all"), list(parts))


def protocol_for(values: Mapping[str, Any], family: str) -> Protocol:
    """Returns a protocol as it treats tasks of one family.

    Raises:
        UserError: for an unknown key or family, a wrong type, or a value out of range.
    """
    from highrank.task import FAMILIES

    families = values.get("families") or {}
    if not isinstance(families, Mapping) or not all(isinstance(own, Mapping) for own in families.values()):
        raise UserError(
            f"protocol {values['name']}: families is a mapping of a family to its keys, got families={families}; "
            "set a key with protocol.families.<family>.<key>=<value>"
        )
    for name in families:
        if name not in FAMILIES:
            raise UserError(f"protocol {values['name']}: unknown family, got families.{name}{suggest(name, FAMILIES)}")
    given = {key: value for key, value in values.items() if key != "families"}
    return dataclass_from(Protocol, {**families.get(family, {}), **given}, "protocol")


def _plugin(group: str, values: Mapping[str, Any]) -> tuple[Any, Any]:
    name = values["name"]
    cls: Any = registry.load(group, name)
    return cls, dataclass_from(cls.config, {k: v for k, v in values.items() if k != "name"}, name)


def dataclass_from(cls: type, values: Mapping[str, Any], owner: str) -> Any:
    """Returns an instance of a config dataclass from primitives, types checked and converted by OmegaConf.

    Raises:
        UserError: for a key that the dataclass lacks, a value of another type, or a number that is not finite.
    """
    schema: Any = OmegaConf.structured(cls)
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
        if isinstance(schema[key], float) and not math.isfinite(schema[key]):
            raise UserError(f"{owner}: {key} must be a finite number, got {key}={value}")
    return OmegaConf.to_object(schema)


def _mean(key: str, known: Sequence[str]) -> str:
    near = suggest(key, known)
    return near if "mean" in near else ""


OWN_TRAINER_KEYS = {
    "max_steps": "use max_steps",
    "max_epochs": "use epochs",
    "accumulate_grad_batches": "use accumulate",
    "gradient_clip_val": "use max_grad_norm",
    "logger": "events are written to the run directory; use output",
    "callbacks": "a run's callbacks come from its protocol; use protocol.selection",
    "enable_checkpointing": "a run keeps its last checkpoint in the run directory; use output",
    "log_every_n_steps": "every step is logged, so leave it out",
    "enable_model_summary": "use dry_run=true to see what would be trained",
    "num_sanity_val_steps": "the untrained model is evaluated with eval_before=true",
    "enable_progress_bar": "the bars are a callback of the run and go quiet without a terminal, so leave it out",
    "fast_dev_run": "use max_steps=1 and a small task.n_train",
    "limit_predict_batches": "every test example is scored, so leave it out; where a task has n_test, use task.n_test",
    "barebones": "a run records its steps and times, so leave it out",
    "val_check_interval": "use protocol.validate_every",
    "check_val_every_n_epoch": "use protocol.validate_every",
    "inference_mode": "adapters see base weights as they are in evaluation, so leave it out",
    "use_distributed_sampler": "batches are drawn by the run's own seeded sampler, so leave it out",
}
"""Arguments of the Lightning Trainer that the run itself decides, with what to use instead."""


TRAINER_KEYS = [
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "min_epochs",
    "min_steps",
    "max_time",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
    "gradient_clip_algorithm",
    "deterministic",
    "benchmark",
    "profiler",
    "detect_anomaly",
    "plugins",
    "sync_batchnorm",
    "reload_dataloaders_every_n_epochs",
    "default_root_dir",
    "enable_autolog_hparams",
    "model_registry",
]
"""The other arguments of lightning.Trainer, by name, because importing Lightning takes seconds; a test compares them."""


PRECISIONS = ("32-true", "32", "16-mixed", "bf16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp")
"""fsdp is FSDP2, through Lightning's ModelParallelStrategy."""


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    for key, value in trainer.items():
        if key in OWN_TRAINER_KEYS:
            raise UserError(f"trainer: {key} is set by the run, got trainer.{key}={value}; {OWN_TRAINER_KEYS[key]}")
        if key not in TRAINER_KEYS:
            raise UserError(f"trainer: unknown key, got trainer.{key}{suggest(key, TRAINER_KEYS)}")
    strategy = trainer.get("strategy", "auto")
    if strategy not in STRATEGIES:
        raise UserError(f"trainer: strategy is one of {', '.join(STRATEGIES)}, got trainer.strategy={strategy}")
    precision = str(trainer.get("precision", "32-true"))
    if precision not in PRECISIONS:
        fix = "; use model.dtype for the type of the weights" if precision.endswith("-true") else ""
        raise UserError(f"trainer: precision is one of {', '.join(PRECISIONS)}, got trainer.precision={precision}{fix}")


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
    need(core.resume in ("auto", "never"), "resume", "is auto or never")
    for key in ("batch_size", "accumulate", "eval_batch_size", "checkpoint_every"):
        need(getattr(core, key) >= 1, key, "must be >= 1")
    for key in ("weight_decay", "max_grad_norm"):
        need(math.isfinite(getattr(core, key)) and getattr(core, key) >= 0, key, "must be a finite number >= 0")
    need(core.warmup_steps >= 0, "warmup_steps", "must be >= 0")
    need(0 <= core.seed < 2**32, "seed", f"must be in [0, {2**32 - 1}]")
    need(0 <= core.warmup_ratio <= 1, "warmup_ratio", "must be in [0, 1]")
    need(math.isfinite(core.epochs) and core.epochs > 0, "epochs", "must be > 0 and finite")
    need(core.max_steps is None or core.max_steps >= 1, "max_steps", "must be >= 1")
    need(core.general_text is None or Path(core.general_text).is_file(), "general_text", "must be an existing file")
    need(core.path is None or Path(core.path).is_dir(), "path", "must be an existing folder")
