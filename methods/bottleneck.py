"""Bottleneck adapters: a small network after each sub-layer, or beside the feed-forward.

    A(h) = s (U f(D h + c) + e)

    form=houlsby      attention and feed-forward return h + A(h) in the place of h, each before it is added to the residual
    form=feedforward  the feed-forward alone does so
    form=parallel     the feed-forward returns FFN(x) + A(x)

| symbol | shape  | start    | trained |
| ------ | ------ | -------- | ------- |
| D      | (m, d) | U(±1/√d) | yes     |
| c      | (m,)   | 0        | yes     |
| U      | (d, m) | 0        | yes     |
| e      | (d,)   | 0        | yes     |

d is the model's width and m = d / reduction. Trainable: 2 d m + m + d per adapter, of which a block has two (houlsby) or one.
The output is the base's at the start because U = 0. It depends on activations, so no weight can hold it.

Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.1 (after the projection
back to the model's width, before the skip connection); He et al., "Towards a Unified View of Parameter-Efficient Transfer
Learning", arXiv 2110.04366, section 3.2 (parallel; its scaled form has s = 4).
Reference code: adapter-hub/adapters @ 88f18eb, configuration/adapter_config.py (double_seq_bn, par_bn).
Differences: Houlsby's D and U start near 0, so that the output is near the base's; here U = 0 makes it the base's. Beside a
feed-forward, A reads what that reads, which is behind the norm in models that norm first; adapters' par_bn reads the
residual stream before that norm.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from highrank.model.placement import EXPERTS, WeightView, resolve
from highrank.plugin import UserError, WholeModelMethod, kaiming_uniform_, nearest_divisors, register_method

FORMS = {"houlsby": ("o", "down"), "feedforward": ("down",), "parallel": ("up", "down")}
"""The parts of a block by which an adapter finds its place: at the output of each; or from the input of up to that of down."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    method: ClassVar[str] = "bottleneck"

    form: str = "houlsby"
    """Where adapters are: houlsby (after attention and feed-forward), feedforward (after it) or parallel (beside it)."""
    reduction: int = 16
    """The model's width over that of the bottleneck."""
    activation: str = "gelu"
    """f: gelu, relu, silu or tanh."""
    s: float = 1.0
    """Scaling of what an adapter adds."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"{self.method}: form must be one of {', '.join(FORMS)}, got form={self.form}")
        if self.reduction < 1:
            raise UserError(f"{self.method}: reduction must be >= 1, got reduction={self.reduction}")
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"{self.method}: activation must be one of {', '.join(ACTIVATIONS)}, got activation={self.activation}"
            )
        if self.s == 0:
            raise UserError(f"{self.method}: s must not be 0, got s=0; nothing would train")


class Network(nn.Module):
    """A, from d_in to d_out numbers."""

    def __init__(self, d_in: int, d_out: int, cfg: BottleneckConfig):
        super().__init__()
        m = d_out // cfg.reduction
        self.cfg = cfg
        self.D, self.c = nn.Parameter(torch.empty(m, d_in)), nn.Parameter(torch.empty(m))
        self.U, self.e = nn.Parameter(torch.empty(d_out, m)), nn.Parameter(torch.empty(d_out))

    def forward(self, h: Tensor) -> Tensor:
        D, c, U, e = (p.to(h.dtype) for p in (self.D, self.c, self.cfg.s * self.U, self.cfg.s * self.e))
        return F.linear(ACTIVATIONS[self.cfg.activation](F.linear(h, D, c)), U, e)

    def start(self) -> None:
        kaiming_uniform_(self.D)
        for parameter in (self.c, self.U, self.e):
            nn.init.zeros_(parameter)

    @classmethod
    def num_trainable(cls, d_in: int, d_out: int, cfg: BottleneckConfig) -> int:
        return (d_in + d_out + 1) * (d_out // cfg.reduction) + d_out


@register_method(config=BottleneckConfig)
class BottleneckAdapters(WholeModelMethod):
    network: ClassVar[Any] = Network
    default_lr = 3.2e-3
    examples: ClassVar[Any] = (
        {"reduction": 4},
        {"reduction": 2, "form": "parallel", "activation": "relu", "s": 4.0},
        {"reduction": 16, "activation": "tanh"},
        {"reduction": 8, "form": "feedforward"},
    )

    def __init__(self, model: Any, cfg: BottleneckConfig):
        super().__init__(model, cfg)
        self.networks = nn.ModuleDict(
            {
                _key(last): self.network(_input(first, cfg), last.out_features, cfg)
                for first, last in _places(model, cfg)
            }
        )
        self._read: dict[str, Tensor] = {}
        """What the feed-forwards that are being computed were given."""

    def reset_parameters(self, model: Any, tokenizer: Any) -> None:
        networks: Any = self.networks.values()
        for network in networks:
            network.start()

    def hooks(self, model: Any) -> list[RemovableHandle]:
        handles = []
        for first, last in _places(model, self.cfg):
            key = _key(last)
            if self.cfg.form == "parallel":
                handles.append(model.get_submodule(first.path).register_forward_pre_hook(partial(self._reads, key)))
            handles.append(model.get_submodule(last.path).register_forward_hook(partial(self._adds, key)))
        return handles

    def _reads(self, key: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._read[key] = args[0]

    def _adds(self, key: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return y + self.output(key, self._read.pop(key, y)).to(y.dtype)

    def output(self, key: str, h: Tensor) -> Tensor:
        """Returns A(h) of one of the networks."""
        output: Tensor = self.networks[key](h)
        return output

    @classmethod
    def validate(cls, model: Any, cfg: BottleneckConfig) -> None:
        d = math.gcd(*(d_out for _, d_out in widths(model, cfg)))
        if d % cfg.reduction:
            near = nearest_divisors(cfg.reduction, d, takes=lambda r: cls.takes(d // r, cfg))
            raise UserError(
                f"{cfg.method}: reduction must divide the model's width {d}, got reduction={cfg.reduction}; "
                + (f"the nearest that do: {near}" if near else "none does")
            )

    @classmethod
    def takes(cls, m: int, cfg: Any) -> bool:
        """Whether a network's width m suits the other fields."""
        return True

    @classmethod
    def sites(cls, model: Any, cfg: BottleneckConfig) -> dict[str, int]:
        places = list(_places(model, cfg))
        if cfg.form == "parallel":
            return {"beside feed-forwards": len(places)}
        return {
            f"after {what}": sum(last.part == part for _, last in places)
            for part, what in (("o", "attention"), ("down", "feed-forwards"))
            if part in FORMS[cfg.form]
        }

    @classmethod
    def num_trainable(cls, model: Any, cfg: BottleneckConfig) -> int:
        return sum(cls.network.num_trainable(d_in, d_out, cfg) for d_in, d_out in widths(model, cfg))


