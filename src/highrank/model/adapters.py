"""Adapters on a model: attach, merge, unmerge, disable, save, load.

adapters = attach(model, views, method, cfg, seed=0)
adapters.save(folder); adapters.merge(); adapters.unmerge()
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.base.errors import UserError
from highrank.model import adapter_folder
from highrank.model.method import Method, Site
from highrank.model.placement import WeightView, weight_of
from highrank.model.quantised import is_quantised
from highrank.model.sharding import gathered, sharded_like, whole
from highrank.model.torch_internals import hook_once
from highrank.model.whole_model import WholeModelMethod


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter on its whole weight, or one on each of some row slices."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleList()
        self.spans: list[tuple[int, int] | None] = []
        self.enabled = True
        self.merged_from: Tensor | None = None
        """The pristine weight while an adapter is merged into `base`."""

    def add(self, adapter: Method, rows: tuple[int, int] | None) -> None:
        """Puts `adapter` on `rows` of the weight (None: all rows); slices are kept in row order."""
        at = sum(1 for span in self.spans if span is not None and rows is not None and span[0] < rows[0])
        self.adapters.insert(at, adapter)
        self.spans.insert(at, rows)

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def pairs(self) -> Iterator[tuple[Any, tuple[int, int] | None]]:
        return zip(self.adapters, self.spans, strict=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x W'ᵀ + bias, (..., out_features); rows without an adapter use W."""
        if not self.enabled or self.merged_from is not None:
            return self.base(x)
        W, bias = weight_of(self.base), self.bias
        if self.spans == [None]:
            return self.adapters[0](x, W, bias)
        pieces, at = [], 0
        for adapter, span in self.pairs():
            start, stop = span  # type: ignore[misc]
            if start > at:
                pieces.append(F.linear(x, W[at:start], None if bias is None else bias[at:start]))
            pieces.append(adapter(x, W[start:stop], None if bias is None else bias[start:stop]))
            at = stop
        if at < W.shape[0]:
            pieces.append(F.linear(x, W[at:], None if bias is None else bias[at:]))
        return torch.cat(pieces, dim=-1)


