"""HyperAdapt: scale every row and every column of the weight.

    W' = diag(a) W diag(b) = W ⊙ (a bᵀ)

| symbol | shape  | start      | trained |
| ------ | ------ | ---------- | ------- |
| W      | (n, k) | pretrained | no      |
| a      | (n,)   | 1          | yes     |
| b      | (k,)   | 1          | yes     |

Trainable: n + k per weight. W' = W at the start because a = b = 1. rank(ΔW) <= min(2 rank(W), n, k), although only
n + k - 1 of the numbers count: (γ a, b / γ) is the same W' for every γ. This is HiRA of rank 2 with A = [a, -1] and
B = [bᵀ; 1ᵀ].

Ablations: with `sides` a or b the other vector is 1 and not there, so n or k numbers train and ΔW has rank up to rank(W); in
PEFT's HiRA it is written out. `init_std` draws a and b from N(1, init_std²), and W' differs from W at the start.

Source: "HyperAdapt: Simple High-Rank Adaptation", arXiv 2509.18629, section 3 (W' and Lemma 1, the rank bound).
Reference code: the listing in section 4 (diag_A = a as (n, 1), diag_B = b as (1, k)).
Differences: the listing has autograd keep W' and the product a bᵀ in each step, and fails on every bias (it tests a
tensor's truth value, or reads a field that was never set); here neither is kept, and a bias is added after a, unscaled.
Neither a nor b decays: their neutral value is 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.kernels import ScaledWeightLinear, row_scaled, scaled_weight, scales_weight
from highrank.plugin import Method, PeftForm, Site, UserError, later_field, register_method

SIDES = ("ab", "a", "b")


@dataclass(frozen=True, kw_only=True)
class HyperAdaptConfig:
    sides: str = later_field("ab")
    """Which vectors there are: ab, a (rows alone) or b (columns alone)."""
    init_std: float = later_field(0.0)
    """Standard deviation of their start around 1; at 0 it is exact."""

    def __post_init__(self) -> None:
        if self.sides not in SIDES:
            raise UserError(f"hyperadapt: sides must be one of {', '.join(SIDES)}, got sides={self.sides}")
        if self.init_std < 0:
            raise UserError(f"hyperadapt: init_std must be >= 0, got init_std={self.init_std}")


def _as_hira(a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
    return {"A": torch.stack([a, -torch.ones_like(a)], dim=1), "B": torch.stack([b, torch.ones_like(b)])}


@register_method(config=HyperAdaptConfig)
class HyperAdapt(Method):
    default_lr = 3e-3
    no_decay: tuple[str, ...] = ("a", "b")
    examples = ({"sides": "ab"}, {"sides": "a"}, {"sides": "b"})
    peft = PeftForm(
        type="HIRA",
        fixed={"r": 2},
        tensors={"A": "hira_B", "B": "hira_A"},
        factors=("A", "B"),
        one_way=True,
        converted=lambda adapter, p: _as_hira(
            p.get("a", torch.ones(adapter.out_features)), p.get("b", torch.ones(adapter.in_features))
        ),
    )

    def __init__(self, in_features: int, out_features: int, cfg: HyperAdaptConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.a = nn.Parameter(torch.empty(out_features)) if "a" in cfg.sides else None
        self.b = nn.Parameter(torch.empty(in_features)) if "b" in cfg.sides else None
        self.no_decay = tuple(cfg.sides)

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        for vector in self.parameters():
            nn.init.normal_(vector, 1.0, self.cfg.init_std)

    def effective_weight(self, W: Tensor) -> Tensor:
        scaled = W if self.a is None else self.a[:, None] * W
        return scaled if self.b is None else scaled * self.b

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """One dense product: y = a ⊙ (W (b ⊙ x)) + bias, both scalings in fp32 (in bf16, 1 + 0.003 is 1).

        The vectors act on activations, or on W where that is fewer numbers to touch, or where activations in 16 bits would
        be rounded back: of an update of 1e-3 a tenth would reach y, and half of it through W'.
        """
        if scales_weight(x, W, self.a, self.b):
            if x.dtype.itemsize < 4 and not torch.is_grad_enabled():
                return F.linear(x, self.cached("weight", W, lambda: scaled_weight(W, self.a, self.b)), bias)
            y = ScaledWeightLinear.apply(x.reshape(-1, x.shape[-1]), W, self.a, self.b, bias)
            return y.view(*x.shape[:-1], len(W))
        if self.b is not None:
            x = (self.b * x).to(x.dtype)
        return F.linear(x, W, bias) if self.a is None else row_scaled(F.linear(x, W), self.a, bias)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: HyperAdaptConfig) -> int:
        return ("a" in cfg.sides) * out_features + ("b" in cfg.sides) * in_features
