"""HighRank as a library, on a transformers model that the caller has loaded: attach, load; imports `train` and below.

What trains is the adapters' parameters alone; whatever loop, HF or TRL trainer (`highrank[trl]`) or LightningModule then
trains the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from highrank.base import registry
from highrank.base.errors import UserError
from highrank.base.fields import dataclass_from
from highrank.base.hub import fetched, on_hub
from highrank.model import adapter_folder, adapters
from highrank.model.adapters import Adapters
from highrank.model.backbones import head_modules
from highrank.model.placement import WeightView, weight_of
from highrank.model.weight_adapters import AdaptedLinear
from highrank.train.saved import load_run


class Loaded(NamedTuple):
    """A finished run: its model with the adapters acting, in evaluation mode, the tokenizer, and the adapters."""

    model: Any
    tokenizer: Any
    adapters: Adapters


def attach(
    model: Any,
    method: Any = "hira",
    *,
    placement: str | Sequence[str] = "fc_qkv",
    layers: str | int | Sequence[int] = "all",
    fused: str = "auto",
    architecture: Mapping[str, str] | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    **fields: Any,
) -> Adapters:
    """Freezes a transformers model, puts a method's adapters on it, and returns them.

    `method` is a name, with the method's own fields beside it (`r=16`), or the method's config object. The other
    arguments mean what the command line's keys of the same name do; `tokenizer` is for methods that start from a text.
    With the same seed the adapters start as a run's do. A classifier's head trains too, as in a run.

    Raises:
        UserError: for a model that has adapters already, is no transformers model or has no weights; an unknown method, field or
            placement, with the nearest names; fields that do not fit one of the weights.
    """
    cls, cfg = _method(method, fields)
    _check_free(model)
    views = cls.family.views_in(model, placement, layers, fused, architecture)
    return _attach(model, views, cls, cfg, seed, tokenizer)


def load(run: Path | str, *words: str) -> Loaded:
    """Returns model, tokenizer and adapters of a finished run, in a folder or pushed to the Hub: "hf:user/name@revision".

    `words` give anew what `highrank eval` takes, as there: `"path=<folder>"`, `"model.dtype=float32"`.

    Raises:
        UserError: for a folder that is no run, a run that has not finished, a damaged one, or another base.
    """
    _, backbone, trained = load_run(fetched("load", run), words)
    return Loaded(backbone.model.eval(), backbone.tokenizer, trained)


def load_adapter(model: Any, folder: Path | str) -> Adapters:
    """Puts the adapters that `save` wrote into `folder` on a model, with their trained values; a run has one in `adapter/`, a run
    on the Hub is named by itself: "hf:user/name@revision".

    Raises:
        UserError: as `attach`; for a folder without an adapter or a damaged one; if the model is not the one that they were
            trained on. The model is then without adapters.
    """
    if on_hub(folder):
        folder = fetched("load_adapter", folder) / "adapter"
    card = adapter_folder.read_card(folder)
    cls, cfg = _method(card["method"], card["fields"], trained=True)
    _check_free(model)
    views = [WeightView(**{**view, "rows": view["rows"] and tuple(view["rows"])}) for view in card["views"]]
    _check_views(model, views, folder)
    loaded = _attach(model, views, cls, cfg, card["seed"], None)
    try:
        loaded.load(folder)
    except UserError:
        loaded.unload()
        raise
    return loaded


def _attach(model: Any, views: Sequence[WeightView], method: Any, cfg: Any, seed: int, tokenizer: Any) -> Adapters:
    method.family.count(model, views, method, cfg, 0)  # says what does not fit, before anything is changed
    before = set(model.modules())
    attached = adapters.attach(model, views, method, cfg, seed, head_modules(model), tokenizer)
    for module in set(model.modules()) - before:
        module.training = model.training
    return attached


def _method(method: Any, fields: Mapping[str, Any], trained: bool = False) -> tuple[Any, Any]:
    """Returns a method's class and its config, of a name and fields or of a config object."""
    if isinstance(method, str):
        cls: Any = registry.load("methods", method)
        return cls, dataclass_from(cls.config, fields, method, trained)
    for name, module in registry.available("methods").items():
        if module == type(method).__module__:
            cls = registry.load("methods", name)
            if type(method) is cls.config:
                if fields:
                    raise UserError(
                        f"attach: a config object holds all fields, got {', '.join(fields)} beside it; give one or the other"
                    )
                return cls, method
    raise UserError(
        f"attach: method is a name or a method's config object, got method={method!r}; highrank.methods() names them"
    )


def _check_free(model: Any) -> None:
    """Raises UserError unless this is a transformers model with its weights and without adapters, ours or PEFT's."""
    if not (isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "can_generate")):
        raise UserError(
            f"attach: the model is a transformers model, got {type(model).__name__}; give what from_pretrained returns"
        )
    if hasattr(model, "_orig_mod"):
        raise UserError(
            "attach: adapters go on before torch.compile, got a compiled model; give attach what torch.compile was given"
        )
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            raise UserError(
                f"attach: the model must not be wrapped by PEFT, got {type(module).__name__} at {name or 'its top'}; give "
                "what PEFT wraps: model.unload(), or model.merge_and_unload()"
            )
        if isinstance(module, AdaptedLinear) or name == "highrank_adapter":
            raise UserError(
                f"attach: the model has adapters already, got some at {name}; take them off with adapters.unload(), or "
                "merge them first to keep their effect"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UserError(
                f"attach: nothing trains on tensors made in inference mode, got {name}; load the model outside torch.inference_mode"
            )
        if parameter.is_meta:
            raise UserError(
                f"attach: the model must hold its weights, got none at {name}, which is on the meta device; load it with "
                "from_pretrained"
            )


def _check_views(model: nn.Module, views: Sequence[WeightView], folder: Path | str) -> None:
    """Raises UserError unless the model has every weight that a saved adapter sits on, in its shape."""
    for view in views:
        try:
            shape = tuple(weight_of(model.get_submodule(view.path), view.rows).shape)
        except (AttributeError, IndexError):
            shape = None
        if shape != view.shape:
            raise UserError(
                f"load_adapter: the model must be the one trained on, got {shape or 'no weight'} for {view.shape} at "
                f"{view.name}; {folder} is of another model"
            )
