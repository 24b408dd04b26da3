"""Sum: several methods on one weight, their updates added.

    W' = W + Σ_i ΔW_i,    ΔW_i = W'_i - W

| symbol | shape  | start            | trained |
| ------ | ------ | ---------------- | ------- |
| W      | (n, k) | pretrained       | no      |
| ΔW_i   | (n, k) | that of part i   | by what part i trains |

Trainable: what the parts train, together. W' = W at the start if it is for each part. rank(ΔW) <= the sum of the parts'.
One part is that method; hira and lora are HiLoRA (with R = W and s = alpha / r); hyperadapt and lora scale the rows and
columns of W and add a low-rank update.

    method=sum parts=[hyperadapt,lora] parts.lora.r=8

Source: none of its own; HiLoRA is the case that Huang et al., "HiRA", ICLR 2025, section 6.6, compare.
Parts whose ΔW x needs no dense product (LoRA's) are added to what the others compute. Is there one other part, it computes
the one dense product in its own way. Are there more, W + Σ ΔW_i is built, once forward and once more in backward: three
dense products (four on a 16-bit base, where ΔW x stays apart), and x alone is kept.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from highrank.model.kernels import in_compute_dtype, is_added_apart, updated_linear
from highrank.plugin import Method, Site, UserError, dataclass_from, load, register_method


@dataclass(frozen=True, kw_only=True)
class SumConfig:
    parts: Any = field(metadata={"methods": True})
    """The methods, as a list, or each with its own fields: {hira: {r: 8}, lora: {r: 8}}; in words parts.hira.r=8."""

    def __post_init__(self) -> None:
        given = self.parts
        if not isinstance(given, Mapping):
            if isinstance(given, str) or not isinstance(given, Sequence) or len(set(map(str, given))) < len(given):
                raise UserError(f"sum: parts is a list of different methods, got parts={given}; e.g. [hyperadapt,lora]")
            given = {str(name): {} for name in given}
        if not given:
            raise UserError("sum: at least one part is needed, got parts=[]; e.g. parts=[hyperadapt,lora]")
        object.__setattr__(self, "parts", {str(name): _config(str(name), fields) for name, fields in given.items()})
        main = _main(self.parts)
        dropped = [name for name in main if getattr(self.parts[name], "dropout", 0)]
        if dropped and len(main) > 1:
            raise UserError(
                f"sum: dropout needs a part that computes its ΔW x apart, got parts.{dropped[0]}.dropout="
                f"{self.parts[dropped[0]].dropout} beside {main[main[0] == dropped[0]]}; leave it out"
            )


def _config(name: str, fields: Any) -> Any:
    try:
        method: Any = load("methods", name)
    except UserError as error:
        problem, _, near = str(error).partition("; ")
        if "unknown name" not in problem:  # a plugin of one's own that fails says why
            raise
        raise UserError(f"sum: a part is a method, got parts={name}; {near}") from error
    if method.family is not Method.family or name == "sum":
        raise UserError(f"sum: a part changes a weight that stays as it is, and is no sum itself, got parts={name}")
    if not isinstance(fields, Mapping | method.config):
        raise UserError(f"sum: a part's fields are given by name, got parts.{name}={fields}; e.g. parts.{name}={{}}")
    if not isinstance(fields, Mapping):
        return fields
    return dataclass_from(method.config, {str(key): value for key, value in fields.items()}, name)


def _main(parts: Mapping[str, Any]) -> list[str]:
    """Returns the parts that compute with W, beside which the others add their ΔW x; the first if none needs to."""
    main = [name for name in parts if load("methods", name).added is Method.added]  # type: ignore[attr-defined]  # a plugin's class
    return main or list(parts)[:1]


def _parts(cfg: SumConfig) -> dict[str, tuple[Any, Any]]:
    """Returns each part's class and config."""
    return {name: (load("methods", name), fields) for name, fields in cfg.parts.items()}


