"""The core keys, their hash, and one checked run with its plugins."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from highrank.base import registry
from highrank.base.files import digest, path_field
from highrank.data.protocol import Protocol
from highrank.data.task import Task

if TYPE_CHECKING:  # they bring PyTorch, which help does without
    from highrank.model.method import Method
    from highrank.model.whole_model import WholeModelMethod

GROUPS = ("method", "task", "model", "protocol", "trainer", "experiment")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adam", "sgd")
LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")


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
    """The backbone: a name, `hf:<id>` or `hf:<id>@<revision>`, or any name together with `path`."""
    protocol: Any = None
    """Prompt, masking, cut-off, decoding and answer rule."""
    trainer: Any = None
    """Arguments of the Lightning Trainer: accelerator, devices, strategy, precision."""
    # only in presets: the axes that `-m` sweeps, {key: [values]}, and `cases` of keys that vary together
    sweep: Any = None
    path: str | None = path_field(None)
    """A local folder with config.json, tokenizer and safetensors, used before any other source."""
    placement: Any = "fc_qkv"
    """Which weights are adapted: a set such as fc_qkv, or a list such as [q,down]."""
    layers: Any = "all"
    """Which blocks are adapted: all, 4-11, or a list."""
    fused: str = "auto"
    """One adapter per fused matrix (fused), one per part (split), or fused where all its parts are placed (auto)."""
    architecture: Any = None
    """Paths of the parts in a model that is not built in: {blocks: model.layers, q: self_attn.q_proj, ...}."""
    start_from: str | None = path_field(None)
    """A finished run to go on from: its directory, hf:user/name@revision, or a sweep's folder, of which the run of this method and seed is taken."""
    start_as: str | None = None
    """adapter: its adapter is trained on; merged: its merged weights are the base; default: adapter of the same method, else merged."""
    start_hash: str | None = None
    """What start_from holds, a sha256 over its config and its adapter: filled in; where given, it must be that."""
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
    packing: bool = False
    """Whether examples of a micro-batch share rows in training, each computed as if alone: the same steps, no padding."""
    checkpoint_activations: bool = False
    """Whether blocks are computed again in backward instead of keeping their activations."""
    auto_microbatch: bool = False
    """Whether a batch that does not fit into memory is computed in halves, quarters, ...: the same steps, slower."""
    eval_batch_size: int = 50
    """Examples per evaluation batch; changes speed, not results."""
    patience: int | None = None
    """Validations in a row without a lower loss on the held-out examples after which training stops; default: never."""
    min_delta: float = 0.0
    """By how much a held-out loss must be lower to count for patience."""
    eval_before: bool = True
    """Whether the untrained model is evaluated too."""
    eval_test: bool = True
    """Whether the test sets are evaluated at all; a search over the held-out examples needs none."""
    eval_also: Any = None
    """Other tasks on whose test sets the model is evaluated too, before and after: [math10k] or {math10k: {n_test: 40}}."""
    general_text: str | None = path_field(None)
    """File of general text (.txt by lines, or a field `text`) on which forgetting is measured after training."""
    analyze: bool = False
    """Whether the singular values of ΔW are analysed after training (see highrank analyze)."""
    output: str = "outputs"
    """Folder under which run directories are made."""
    run_dir: str | None = None
    """Exact run directory; default: <output>/<date>/<name>-<hash>."""
    logger: str = "tensorboard"
    """Where losses and rates of every step go: tensorboard, csv, wandb or mlflow."""
    resume: str = "auto"
    """auto: an unfinished run goes on where it stopped; never: it starts afresh."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints; one is also written every ten minutes, at a signal and at the end."""
    dry_run: bool = False
    """Load no weights; print what would be adapted and trained, and write plan.json."""


CORE_KEYS = tuple(f.name for f in dataclasses.fields(RunConfig) if f.name not in ("defaults", "sweep", *GROUPS))
UNHASHED = (
    *("output", "run_dir", "logger", "resume", "checkpoint_every", "dry_run"),
    *("eval_batch_size", "auto_microbatch", "analyze"),
)
"""Keys that do not change a run's results."""
PLACES = ("start_from",)
"""Keys that say where something lies of which another key tells what it is: no part of the hash."""
SAME_RUN = (*UNHASHED, *PLACES)
"""Keys in which two runs of one hash may differ."""

STEP_VERSION = 2
"""Raised when a step of several micro-batches changes: since 2 it is the mean over its targets, before, of their means."""
LATER: dict[str, Any] = {
    **{"head_lr": None, "packing": False, "eval_also": None, "patience": None, "min_delta": 0.0},
    **{"start_from": None, "start_as": None, "start_hash": None},
}
"""Keys younger than the first runs, and what their absence from a saved config means; a plugin has `later_field`s."""


