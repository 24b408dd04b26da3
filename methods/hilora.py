"""HiLoRA: a Hadamard update and a low-rank update side by side.

    W' = W + W ⊙ (A B) + s L1 L2

| symbol | shape   | start      | trained |
| ------ | ------- | ---------- | ------- |
| W      | (n, k)  | pretrained | no      |
| A      | (n, r1) | 0          | yes     |
| B      | (r1, k) | U(±1/√k)   | yes     |
| L1     | (n, r2) | 0          | yes     |
| L2     | (r2, k) | U(±1/√k)   | yes     |

Trainable: (r1 + r2) (n + k) per weight. W' = W at the start because A = 0 and L1 = 0. rank(ΔW) <= min(rank(W) r1 + r2, n, k).
r2 = 0 is HiRA; r1 = 0 is LoRA with scaling s.

Source: Huang et al., "HiRA", ICLR 2025, section 6.6 (r1 + r2 = 32).
Reference code: none was published. The paper does not state the low-rank part's scaling, start or dropout: here s is a
field (1 by default, so that both parts train at one learning rate), the start is LoRA's, and there is no dropout.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from highrank.methods.hira import hadamard_linear
from torch import Tensor, nn

from highrank.plugin import Method, Site, UserError, kaiming_uniform_, register_method


@dataclass(frozen=True, kw_only=True)
class HiLoRAConfig:
    r1: int = 16
    """Rank of the Hadamard part's A B; 0 leaves that part out."""
    r2: int = 16
    """Rank of the additive part L1 L2; 0 leaves that part out."""
    s: float = 1.0
    """Scaling of the additive part."""

    def __post_init__(self) -> None:
        for name, rank in (("r1", self.r1), ("r2", self.r2)):
            if rank < 0:
                raise UserError(f"hilora: {name} must be >= 0, got {name}={rank}")
        if self.r1 + self.r2 == 0:
            raise UserError("hilora: r1 and r2 must not both be 0, got r1=0, r2=0")
        if self.s == 0:
            raise UserError("hilora: s must not be 0, got s=0; to leave out the additive part set r2=0")


@register_method(config=HiLoRAConfig)
class HiLoRA(Method):
    default_lr = 2e-3
    examples = ({"r1": 2, "r2": 2}, {"r1": 2, "r2": 3, "s": 0.5}, {"r1": 0, "r2": 3, "s": 0.5}, {"r1": 3, "r2": 0})

    def __init__(self, in_features: int, out_features: int, cfg: HiLoRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        if cfg.r1:
            self.A = nn.Parameter(torch.empty(out_features, cfg.r1))
            self.B = nn.Parameter(torch.empty(cfg.r1, in_features))
        if cfg.r2:
            self.L1 = nn.Parameter(torch.empty(out_features, cfg.r2))
            self.L2 = nn.Parameter(torch.empty(cfg.r2, in_features))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        if self.cfg.r1:
            nn.init.zeros_(self.A)
            kaiming_uniform_(self.B)
        if self.cfg.r2:
            nn.init.zeros_(self.L1)
            kaiming_uniform_(self.L2)

    def effective_weight(self, W: Tensor) -> Tensor:
        hadamard = W * (self.A @ self.B) if self.cfg.r1 else 0
        additive = self.cfg.s * (self.L1 @ self.L2) if self.cfg.r2 else 0
        return W + hadamard + additive

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """HiRA's product and two thin ones share x."""
        y = hadamard_linear(x, W, self.A, self.B, bias, self.cached) if self.cfg.r1 else F.linear(x, W, bias)
        if not self.cfg.r2:
            return y
        L1, L2 = (self.cfg.s * self.L1).to(x.dtype), self.L2.to(x.dtype)
        return y + F.linear(F.linear(x, L2), L1)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: HiLoRAConfig) -> int:
        return (cfg.r1 + cfg.r2) * (in_features + out_features)