@register_method(config=SumConfig)
class Sum(Method):
    default_lr = 2e-3
    examples = (
        {"parts": {"hira": {"r": 2}, "lora": {"r": 3, "alpha": 1.5}}},
        {"parts": ["hyperadapt", "lora"]},
        {"parts": {"hira": {"r": 2}, "vera": {"r": 4}, "hyperadapt": {}, "lora": {"r": 2}}},
        {"parts": {"lora": {"r": 2}}},
    )

    def __init__(self, in_features: int, out_features: int, cfg: SumConfig, shared: Any = None):
        super().__init__(in_features, out_features, cfg, shared)
        of = {name: shared[name] if shared is not None and name in shared else None for name in cfg.parts}
        parts = {name: cls(in_features, out_features, fields, of[name]) for name, (cls, fields) in _parts(cfg).items()}
        self.parts: Any = Parts(parts)
        self.main = _main(cfg.parts)
        self.no_decay = tuple(f"parts.{name}.{key}" for name, part in parts.items() for key in part.no_decay)
        self.lr_factors = {f"parts.{n}.{key}": by for n, part in parts.items() for key, by in part.lr_factors.items()}

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        for part in self.parts.values():
            part.reset_parameters(W, site)

    def effective_weight(self, W: Tensor) -> Tensor:
        first, *others = self.parts
        effective: Tensor = self.parts[first].effective_weight(W)
        return effective + self.parts(W, others) if others else effective

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.parts[self.main[0]](x, W, bias) if len(self.main) == 1 else self._built(x, W, bias)
        for name, part in self.parts.items():
            if name not in self.main:
                y = y + part.added(x)
        return y

    def _built(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return updated_linear(x, W, lambda: self.parts(W, self.main), bias, self.cached)
        x, bias = in_compute_dtype(x, bias)
        named = {key: p for key, p in self.parts.named_parameters() if key.split(".")[0] in self.main}
        with torch.autocast(x.device.type, enabled=False):
            return SummedLinear.apply(x, W, bias, self.parts, self.main, list(named), *named.values())

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: SumConfig) -> None:
        for part, fields in _parts(cfg).values():
            part.validate(in_features, out_features, fields)

    @classmethod
    def exact_base(cls, cfg: SumConfig) -> bool:
        return any(part.exact_base(fields) for part, fields in _parts(cfg).values())

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: SumConfig) -> int:
        return sum(part.num_trainable(in_features, out_features, fields) for part, fields in _parts(cfg).values())

    @classmethod
    def num_frozen_extra(cls, in_features: int, out_features: int, cfg: SumConfig) -> int:
        return sum(part.num_frozen_extra(in_features, out_features, fields) for part, fields in _parts(cfg).values())

    @classmethod
    def num_frozen_shared(cls, shapes: Sequence[tuple[int, int]], cfg: SumConfig) -> int:
        return sum(part.num_frozen_shared(shapes, fields) for part, fields in _parts(cfg).values())

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, int]], cfg: SumConfig) -> nn.Module | None:
        made = {name: part.shared(shapes, fields) for name, (part, fields) in _parts(cfg).items()}
        held = {name: module for name, module in made.items() if module is not None}
        return nn.ModuleDict(held) if held else None


class Parts(nn.ModuleDict):
    def forward(self, W: Tensor, names: Sequence[str]) -> Tensor:
        """Returns Σ ΔW_i (n, k) of the named parts, in the wider of W's and the parameters' dtypes."""
        parts: dict[str, Any] = dict(self.items())
        total: Tensor = functools.reduce(torch.add, (parts[name].effective_weight(W) - W for name in names))
        return total


class SummedLinear(torch.autograd.Function):
    """y = x (W + ΔW)ᵀ + bias with ΔW = Σ ΔW_i, keeping only x: ΔW is built again in backward.

    With δ = ∂y: ∂x = δ (W + ΔW), and what ΔW is made of gets its gradient from δᵀ x. W is frozen and gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, parts: Any, main: Any, names: Any, *values: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W, *values)
        ctx.parts, ctx.main, ctx.names = parts, main, names
        delta = functional_call(parts, dict(zip(names, values, strict=True)), (W, main))
        if is_added_apart(x, W):
            return F.linear(x, W.to(x.dtype), bias) + F.linear(x, delta.to(x.dtype))
        return F.linear(x, (W + delta).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *values = ctx.saved_tensors
        needed = ctx.needs_input_grad[6:]
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            values = [value.detach().requires_grad_(need) for value, need in zip(values, needed, strict=True)]
            delta = functional_call(ctx.parts, dict(zip(ctx.names, values, strict=True)), (W, ctx.main))
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ (W + delta.detach()).to(dy.dtype)).view(x.shape)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        gradients: Iterator[Tensor] = iter(())
        if leaves := [value for value in values if value.requires_grad]:
            dW = (rows.T @ x.reshape(-1, x.shape[-1])).to(delta.dtype)
            gradients = iter(torch.autograd.grad(delta, leaves, dW))
        return dx, None, dbias, None, None, None, *(next(gradients) if need else None for need in needed)