class Adapters:
    """The adapters of one model and what can be done with them; made by `attach`."""

    def __init__(self, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any, seed: int):
        self.model, self.views, self.method, self.cfg, self.seed = model, list(views), method, cfg, seed
        self.by_view: dict[str, Any] = {}
        """The adapter of each view; for a method whose update is no weight, its one module under the method's name."""
        self.layers: dict[str, AdaptedLinear] = {}
        self.whole: WholeModelMethod | None = None
        self.extra: list[str] = []
        """Names of parameters outside the adapters that train too: heads, or everything in full fine-tuning."""
        self.heads: set[str] = set()
        """Names of those of them that belong to a head."""
        self.pristine_extra: dict[str, Tensor] = {}
        """Full fine-tuning's start of those, for `disabled`."""

    def base_weight(self, view: WeightView) -> Tensor:
        """Returns the pristine W (out_features, in_features) of a view, also while merged."""
        layer = self.layers[view.path]
        if layer.merged_from is None:
            return weight_of(layer.base, view.rows)
        rows = view.rows or (0, None)
        return layer.merged_from[rows[0] : rows[1]]

    def delta_weight(self, view: WeightView) -> Tensor:
        """Returns ΔW (out_features, in_features) of a view in fp32, from the parameters."""
        with torch.no_grad():
            return self.by_view[view.name].delta_weight(self.base_weight(view))

    @torch.no_grad()
    def merge(self) -> None:
        """Writes W' into the base weights and keeps W, so that `unmerge` restores it bit for bit."""
        if self.merged:
            raise UserError("merge: the adapter is merged already, got merged=True; unmerge first")
        if held := [path for path, layer in self.layers.items() if is_quantised(layer.base)]:
            raise UserError(
                f"merge: a quantised weight cannot hold W', got {held[0]}; merge into the unquantised base, or into the "
                "dequantised one (highrank.model.quantised.dequantise_model)"
            )
        if self.whole is not None:
            self.whole.merge(self.model)
        for layer in self.layers.values():
            W = weight_of(layer.base)
            layer.merged_from = W.clone()
            for adapter, span in layer.pairs():
                rows = slice(*span) if span else slice(None)
                W[rows] = adapter.effective_weight(layer.merged_from[rows]).to(W.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the pristine base weights, bit for bit."""
        if not self.merged:
            raise UserError("unmerge: the adapter must be merged, got merged=False")
        if self.whole is not None:
            self.whole.unmerge(self.model)
        for layer in self.layers.values():
            weight_of(layer.base).copy_(layer.merged_from)  # type: ignore[arg-type]
            layer.merged_from = None

    @property
    def merged(self) -> bool:
        whole = self.whole is not None and self.whole.merged
        return whole or any(layer.merged_from is not None for layer in self.layers.values())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model computes as the base does (heads that trained stay as they are)."""
        if self.merged:
            raise UserError("disabled: the adapter must not be merged, got merged=True; unmerge first")
        for layer in self.layers.values():
            layer.enabled = False
        if self.whole is not None:
            self.whole.unplug()
        self._swap_extra()
        try:
            yield
        finally:
            self._swap_extra()
            for layer in self.layers.values():
                layer.enabled = True
            if self.whole is not None:
                self.whole.plug(self.model)

    @torch.no_grad()
    def _swap_extra(self) -> None:
        """Exchanges the trained values of full fine-tuning's other parameters with their pristine ones."""
        named = dict(self.model.named_parameters())
        for name, kept in self.pristine_extra.items():
            trained = named[name].clone()
            named[name].copy_(kept)
            kept.copy_(trained)

    def unload(self) -> nn.Module:
        """Takes the wrappers off and returns the model: with W' if merged, else with W."""
        for path, layer in self.layers.items():
            _set_module(self.model, path, layer.base)
        if self.whole is not None:
            self.whole.unplug()
            del self.model.highrank_adapter
        if hasattr(self.model, "highrank_shared"):
            del self.model.highrank_shared
        return self.model

    def plug(self) -> None:
        """Undoes `unload`: the adapters act on the model again."""
        for path, layer in self.layers.items():
            _set_module(self.model, path, layer)
            shared = layer.adapters[0].shared_tensors
            if shared is not None:
                self.model.highrank_shared = shared
        if self.whole is not None:
            self.whole.plug(self.model)
            self.model.highrank_adapter = self.whole

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every trainable parameter under the name it is saved by: `<view>.<parameter>`, then the extras."""
        for name, adapter in self.by_view.items():
            for key, parameter in adapter.named_parameters():
                yield f"{name}.{key}", parameter
        named = dict(self.model.named_parameters())
        for name in self.extra:
            yield name, named[name]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the trainable tensors alone, detached, on the CPU."""
        return {name: whole(p.detach()).cpu().contiguous() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors in; every name and shape must match.

        Raises:
            UserError: naming the first tensors that are missing, unexpected or of another shape.
        """
        own = dict(self.named_parameters())
        missing, unexpected = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
        if missing or unexpected:
            raise UserError(
                f"adapter: tensors must match the model, got {len(missing)} missing (first: {missing[:3]}) and "
                f"{len(unexpected)} unexpected (first: {unexpected[:3]}); was it trained on another model or placement?"
            )
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise UserError(
                    f"adapter: shapes must match, got {name} of {tuple(tensor.shape)} for {tuple(own[name].shape)}"
                )
        for name, tensor in tensors.items():
            own[name].copy_(sharded_like(own[name], tensor))

    def num_trainable(self) -> int:
        """Trainable parameters inside the adapters."""
        return sum(p.numel() for adapter in self.by_view.values() for p in adapter.parameters())

    def num_head(self) -> int:
        """Trainable parameters outside the adapters."""
        named = dict(self.model.named_parameters())
        return sum(named[name].numel() for name in self.extra)

    @property
    def _embeddings(self) -> Tensor:
        return self.model.get_input_embeddings().weight  # type: ignore[operator]

    @property
    def base_dtype(self) -> str:
        quantised = " quantised" if any(is_quantised(layer.base) for layer in self.layers.values()) else ""
        return str((self.base_weight(self.views[0]) if self.views else self._embeddings).dtype) + quantised

    @torch.no_grad()
    def probe(self) -> dict[str, list[float]]:
        """Returns, per view, ‖y‖² and a signed sum of y = x W'ᵀ for one fixed input: a fingerprint of W and adapter.

        It differs if the adapter is loaded on another base, with another R or other shared projections. Without views it
        is taken of the first input embeddings.
        """
        prints = {}
        if self.whole is not None:
            E = whole(self._embeddings)[:1024].double().cpu()
            y = E @ torch.cos(torch.arange(E.shape[1], dtype=torch.float64)) / E.shape[1] ** 0.5
            signs = torch.cos(1.7 * torch.arange(len(E), dtype=torch.float64))
            prints["input embeddings"] = [float(y.square().sum()), float((signs * y).sum())]
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

    def save(self, folder: Path | str) -> Path:
        """Writes `adapter.safetensors` and `adapter.json` (method, fields, views, checksums) into `folder`.

        Both files appear whole or not at all. Of several processes all must call it, and one writes.
        """
        return adapter_folder.write(
            Path(folder),
            self.state_dict(),
            method=self.method.name,
            fields=asdict(self.cfg),
            seed=self.seed,
            base_dtype=self.base_dtype,
            views=[asdict(view) for view in self.views],
            extra=self.extra,
            probe=self.probe(),
        )

    def load(self, folder: Path | str) -> None:
        """Loads what `save` wrote, strictly: file checksum, names, shapes, and the probe on this base.

        Raises:
            UserError: naming the file or tensor that does not match; the parameters are then as before.
        """
        card, tensors = adapter_folder.read(folder, self.method.name)
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict(tensors)
        # The same base held in another dtype differs by its rounding, 2^-9 per entry, and some 10 % in four bits; in the
        # same dtype by nothing but the order of fp64 sums and, for a truncated R, the SVD's last digits.
        same_dtype = card["base_dtype"] == self.base_dtype
        quantised = "quantised" in card["base_dtype"] + self.base_dtype
        tolerance = 1e-5 if same_dtype else 0.5 if quantised else 2e-2
        for name, found in self.probe().items():
            stored = card["probe"][name]
            scale = 1e-12 + max(abs(stored[0]), abs(stored[0]) ** 0.5)
            if any(abs(a - b) > tolerance * scale for a, b in zip(found, stored, strict=True)):
                self.load_state_dict(before)
                raise UserError(
                    f"adapter: the probe must match the one saved, got {found} for {stored} at {name}; "
                    "the base model is not the one the adapter was trained on"
                )


def attach(
    model: nn.Module,
    views: Sequence[WeightView],
    method: Any,
    cfg: Any,
    seed: int = 0,
    heads: Sequence[str] = (),
    tokenizer: Any = None,
) -> Adapters:
    """Freezes `model`, puts one adapter on each view and unfreezes `heads` (names of modules that train in full).

    An adapter's start depends on `seed` and its view's name alone, so adding a placement leaves the others unchanged.
    Everything that trains is fp32, whatever the base is: heads are cast, and for full fine-tuning the whole model.
    A method whose update is no weight takes no views; `tokenizer` is for those of them that start from a text.
    """
    adapters = Adapters(model, views, method, cfg, seed)
    model.requires_grad_(False)
    _read_slices_whole(model)
    if method.replaces_base:
        model.float()
    for name in heads:
        _train_in_fp32(model.get_submodule(name))
    if method.site == "weight":
        _wrap(adapters)
    else:
        _plug(adapters, tokenizer)
    bases = {id(layer.base.weight) for layer in adapters.layers.values()}
    own = {id(p) for adapter in adapters.by_view.values() for p in adapter.parameters()}
    in_heads = {id(p) for name in heads for p in model.get_submodule(name).parameters()}
    for name, parameter in model.named_parameters():
        trains = method.replaces_base and id(parameter) not in bases
        if id(parameter) not in own and (id(parameter) in in_heads or trains):
            parameter.requires_grad_(True)
            adapters.extra.append(name)
            if id(parameter) in in_heads:
                adapters.heads.add(name)
            if trains:
                adapters.pristine_extra[name] = parameter.detach().clone()
    return adapters


def _plug(adapters: Adapters, tokenizer: Any) -> None:
    """Makes the one module of a method whose update is no weight, and lets it act."""
    model, method, cfg = adapters.model, adapters.method, adapters.cfg
    method.validate(model, cfg)
    whole = method(model, cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_site_seed(adapters.seed, method.name))
        whole.reset_parameters(model, tokenizer)
    whole.to(_device(model)).plug(model)
    model.highrank_adapter = adapters.whole = adapters.by_view[method.name] = whole


def _wrap(adapters: Adapters) -> None:
    """Puts one adapter on each view."""
    model, views, method, cfg = adapters.model, adapters.views, adapters.method, adapters.cfg
    owners: dict[int, str] = {}
    for view in views:
        first = owners.setdefault(id(model.get_submodule(view.path).weight), view.path)
        if first != view.path:
            raise UserError(f"placement: two adapted layers must not share a weight, got {first} and {view.path}")
        if method.replaces_base and view.rows is not None:
            raise UserError(f"{method.name}: matrices are trained whole, got rows {view.rows} of {view.path}")
    shared = method.shared([view.shape for view in views], cfg)
    if shared is not None:
        model.highrank_shared = shared.to(_device(model))
    for view in views:
        W = weight_of(model.get_submodule(view.path), view.rows)

        def neighbours(view: WeightView = view) -> list[Tensor]:
            found = (_weight_in_layer(model, view, view.layer + offset) for offset in (-1, 0, 1))
            return [weight for weight in found if weight is not None]

        adapter = method(view.in_features, view.out_features, cfg, shared)
        site_seed = _site_seed(adapters.seed, view.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(site_seed)
            adapter.reset_parameters(W.detach(), Site(view.name, site_seed, neighbours))
        if view.path not in adapters.layers:
            adapters.layers[view.path] = AdaptedLinear(model.get_submodule(view.path))
        adapters.layers[view.path].add(adapter.to(W.device), view.rows)
        adapters.by_view[view.name] = adapter
    for path, layer in adapters.layers.items():
        _set_module(model, path, layer)


def _weight_in_layer(model: nn.Module, view: WeightView, layer: int) -> Tensor | None:
    """Returns the same part's W in another layer, or None beyond either end of the model."""
    path = view.path.replace(f".{view.layer}.", f".{layer}.", 1)
    try:
        return weight_of(model.get_submodule(path), view.rows)
    except AttributeError:
        return None


def _site_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def _read_slices_whole(model: nn.Module) -> None:
    """Hands a language model's head its input as one block of memory, also after `unload`; results agree to rounding.

    After a prompt the head reads the last position of each row, a slice; PyTorch multiplies a slice with a frozen weight
    row by row, and copies the weight, the vocabulary's whole matrix, for each.
    """
    if model.can_generate():  # type: ignore[operator]
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        hook_once(head, _contiguous)


def _contiguous(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a.contiguous() for a in args)


def _train_in_fp32(head: nn.Module) -> None:
    """Casts a head, and whatever it is given, to fp32."""
    if next(head.parameters()).dtype != torch.float32:
        head.float()
        head.register_forward_pre_hook(lambda module, args: tuple(a.float() for a in args))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