def widths(model: Any, cfg: BottleneckConfig) -> list[tuple[int, int]]:
    """Returns for each adapter how many numbers it reads and how many it adds to."""
    return [(_input(first, cfg), last.out_features) for first, last in _places(model, cfg)]


def _places(model: Any, cfg: BottleneckConfig) -> Iterator[tuple[WeightView, WeightView]]:
    """Yields for each adapter the layer in front of which it reads, where it stands beside, and the one behind which it adds.

    Raises:
        UserError: for a model whose blocks are not known, or whose feed-forwards are experts.
    """
    parts, kind = FORMS[cfg.form], model.config.model_type
    if _resolved(model, [EXPERTS]):
        raise UserError(f"{cfg.method}: a feed-forward must be one of its own, got the experts of model_type={kind}")
    views = _resolved(model, parts)
    if not views:
        raise UserError(
            f"{cfg.method}: blocks need known layers {' and '.join(parts)}, got none in model_type={kind}; use a method that "
            "acts on weights, with architecture={blocks: ..., q: ...}"
        )
    if cfg.form != "parallel":
        yield from ((view, view) for view in views)
        return
    first = {view.layer: view for view in views if view.part == "up"}
    yield from ((first[view.layer], view) for view in views if view.part == "down" and view.layer in first)


def _resolved(model: Any, parts: Any) -> list[WeightView]:
    try:
        return resolve(model, list(parts), fused="split")
    except UserError:
        return []


def _input(first: WeightView, cfg: BottleneckConfig) -> int:
    return first.in_features if cfg.form == "parallel" else first.out_features


def _key(view: WeightView) -> str:
    """A module's name holds no dots."""
    return view.path.replace(".", "/")
