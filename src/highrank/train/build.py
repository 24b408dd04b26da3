"""A run's model: the backbone with the run's adapters on it."""

from typing import Any

from highrank.config.run_config import Run
from highrank.data.encoding import give_tokens
from highrank.data.task import Task
from highrank.model.adapters import Adapters, attach
from highrank.model.backbones import Backbone, head_modules, load_backbone
from highrank.model.placement import WeightView


def build_model(run: Run, task: Task) -> tuple[Backbone, Adapters]:
    """Loads the backbone and attaches the run's adapters to it."""
    core = run.core
    backbone = load_backbone(run.model, core.path, task.kind, task.num_labels, core.seed)
    give_tokens(task, run.protocol, backbone.tokenizer)
    views = adapted_views(run, backbone.model)
    heads = head_modules(backbone.model)
    return backbone, attach(backbone.model, views, run.method, run.method_cfg, core.seed, heads, backbone.tokenizer)


def adapted_views(run: Run, model: Any) -> list[WeightView]:
    """Returns the weights that the run adapts."""
    core = run.core
    views: list[WeightView] = run.method.family.views_in(
        model, core.placement, core.layers, core.fused, core.architecture
    )
    return views