def as_given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a resolved config with its paths as they were typed, by which runs are told apart and shown."""
    typed = values.get("given") or {}
    config = {
        key: {k: typed.get(f"{key}.{k}", v) for k, v in value.items()}
        if key in GROUPS and isinstance(value, Mapping)
        else value
        for key, value in values.items()
        if key != "given"
    }
    return config | {key: path for key, path in typed.items() if "." not in key}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a resolved config by the keys of the command line: core keys and method fields bare, others dotted."""
    by_key: dict[str, Any] = {}
    for key, value in config.items():
        if key not in GROUPS or not isinstance(value, Mapping):
            by_key[key] = value
            continue
        member = value.get("member")
        for subkey, each in value.items():
            if subkey == "name":
                by_key[key] = f"{each}/{member}" if member else each
            elif subkey != "member":
                by_key[subkey if key == "method" else f"{key}.{subkey}"] = each
    return by_key


def config_hash(values: Mapping[str, Any], left_out: Collection[str] = SAME_RUN) -> str:
    """Returns the sha256 over every key of a resolved config that can change the result; a younger one where given."""
    config = as_given(values)
    plugins: dict[str, Any] = {
        group: _older(f"{group}s", config[group]["name"], config[group])
        for group in ("method", "task")
        if group in config
    }
    items = {**config, **plugins}.items()
    return digest({key: value for key, value in items if key not in left_out and value != LATER.get(key, ...)})


def with_later(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved config with the keys that are younger than it, at what their absence means.

    Those of a plugin that is not installed stay away.
    """
    plugins = {group: _completed(f"{group}s", config[group]["name"], config[group]) for group in ("method", "task")}
    return {**LATER, **config, **plugins}


def _older(group: str, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plugin's values without those of younger fields that say what their absence does; a field with `methods` in
    its metadata holds values of other methods, by their names."""
    kept = dict(values)
    for field in _fields(group, name):
        if field.metadata.get("later") and kept.get(field.name, ...) == field.default:
            del kept[field.name]
        elif field.metadata.get("methods"):
            kept[field.name] = {part: _older("methods", part, given) for part, given in kept[field.name].items()}
    return kept


def _completed(group: str, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    full = dict(values)
    for field in _fields(group, name) if name in registry.available(group) else ():
        if field.metadata.get("later"):
            full.setdefault(field.name, field.default)
        elif field.metadata.get("methods"):
            full[field.name] = {part: _completed("methods", part, given) for part, given in full[field.name].items()}
    return full


def _fields(group: str, name: str) -> tuple[Any, ...]:
    plugin: Any = registry.load(group, name)
    return dataclasses.fields(plugin.config)


@dataclasses.dataclass(frozen=True)
class Run:
    """One checked run: the core keys, and the chosen plugins with their own configs built."""

    core: RunConfig
    method: "type[Method] | type[WholeModelMethod]"
    method_cfg: Any
    """Of the dataclass that is `method.config`; so too `task_cfg`."""
    task: type[Task]
    task_cfg: Any
    protocol: Protocol
    model: dict[str, Any]
    trainer: dict[str, Any]
    also: dict[str, "Run"] = dataclasses.field(default_factory=dict)
    """This run with each of the tasks of `eval_also` in the place of its own, by their names."""
    given: dict[str, str] = dataclasses.field(default_factory=dict)
    """Relative paths as they were typed, by their key (task.train); the run uses them absolute."""

    def make_task(self) -> Task:
        """Returns the run's task; its data are read when they are asked for."""
        task = self.task(self.task_cfg, self.core.seed)
        task.check()
        return task

    @property
    def resolved(self) -> dict[str, Any]:
        """Every value that the run uses, as primitives."""
        core = {key: getattr(self.core, key) for key in CORE_KEYS}
        one = (self.core.accumulate, self.trainer.get("devices", 1), self.trainer.get("num_nodes") or 1) == (1, 1, 1)
        return {
            "method": {"name": self.method.name, **dataclasses.asdict(self.method_cfg)},
            "task": {"name": self.task.name, "version": self.task.version, **dataclasses.asdict(self.task_cfg)},
            "model": self.model,
            "protocol": dataclasses.asdict(self.protocol),
            "trainer": self.trainer,
            **({} if one else {"step_version": STEP_VERSION}),
            **core,
            **({"given": self.given} if self.given else {}),
        }

    @property
    def hash(self) -> str:
        return config_hash(self.resolved)

    @property
    def name(self) -> str:
        placement = self.core.placement
        place = placement if isinstance(placement, str) else "+".join(placement)
        member = getattr(self.task_cfg, "member", None)
        parts = [self.method.name, place] if self.method.family.changes_weights else [self.method.name]
        if hasattr(self.method_cfg, "r"):
            parts.append(f"r{self.method_cfg.r}")
        parts += [
            "-".join([self.task.name, *([member] if member else [])]),
            self.model["name"].replace("/", "-"),
            f"s{self.core.seed}",
        ]
        return "_".join(parts)
