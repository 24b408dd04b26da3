"""LoRA-XS: a small square matrix between W's frozen singular vectors.

    W' = W + s B R A,    s = alpha / r

| symbol | shape  | start                                       | trained |
| ------ | ------ | ------------------------------------------- | ------- |
| W      | (n, k) | pretrained, W = U Σ Vᵀ                      | no      |
| A      | (r, k) | Σ_r V_rᵀ, the r largest singular values     | no      |
| B      | (n, r) | U_r                                         | no      |
| R      | (r, r) | 0                                           | yes     |

Trainable: r² per weight, whatever its shape; frozen: r (n + k). W' = W at the start because R = 0. rank(ΔW) <= r, and
ΔW acts within the r leading singular directions alone. LoRA with A and B so chosen, of which R A or B R trains.

Source: Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604.
Reference code: MohammadrezaBanaei/LoRA-XS @ e50b1a8, utils/initialization_utils.py (default_lora_latent_mapping.weight = R).
Differences: there R starts from N(0, 1e-10), so W' is off by as little; the SVD is a randomised one, and A and B are saved.
Here it is exact, in fp64, each singular pair turned so that the largest entry of its u is positive, and is computed again
from W when an adapter is loaded: R means something beside this very W alone.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.plugin import DoesNotFit, Method, Site, UserError, register_method


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig:
    r: int = 32
    """Side of R, and rank of the update."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; default r."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lora_xs: r must be >= 1, got r={self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"lora_xs: alpha must be > 0, got alpha={self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora_xs: dropout must be in [0, 1), got dropout={self.dropout}")

    @property
    def s(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r


@register_method(config=LoRAXSConfig)
class LoRAXS(Method):
    default_lr = 2e-3
    examples = ({"r": 3}, {"r": 16, "alpha": 24.0})

    def __init__(self, in_features: int, out_features: int, cfg: LoRAXSConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.R = nn.Parameter(torch.empty(cfg.r, cfg.r))
        self.register_buffer("A", torch.empty(cfg.r, in_features), persistent=False)
        self.register_buffer("B", torch.empty(out_features, cfg.r), persistent=False)

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.R)
        U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
        U, S, Vt = U[:, : self.cfg.r], S[: self.cfg.r], Vt[: self.cfg.r]
        signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        self.B.copy_(U * signs)
        self.A.copy_(Vt * (S * signs[0])[:, None])

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + self.cfg.s * (self.B @ self.R @ self.A)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two thin products and a tiny one beside the frozen one; of the thin ones' factors none has a gradient."""
        return F.linear(x, W, bias) + self.added(x)

    def added(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.cfg.dropout, self.training), self.A.to(x.dtype))
        return F.linear(F.linear(low, (self.cfg.s * self.R).to(x.dtype)), self.B.to(x.dtype))

    @classmethod
    def exact_base(cls, cfg: LoRAXSConfig) -> bool:
        return True

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: LoRAXSConfig) -> None:
        shape = (out_features, in_features)
        if cfg.r > min(shape):
            raise DoesNotFit(cls, cfg, "r", "must be <= min(out, in)", shape, most=min(shape))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: LoRAXSConfig) -> int:
        return cfg.r**2

    @classmethod
    def num_frozen_extra(cls, in_features: int, out_features: int, cfg: LoRAXSConfig) -> int:
        return cfg.r * (in_features + out_features)
