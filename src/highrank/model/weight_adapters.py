"""Methods that change weights: one adapter per weight view, in a wrapper around the layer that holds it."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.base.errors import UserError
from highrank.model.adapters import Adapters, set_module, site_seed
from highrank.model.contract import check_adapter
from highrank.model.experts import Experts
from highrank.model.placement import EXPERTS, Rows, WeightView, resolve, row_index, weight_of, weight_reader
from highrank.model.quantised import is_quantised
from highrank.model.sharding import gathered, whole
from highrank.model.sizes import check_shapes
from highrank.model.torch_internals import version_of


@dataclass(frozen=True)
class Site:
    """Where an adapter sits, for the few methods whose start depends on it."""

    name: str
    """Full name of the weight view, e.g. `model.layers.3.self_attn.q_proj`."""
    seed: int
    """Seed for frozen random tensors, a function of the run's seed and `name` alone."""
    neighbours: Callable[[], Sequence[Tensor]]
    """The pristine W of the same part in layers l-1, l, l+1, as many of them as the model has."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter on its whole weight, or one on each of some row slices."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base: Any = base
        self.adapters = nn.ModuleList()
        self.spans: list[Rows | None] = []
        self.enabled = True
        self.overwritten: bool | None = None
        """Whether the model writes into what this layer returns; None until that is known."""
        self._copies: dict[Rows, tuple[Any, ...]] = {}
        self.merged_from: Tensor | None = None
        """The pristine weight while an adapter is merged into `base`."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "base":
            self.read = weight_reader(value)

    def add(self, adapter: nn.Module, rows: Rows | None) -> None:
        """Puts `adapter` on `rows` of the weight (None: all rows); slices are kept in row order."""
        at = sum(1 for span in self.spans if span is not None and rows is not None and span[0] < rows[0])
        self.adapters.insert(at, adapter)
        self.spans.insert(at, rows)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def pairs(self) -> Iterator[tuple[Any, Rows | None]]:
        return zip(self.adapters, self.spans, strict=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x W'ᵀ + bias, (..., out_features); rows without an adapter use W."""
        if not self.enabled or self.merged_from is not None:
            return self.base(x)
        W, bias = self.read(self.base), self.bias
        if self.spans == [None]:
            return self._safe(self.adapters[0](x, W, bias))
        period = next((span[2] for span in self.spans if span and len(span) == 3), len(W))
        pieces: list[Tensor] = []

        def add(start: int, stop: int, product: Callable[..., Tensor]) -> None:
            rows = (start, stop) if period == len(W) else (start, stop, period)
            piece = product(x, self._rows(W, rows), None if bias is None else bias[row_index(rows, len(W))])
            pieces.append(piece if period == len(W) else piece.unflatten(-1, (-1, stop - start)))

        at = 0
        for adapter, span in self.pairs():
            assert span is not None  # an adapter on the whole matrix is alone
            start, stop = span[:2]
            if start > at:
                add(at, start, F.linear)
            add(start, stop, adapter)
            at = stop
        if at < period:
            add(at, period, F.linear)
        y = torch.cat(pieces, dim=-1)
        return y if period == len(W) else y.flatten(-2)

    def _safe(self, y: Tensor) -> Tensor:
        """Returns y, or a copy of it if what follows in the model writes into what it is given (Falcon, Llama 4).

        An adapter's backward may need y as it was. Whether it is written into shows in the first backward pass.
        """
        if self.overwritten is None and y.requires_grad and not torch.compiler.is_compiling():
            copy = y.clone()
            given, version = copy.detach(), version_of(copy)
            copy.register_hook(lambda gradient: self._look(given, version))
            return copy
        return y.clone() if self.overwritten else y

    def _look(self, given: Tensor, version: int) -> None:
        self.overwritten = self.overwritten or version_of(given) != version

    def _rows(self, W: Tensor, rows: Rows) -> Tensor:
        """Returns those rows of W; where they are a copy, it is kept until W changes, but not of a sharded model."""
        if len(rows) == 2 or torch.compiler.is_compiling() or not self.adapters[0].keeps:
            return W[row_index(rows, len(W))]
        state = (W.data_ptr(), W.dtype, version_of(W))
        if self._copies.get(rows, (None,))[0] != state:
            with torch.inference_mode(False):  # training may use what an evaluation made
                self._copies[rows] = state, W.detach()[row_index(rows, len(W))]
        return self._copies[rows][1]


class WeightAdapters(Adapters):
    """One adapter on each view's weight."""

    def __init__(self, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any, seed: int):
        super().__init__(model, views, method, cfg, seed)
        self.layers: dict[str, AdaptedLinear] = {}
        """The wrappers by the path of what they wrap."""
        self.experts: dict[str, Experts] = {}
        """Experts that are seen as layers, by their path."""
        self.shared: nn.Module | None = None
        """Frozen tensors that all adapters point to."""

    @classmethod
    def views_in(cls, model: nn.Module, placement: Any, layers: Any, fused: str, architecture: Any) -> list[WeightView]:
        return resolve(model, placement, layers, fused, architecture)

    @classmethod
    def count(
        cls, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any, num_base: int
    ) -> tuple[int, int]:
        check_shapes(method, [view.shape for view in views], cfg)
        trainable = sum(method.num_trainable(view.in_features, view.out_features, cfg) for view in views)
        frozen = sum(method.num_frozen_extra(view.in_features, view.out_features, cfg) for view in views)
        return trainable, frozen + method.num_frozen_shared([view.shape for view in views], cfg)

    @classmethod
    def matched(cls, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any) -> dict[str, int]:
        return dict(Counter(view.part for view in views))

    def put_on(self, tokenizer: Any) -> None:
        model, views, method, cfg = self.model, self.views, self.method, self.cfg
        check_shapes(method, [view.shape for view in views], cfg)
        for path in dict.fromkeys(view.path.rsplit(".", 2)[0] for view in views if view.part == EXPERTS):
            self.experts[path] = Experts(model.get_submodule(path))
            set_module(model, path, self.experts[path])
        self._check_owners()
        self.shared = method.shared([view.shape for view in views], cfg)
        if self.shared is not None:
            model.highrank_shared = self.shared.to(next(model.parameters()).device)
        for view in views:
            W = weight_of(model.get_submodule(view.path), view.rows)

            def neighbours(view: WeightView = view) -> list[Tensor]:
                near = (_weight_in_layer(model, view, offset) for offset in (-1, 0, 1))
                return [weight for weight in near if weight is not None]

            adapter = method(view.in_features, view.out_features, cfg, self.shared)
            declared = method.num_trainable(view.in_features, view.out_features, cfg)
            check_adapter(method, adapter, declared, view.name)
            seed = site_seed(self.seed, view.name)
            torch.manual_seed(seed)
            adapter.reset_parameters(W.detach(), Site(view.name, seed, neighbours))
            if view.path not in self.layers:
                self.layers[view.path] = AdaptedLinear(model.get_submodule(view.path))
            self.layers[view.path].add(adapter.to(W.device), view.rows)
            self.by_view[view.name] = adapter
        for path, layer in self.layers.items():
            set_module(model, path, layer)

    def _check_owners(self) -> None:
        """Raises UserError if two views lie in one weight that goes by two names."""
        owners: dict[int, str] = {}
        for view in self.views:
            first = owners.setdefault(weight_of(self.model.get_submodule(view.path)).data_ptr(), view.path)
            if first != view.path:
                raise UserError(f"placement: two adapted layers must not share a weight, got {first} and {view.path}")

    def adapted(self) -> Iterator[nn.Parameter]:
        return (layer.base.weight for layer in self.layers.values())

    def base_weight(self, view: WeightView) -> Tensor:
        """Returns the pristine W (out_features, in_features) of a view, also while merged."""
        layer = self.layers[view.path]
        if layer.merged_from is None:
            return weight_of(layer.base, view.rows)
        return layer.merged_from[row_index(view.rows, len(layer.merged_from))]

    def delta_weight(self, view: WeightView | str) -> Tensor:
        view = self.view(view) if isinstance(view, str) else view
        with torch.no_grad():
            delta: Tensor = self.by_view[view.name].delta_weight(self.base_weight(view))
            return delta

    @torch.no_grad()
    def layer_update(self, path: str) -> Tensor:
        """Returns ΔW (out_features, in_features) of the whole layer at `path`, 0 on rows without an adapter, in fp32."""
        update = torch.zeros(weight_of(self.layers[path].base).shape)
        for view in self.views:
            if view.path == path:
                update[row_index(view.rows, len(update))] = self.delta_weight(view).cpu()
        return update

    def other_updates(self) -> Mapping[str, Callable[[], Tensor]]:
        """Returns, by its name, what computes the change of each parameter that trained beside the layers' weights."""
        return {}

    @property
    def merged(self) -> bool:
        return any(layer.merged_from is not None for layer in self.layers.values())

    @torch.no_grad()
    def _merge(self) -> None:
        if held := [path for path, layer in self.layers.items() if is_quantised(layer.base)]:
            raise UserError(
                f"merge: a quantised weight cannot hold W', got {held[0]}; merge into the unquantised base, or into the "
                "dequantised one (highrank.model.quantised.dequantise_model)"
            )
        for layer in self.layers.values():
            W = weight_of(layer.base)
            layer.merged_from = W.clone()
            for adapter, span in layer.pairs():
                rows = row_index(span, len(W))
                W[rows] = adapter.effective_weight(layer.merged_from[rows]).to(W.dtype)

    @torch.no_grad()
    def _unmerge(self) -> None:
        for layer in self.layers.values():
            assert layer.merged_from is not None
            weight_of(layer.base).copy_(layer.merged_from)
            layer.merged_from = None

    def merging(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.merge()
        for layer in self.layers.values():
            assert layer.merged_from is not None
            yield layer.merged_from, weight_of(layer.base)

    def _act(self, acts: bool) -> None:
        for layer in self.layers.values():
            layer.enabled = acts

    def unload(self) -> nn.Module:
        for path, layer in self.layers.items():
            set_module(self.model, path, layer.base)
        for path, experts in self.experts.items():
            set_module(self.model, path, experts.base)
        if self.shared is not None:
            del self.model.highrank_shared
        return self.model

    def plug(self) -> None:
        for path, experts in self.experts.items():
            set_module(self.model, path, experts)
        for path, layer in self.layers.items():
            set_module(self.model, path, layer)
        if self.shared is not None:
            self.model.highrank_shared = self.shared

    @property
    def base_dtype(self) -> str:
        quantised = " quantised" if any(is_quantised(layer.base) for layer in self.layers.values()) else ""
        return str(self.base_weight(self.views[0]).dtype) + quantised

    @torch.no_grad()
    def probe(self) -> dict[str, list[float]]:
        """Returns, per view, ‖y‖² and a signed sum of y = x W'ᵀ for one fixed input.

        It differs if the adapter is loaded on another base, with another R or other shared projections.
        """
        prints = {}
        for view in self.views:
            with gathered(self.model, view.path):
                prints[view.name] = self._probe(view)
        return prints

    def _probe(self, view: WeightView) -> list[float]:
        x = torch.cos(torch.arange(view.in_features, dtype=torch.float64)) / view.in_features**0.5
        signs = torch.cos(1.7 * torch.arange(view.out_features, dtype=torch.float64))
        W = self.base_weight(view).detach().double().cpu()
        adapter = self.by_view[view.name]
        W = W.to(next(adapter.buffers(), next(adapter.parameters())).device)
        y = adapter.effective_weight(W).double().cpu() @ x
        return [float(y.square().sum()), float((signs * y).sum())]


class FullAdapters(WeightAdapters):
    """Full fine-tuning: an adapter holds its own copy of W, and every other parameter of the model trains as well."""

    placed = False
    keeps_base = False

    def __init__(self, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any, seed: int):
        super().__init__(model, views, method, cfg, seed)
        if slices := [view for view in views if view.rows is not None]:
            raise UserError(f"{method.name}: matrices are trained whole, got rows {slices[0].rows} of {slices[0].path}")
        self.pristine_extra: dict[str, Tensor] = {}
        """What the other parameters were before training, or while the base computes alone, what they became."""
        self._acts = True

    @classmethod
    def views_in(cls, model: nn.Module, placement: Any, layers: Any, fused: str, architecture: Any) -> list[WeightView]:
        return resolve(model, "all", "all", "auto", architecture)

    @classmethod
    def count(
        cls, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any, num_base: int
    ) -> tuple[int, int]:
        super().count(model, views, method, cfg, num_base)
        if quantised := [view for view in views if is_quantised(model.get_submodule(view.path))]:
            raise UserError(
                f"{method.name}: a quantised base stays as it is, got {quantised[0].path}; use a method that trains beside it"
            )
        return num_base, 0

    def trains(self, parameter: nn.Parameter) -> bool:
        return all(parameter is not layer.base.weight for layer in self.layers.values())

    def train_extra(self, name: str, parameter: nn.Parameter) -> None:
        super().train_extra(name, parameter)
        self.pristine_extra[name] = parameter.detach().clone()

    def merging(self) -> Iterator[tuple[Tensor, Tensor]]:
        named = dict(self.model.named_parameters())
        yield from ((W, named[name]) for name, W in self.pristine_extra.items())
        yield from super().merging()

    @torch.no_grad()
    def other_updates(self) -> Mapping[str, Callable[[], Tensor]]:
        named = dict(self.model.named_parameters())

        def change(name: str) -> Tensor:
            change = (named[name].detach() - self.pristine_extra[name]).float().cpu()
            return change if self._acts else -change

        return {name: partial(change, name) for name in self.pristine_extra}

    def state_dict(self) -> dict[str, Tensor]:
        aside = {} if self._acts else self.pristine_extra
        return super().state_dict() | {name: whole(tensor).cpu().contiguous() for name, tensor in aside.items()}

    def untouched(self) -> AbstractContextManager[None]:
        return nullcontext()  # every parameter still is what it was

    def _act(self, acts: bool) -> None:
        super()._act(acts)
        self._swap_extra()

    def unload(self) -> nn.Module:
        if not self.merged:
            self._swap_extra()
        return super().unload()

    def plug(self) -> None:
        super().plug()
        if not self.merged:
            self._swap_extra()

    @torch.no_grad()
    def _swap_extra(self) -> None:
        """Exchanges the trained values of the other parameters with their pristine ones."""
        self._acts = not self._acts
        named = dict(self.model.named_parameters())
        for name, kept in self.pristine_extra.items():
            trained = named[name].clone()
            named[name].copy_(kept)
            kept.copy_(trained)


def _weight_in_layer(model: nn.Module, view: WeightView, offset: int) -> Tensor | None:
    """Returns the same part's W so many layers on, or None beyond either end of the stack of blocks."""
    path = re.sub(r"(?<=\.)\d+(?=\.)", lambda number: str(int(number[0]) + offset), view.path, count=1)
    try:
        return weight_of(model.get_submodule(path), view.rows)
    except AttributeError:
        return None
