"""MiSS: one small matrix, tiled along the weight (earlier called Bone).

    plain:  W' = W + [Dᵀ Dᵀ ... Dᵀ]              (Dᵀ is n x r; the last tile is cut where r does not divide k)
    mini:   W' = W + the same of D next to itself n / mini_r times
    bat:    W'_ij = W_ij + W_ij D_i + D_i        (W in blocks W_ij of r x r)

| symbol | shape                                                      | start      | trained |
| ------ | ---------------------------------------------------------- | ---------- | ------- |
| W      | (n, k)                                                     | pretrained | no      |
| D      | (r, n); mini: (r, mini_r); bat: n/r matrices, (n/r, r, r)  | 0          | yes     |

Trainable: r n per weight (LoRA of rank r has r (n + k)), mini r mini_r. W' = W at the start because D = 0. rank(ΔW) <= r,
mini <= min(r, mini_r), bat up to min(n, k). Plain is LoRA with B = Dᵀ and a frozen A = [I I ... I].

Source: Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", arXiv 2409.15371
(version 12), section 4.2 (the efficient form, eqs. 4-7). mini and bat, the block affine transformation of the paper's
first versions, are as in the reference code.
Reference code: huggingface/peft 0.21, tuners/miss/layer.py (miss_block = D, init_weights = True, "mini" or "bat").
Differences: PEFT's dropout is ignored by bat; here it is refused there. PEFT keeps several (n, k) matrices of bat for
backward; here W' is built again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.kernels import rebuilt_linear
from highrank.plugin import DoesNotFit, Method, PeftForm, Site, UserError, register_method

TYPES = ("plain", "mini", "bat")


@dataclass(frozen=True, kw_only=True)
class MiSSConfig:
    r: int = 64
    """Inputs per tile."""
    type: str = "plain"
    """plain; mini, tiled along the outputs too; or bat, whose update depends on W."""
    mini_r: int = 1
    """Outputs per tile, for type=mini."""
    dropout: float = 0.0
    """Probability of dropping an input of the update; not for type=bat."""

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise UserError(f"miss: type must be one of {', '.join(TYPES)}, got type={self.type}")
        for name in ("r", "mini_r"):
            if getattr(self, name) < 1:
                raise UserError(f"miss: {name} must be >= 1, got {name}={getattr(self, name)}")
        if self.type != "mini" and self.mini_r != 1:
            raise UserError(f"miss: mini_r belongs to type=mini, got mini_r={self.mini_r} with type={self.type}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"miss: dropout must be in [0, 1), got dropout={self.dropout}")
        if self.type == "bat" and self.dropout:
            raise UserError(
                f"miss: dropout acts on the inputs of an update beside W, got dropout={self.dropout} with type=bat"
            )


def _as_computed(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """PEFT takes mini_r with every type, and a dropout with bat, and does not use them."""
    unused: Mapping[str, Mapping[str, Any]] = {"plain": {"mini_r": 1}, "mini": {}, "bat": {"mini_r": 1, "dropout": 0.0}}
    return {**fields, **unused[fields["type"]]}


@register_method(config=MiSSConfig)
class MiSS(Method):
    default_lr = 5e-4
    examples = (
        {"r": 4},
        {"r": 7},
        {"r": 4, "type": "mini", "mini_r": 8},
        {"r": 4, "type": "bat"},
        {"r": 8, "type": "bat"},
    )
    peft = PeftForm(
        type="MISS",
        fields={"r": "r", "type": "init_weights", "mini_r": "mini_r", "dropout": "miss_dropout"},
        values={"type": {"plain": True, "mini": "mini", "bat": "bat"}},
        tensors={"D": "miss_block"},
        linear_only=True,
        read=_as_computed,
    )

    def __init__(self, in_features: int, out_features: int, cfg: MiSSConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        shapes = {
            "plain": (cfg.r, out_features),
            "mini": (cfg.r, cfg.mini_r),
            "bat": (out_features // cfg.r, cfg.r, cfg.r),
        }
        self.D = nn.Parameter(torch.empty(shapes[cfg.type]))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.D)

    def effective_weight(self, W: Tensor) -> Tensor:
        if self.cfg.type == "bat":
            return W + _update(W, self.D)
        tiles, copies = -(-self.in_features // self.cfg.r), self.out_features // self.D.shape[1]
        return W + self.D.T.repeat(copies, tiles)[:, : self.in_features]

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias + s D, s the sum of x̃ over tiles; bat is one dense product with W', built again in backward."""
        if self.cfg.type == "bat":
            return rebuilt_linear(x, W, _update, _gradients, [W, self.D], bias, self.cached)
        y, update = F.linear(x, W, bias), F.linear(self._summed(x), self.D.T.to(x.dtype))
        if self.cfg.type == "plain":
            return y + update
        return (y.unflatten(-1, (-1, self.cfg.mini_r)) + update.unsqueeze(-2)).flatten(-2)

    def _summed(self, x: Tensor) -> Tensor:
        """Returns the sum over the tiles of x̃, (..., r)."""
        x, r = F.dropout(x, self.cfg.dropout, self.training), self.cfg.r
        tiled = self.in_features - self.in_features % r
        total = x[..., :tiled].unflatten(-1, (-1, r)).sum(-2)
        return total if tiled == self.in_features else total + F.pad(x[..., tiled:], (0, r + tiled - self.in_features))

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: MiSSConfig) -> None:
        shape = (out_features, in_features)
        if cfg.type == "bat" and (in_features % cfg.r or out_features % cfg.r):
            rule = "must divide in_features and out_features for type=bat"
            raise DoesNotFit(cls, cfg, "r", rule, shape, divides=shape)
        if cfg.r > in_features:
            raise DoesNotFit(cls, cfg, "r", "must be <= in_features", shape, most=in_features)
        if out_features % cfg.mini_r:
            raise DoesNotFit(cls, cfg, "mini_r", "must divide out_features", shape, divides=(out_features,))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: MiSSConfig) -> int:
        return cfg.r * (cfg.mini_r if cfg.type == "mini" else out_features)


def _update(W: Tensor, D: Tensor) -> Tensor:
    """Returns W_ij D_i + D_i for all blocks, (n, k)."""
    r = D.shape[-1]
    turned = torch.bmm(W.to(D.dtype).reshape(len(D), -1, r), D)
    return turned.view(len(D), r, -1, r).add_(D.unsqueeze(2)).view(W.shape)


def _gradients(G: Tensor, W: Tensor, D: Tensor) -> tuple[None, Tensor]:
    """∂D_i = Σ_j W_ijᵀ G_ij + G_ij."""
    r = D.shape[-1]
    rows = W.to(D.dtype).reshape(len(D), -1, r)
    return None, torch.bmm(rows.mT, G.reshape(len(D), -1, r)) + G.view(len(D), r, -1, r).sum(2)
