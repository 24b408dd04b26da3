"""HyperAdapt: scale every row and every column of the weight.

    W' = diag(a) W diag(b) = W ⊙ (a bᵀ)

| symbol | shape  | start      | trained |
| ------ | ------ | ---------- | ------- |
| W      | (n, k) | pretrained | no      |
| a      | (n,)   | 1          | yes     |
| b      | (k,)   | 1          | yes     |

Trainable: n + k per weight. W' = W at the start because a = b = 1. ΔW has rank up to min(2 rank(W), n, k) although only
n + k - 1 of the numbers count: (γ a, b / γ) is the same W' for every γ. This is HiRA of rank 2 with A = [a, -1] and
B = [bᵀ; 1ᵀ].

Source: "HyperAdapt: Simple High-Rank Adaptation", arXiv 2509.18629, section 3 (W' and Lemma 1, the rank bound).
Reference code: the listing in section 4 (diag_A = a as (n, 1), diag_B = b as (1, k)).
Differences: the listing has autograd keep W' and the product a bᵀ in each step, and fails on every bias (it tests a
tensor's truth value, or reads a field that was never set); here neither is kept, and a bias is added after a, unscaled.
Neither a nor b decays: their neutral value is 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.kernels import ScaledWeightLinear, row_scaled, scaled_weight, scales_weight
from highrank.plugin import Method, PeftForm, Site, register_method


@dataclass(frozen=True, kw_only=True)
class HyperAdaptConfig:
    """There is nothing to set."""


@register_method(config=HyperAdaptConfig)
class HyperAdapt(Method):
    default_lr = 3e-3
    no_decay = ("a", "b")
    peft = PeftForm(
        type="HIRA",
        fixed={"r": 2},
        tensors={"A": "hira_B", "B": "hira_A"},
        factors=("A", "B"),
        one_way=True,
        converted=lambda p: {
            "A": torch.stack([p["a"], -torch.ones_like(p["a"])], dim=1),
            "B": torch.stack([p["b"], torch.ones_like(p["b"])]),
        },
    )

    def __init__(self, in_features: int, out_features: int, cfg: HyperAdaptConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.a = nn.Parameter(torch.empty(out_features))
        self.b = nn.Parameter(torch.empty(in_features))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.ones_(self.a)
        nn.init.ones_(self.b)

    def effective_weight(self, W: Tensor) -> Tensor:
        return self.a[:, None] * W * self.b

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
        return row_scaled(F.linear((self.b * x).to(x.dtype), W), self.a, bias)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: HyperAdaptConfig) -> int:
        return in_features + out_features
