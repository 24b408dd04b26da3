"""ABBA: the Hadamard product of two low-rank matrices, both trained.

    W' = W + s (B1 A1) ⊙ (B2 A2)

| symbol | shape   | start                                                      | trained |
| ------ | ------- | ---------------------------------------------------------- | ------- |
| W      | (n, k)  | pretrained                                                 | no      |
| B1     | (n, r1) | U √Σ, with U Σ Vᵀ the best approximation of W of rank r1   | yes     |
| A1     | (r1, k) | √Σ Vᵀ                                                      | yes     |
| B2     | (n, r2) | 0                                                          | yes     |
| A2     | (r2, k) | U(±√(6/k))                                                 | yes     |

Trainable: (r1 + r2) (n + k) per weight, so r1 = r2 = r/2 has as many as LoRA of rank r. W' = W at the start because
B2 = 0. rank(ΔW) <= min(r1 r2, n, k): ABBA is a LoRA of rank r1 r2 whose factors are the Khatri-Rao products of the pairs.

Source: Singhal et al., "ABBA-Adapters: Efficient and Expressive Fine-Tuning of Foundation Models", ICLR 2026, arXiv
2505.14238 (the update; its Khatri-Rao form, which both compute; the start).
Reference code: CERT-Lab/abba @ 370d40c, abba.py (lora_A1, lora_B1, lora_A2, lora_B2; s = √(alpha1 alpha2), and its
scripts give both alpha = r: the default here).
Differences: the reference approximates the SVD by a randomised one without oversampling, here it is exact, of the
dequantised W on a quantised base; it keeps parameters in the base's dtype, here they are fp32. Its scripts give r to both
pairs, twice LoRA's parameters. Its dropout is never applied: there is none here. Past r1 r2 of about n k / 3 (n + k) the
update is built, which is then less work.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from highrank.model.kernels import hadamard_low_rank, hadamard_low_rank_linear
from highrank.plugin import DoesNotFit, Method, Site, UserError, register_method


@dataclass(frozen=True, kw_only=True)
class ABBAConfig:
    r1: int = 16
    """Rank of B1 A1, which starts as W's best approximation."""
    r2: int = 16
    """Rank of B2 A2, which starts at 0."""
    s: float | None = None
    """Scaling of the update; default √(r1 r2), as in the reference's scripts."""

    def __post_init__(self) -> None:
        for name in ("r1", "r2"):
            if getattr(self, name) < 1:
                raise UserError(f"abba: {name} must be >= 1, got {name}={getattr(self, name)}")
        if self.s is not None and self.s <= 0:
            raise UserError(f"abba: s must be > 0, got s={self.s}")

    @property
    def scaling(self) -> float:
        return math.sqrt(self.r1 * self.r2) if self.s is None else self.s


@register_method(config=ABBAConfig)
class ABBA(Method):
    default_lr = 3.2e-3
    examples = ({"r1": 1, "r2": 2}, {"r1": 4, "r2": 3, "s": 0.5}, {"r1": 1, "r2": 1, "s": 2.0})

    def __init__(self, in_features: int, out_features: int, cfg: ABBAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.B1 = nn.Parameter(torch.empty(out_features, cfg.r1))
        self.A1 = nn.Parameter(torch.empty(cfg.r1, in_features))
        self.B2 = nn.Parameter(torch.empty(out_features, cfg.r2))
        self.A2 = nn.Parameter(torch.empty(cfg.r2, in_features))

    @torch.no_grad()
    def reset_parameters(self, W: Tensor, site: Site) -> None:
        U, S, Vt = torch.linalg.svd(W.to(self.B1.dtype), full_matrices=False)
        root = S[: self.cfg.r1].sqrt()
        self.B1.copy_(U[:, : self.cfg.r1] * root)
        self.A1.copy_(root[:, None] * Vt[: self.cfg.r1])
        nn.init.zeros_(self.B2)
        nn.init.kaiming_uniform_(self.A2)

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + hadamard_low_rank(self.B1, self.A1, self.B2, self.A2, self.cfg.scaling)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias + s (x A*ᵀ) B*ᵀ with the Khatri-Rao products A* (r1 r2, k) and B* (n, r1 r2)."""
        factors = (self.B1, self.A1, self.B2, self.A2)
        return hadamard_low_rank_linear(x, W, factors, self.cfg.scaling, bias, self.cached)

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: ABBAConfig) -> None:
        shape = (out_features, in_features)
        if cfg.r1 > min(shape):
            raise DoesNotFit(cls, cfg, "r1", "must be <= min(out, in)", shape, most=min(shape))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: ABBAConfig) -> int:
        return (cfg.r1 + cfg.r2) * (in_features + out_features)
