"""Compacter: bottleneck adapters whose two matrices are sums of Kronecker products.

    A(h) = s (U f(D h + c) + e), Dᵀ = Σ_i A_i ⊗ (Ds_i Dt_iᵀ), Uᵀ = Σ_i A_i ⊗ (Us_i Ut_iᵀ), i = 1 … n

    form=houlsby      attention and feed-forward return h + A(h) in the place of h, each before it is added to the residual
    form=feedforward  the feed-forward alone does so (Compacter++)
    form=parallel     the feed-forward returns FFN(x) + A(x)

| symbol | shape     | start                 | trained                 |
| ------ | --------- | --------------------- | ----------------------- |
| A      | (n, n, n) | N(0, 1e-4²)           | yes, once for the model |
| Ds     | (n, d/n)  | U(±√(12 / (d/n + 1))) | yes                     |
| Dt     | (n, m/n)  | U(±√(12 / (m/n + 1))) | yes                     |
| c      | (m,)      | 0                     | yes                     |
| Us     | (n, m/n)  | U(±√(12 / (m/n + 1))) | yes                     |
| Ut     | (n, d/n)  | U(±√(12 / (d/n + 1))) | yes                     |
| e      | (d,)      | 0                     | yes                     |

d is the model's width and m = d / reduction; n divides both. The A_i are shared by every D and U of the model (the "slow"
weights), the rank-one factors are each adapter's own (the "fast" ones).

Trainable: 2 (d + m) + m + d per adapter, of which a block has two (houlsby) or one, and n³ per model. The output is the
base's at the start up to the rounding of fp32, since A(h) is about 1e-8 h where d is some hundreds. It depends on activations,
so no weight can hold it. Compacter is `bottleneck` with such D and U, of rank n² at most.

Source: Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021, arXiv 2106.04647:
eq. 2 (the adapter; f is GELU), eqs. 3 and 4 (a sum of Kronecker products), eq. 5 (rank one, and A shared), section 4 (the
count, there without biases: 4 L (d + m) + n³ for L blocks).
Reference code: rabeehk/compacter, seq2seq/hypercomplex (phm_rule = A, W_left = s, W_right = t, configs/compacter.json: n = 4,
reduction 32, rate 3e-3); adapter-hub/adapters @ 88f18eb, methods/modeling.py (PHMLayer, whose s and t are normal, not uniform).
Differences: both codes make the d x m matrices in every step; here h, folded to (n, d/n), goes through the factors, n (d + m) +
n³ products a token in the place of d m. The paper trains the model's norms too. Its m of 24 to 96 is d / 32 to d / 8 of
T5-base; the default here is `bottleneck`'s d / 16, since n = 4 does not divide 1/32 of SmolLM2's 576.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from highrank.methods.bottleneck import ACTIVATIONS, BottleneckAdapters, BottleneckConfig, widths
from torch import Tensor, nn

from highrank.plugin import UserError, nearest_divisors, register_method


@dataclass(frozen=True, kw_only=True)
class CompacterConfig(BottleneckConfig):
    method: ClassVar[str] = "compacter"

    n: int = 4
    """Kronecker products in a sum, and the side of each A_i."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise UserError(f"compacter: n must be >= 1, got n={self.n}")


class KroneckerNetwork(nn.Module):
    """A, from d_in to d_out numbers."""

    def __init__(self, d_in: int, d_out: int, cfg: CompacterConfig):
        super().__init__()
        self.cfg, n, m = cfg, cfg.n, d_out // cfg.reduction
        self.Ds, self.Dt, self.c = _factor(n, d_in), _factor(n, m), nn.Parameter(torch.empty(m))
        self.Us, self.Ut, self.e = _factor(n, m), _factor(n, d_out), nn.Parameter(torch.empty(d_out))

    def forward(self, h: Tensor, A: Tensor) -> Tensor:
        s = self.cfg.s
        A, Ds, Dt, c, Us, Ut, e = (
            p.to(h.dtype) for p in (A, self.Ds, self.Dt, self.c, self.Us, s * self.Ut, s * self.e)
        )
        inner = ACTIVATIONS[self.cfg.activation](kronecker_linear(h, A, Ds, Dt) + c)
        return kronecker_linear(inner, A, Us, Ut) + e

    def start(self) -> None:
        for factor in (self.Ds, self.Dt, self.Us, self.Ut):
            bound = math.sqrt(12 / (factor.shape[1] + 1))
            nn.init.uniform_(factor, -bound, bound)
        for bias in (self.c, self.e):
            nn.init.zeros_(bias)

    @classmethod
    def num_trainable(cls, d_in: int, d_out: int, cfg: CompacterConfig) -> int:
        m = d_out // cfg.reduction
        return (d_in + m) + (m + d_out) + m + d_out


@register_method(config=CompacterConfig)
class Compacter(BottleneckAdapters):
    network = KroneckerNetwork
    default_lr = 1e-2
    examples = (
        {"reduction": 4},
        {"reduction": 2, "form": "parallel", "activation": "relu", "s": 4.0},
        {"reduction": 4, "form": "feedforward", "n": 2},
        {"reduction": 16, "n": 1},
    )

    def __init__(self, model: Any, cfg: CompacterConfig):
        super().__init__(model, cfg)
        self.A = nn.Parameter(torch.empty(cfg.n, cfg.n, cfg.n))

    def reset_parameters(self, model: Any, tokenizer: Any) -> None:
        nn.init.normal_(self.A, std=1e-4)
        super().reset_parameters(model, tokenizer)

    def output(self, key: str, h: Tensor) -> Tensor:
        output: Tensor = self.networks[key](h, self.A)
        return output

    @classmethod
    def validate(cls, model: Any, cfg: Any) -> None:
        super().validate(model, cfg)
        sizes = {size for d_in, d_out in widths(model, cfg) for size in (d_in, d_out, d_out // cfg.reduction)}
        if any(size % cfg.n for size in sizes):
            raise UserError(
                f"compacter: n must divide the widths of the model and of the bottleneck, got n={cfg.n} for "
                f"{', '.join(map(str, sorted(sizes)))}; the nearest that do: {nearest_divisors(cfg.n, *sizes)}"
            )

    @classmethod
    def takes(cls, m: int, cfg: Any) -> bool:
        return m % int(cfg.n) == 0

    @classmethod
    def num_trainable(cls, model: Any, cfg: Any) -> int:
        shared: int = cfg.n**3
        return super().num_trainable(model, cfg) + shared


def _factor(n: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(n, width // n))


def kronecker_linear(x: Tensor, A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Returns x Σ_i A_i ⊗ (s_i t_iᵀ), factor by factor: x (..., k), A (n, n, n), s (n, k/n), t (n, l/n); (..., l)."""
    folded = F.linear(x.unflatten(-1, (len(A), -1)), s)
    mixed = torch.einsum("...pi,ipq->...qi", folded, A)
    return (mixed @ t).flatten(-2)
