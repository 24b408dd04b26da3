"""A run's model: the backbone with the run's adapters on it."""

from typing import Any

from highrank.config.run_config import Run
from highrank.data.encoding import give_tokens
from highrank.data.task import Task
from highrank.model.adapters import Adapters, attach
from highrank.model.backbones import Backbone, head_modules, load_backbone
from highrank.model.placement import WeightView


def build_model(run: Run, task: Task, base: Backbone | None = None) -> tuple[Backbone, Adapters]:
    """Loads the backbone, unless the run's `base` is given, and attaches the run's adapters to it.

    A run with start_as=merged has another run's merged weights as its base: `saved.load_base` makes them.
    """
    core = run.core
    assert base is not None or core.start_as != "merged", "the base is the merged weights of start_from"
    backbone = base or load_plain(run, task)
    give_tokens(task, run.protocol, backbone.tokenizer)
    views = adapted_views(run, backbone.model)
    heads = head_modules(backbone.model)
    adapters = attach(
        backbone.model, views, run.method, run.method_cfg, core.seed, heads, backbone.tokenizer, base_run(run)
    )
    return backbone, adapters


def base_run(run: Run) -> str | None:
    """Returns what the merged weights under a run are of, as its start_hash; None for a plain base."""
    return run.core.start_hash if run.core.start_as == "merged" else None


def load_plain(run: Run, task: Task) -> Backbone:
    """Loads the model that a run names."""
    return load_backbone(run.model, run.core.path, task.kind, task.num_labels, run.core.seed)


def adapted_views(run: Run, model: Any) -> list[WeightView]:
    """Returns the weights that the run adapts."""
    core = run.core
    views: list[WeightView] = run.method.family.views_in(
        model, core.placement, core.layers, core.fused, core.architecture
    )
    return views
