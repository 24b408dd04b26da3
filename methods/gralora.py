"""GraLoRA: a grid of low-rank blocks, each with factors of its own.

    W' = W + s [ΔW_ij], ΔW_ij = B_ij A_ij, i, j = 1 … K,    s = alpha / (r + hybrid_r)

with A_ij (r/K, k/K) and B_ij (n/K, r/K) for the block in the i-th rows and the j-th columns. A_j holds the A_ij of a column
of blocks, and B_i the B_ij of a row, next to each other. hybrid_r > 0 adds a LoRA of that rank, s L2 L1.

| symbol | shape         | start        | trained |
| ------ | ------------- | ------------ | ------- |
| W      | (n, k)        | pretrained   | no      |
| A      | (K, k/K, r)   | U(±1/√(k/K)) | yes     |
| B      | (K, r, n/K)   | 0            | yes     |
| L1     | (hybrid_r, k) | U(±1/√k)     | yes     |
| L2     | (n, hybrid_r) | 0            | yes     |

Trainable: (r + hybrid_r) (n + k) per weight, as many as LoRA of that rank has. W' = W at the start because B = L2 = 0.
rank(ΔW) <= K r + hybrid_r, K times LoRA's. With K = 1 GraLoRA is LoRA.

Source: Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", arXiv 2505.20355 (the
grid of K² adapters, and the hybrid with LoRA for low ranks).
Reference code: huggingface/peft 0.21, tuners/gralora/layer.py (gralora_A = A, gralora_B = B, gralora_A_general = L1,
gralora_B_general = L2).
Differences: alpha is 2 r unless given, as PEFT's 64 is of its r = 32. PEFT does not ask whether K divides r.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.plugin import (
    DoesNotFit,
    Method,
    PeftForm,
    Site,
    UserError,
    kaiming_uniform_,
    nearest_divisors,
    register_method,
)


@dataclass(frozen=True, kw_only=True)
class GraLoRAConfig:
    r: int = 32
    """Rank of the LoRA update with as many parameters; a block has rank r / K."""
    K: int = 2
    """Blocks along each side of the grid; the paper advises 4 for r >= 64."""
    hybrid_r: int = 0
    """Rank of a LoRA update beside the grid."""
    alpha: float | None = None
    """Numerator of the scaling alpha / (r + hybrid_r); default 2 r."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""

    def __post_init__(self) -> None:
        for name, least in (("r", 1), ("K", 1), ("hybrid_r", 0)):
            if getattr(self, name) < least:
                raise UserError(f"gralora: {name} must be >= {least}, got {name}={getattr(self, name)}")
        if self.r % self.K:
            near = nearest_divisors(self.K, self.r)
            raise UserError(f"gralora: K must divide r, got K={self.K} with r={self.r}; the nearest that do: {near}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"gralora: alpha must be > 0, got alpha={self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"gralora: dropout must be in [0, 1), got dropout={self.dropout}")

    @property
    def scaling(self) -> float:
        return (2 * self.r if self.alpha is None else self.alpha) / (self.r + self.hybrid_r)


@register_method(config=GraLoRAConfig)
class GraLoRA(Method):
    default_lr = 2e-3
    examples = ({"r": 2, "K": 2}, {"r": 4, "K": 4, "alpha": 3.0}, {"r": 4, "K": 2, "hybrid_r": 2}, {"r": 2, "K": 1})
    peft = PeftForm(
        type="GRALORA",
        fields={"r": "r", "K": "gralora_k", "hybrid_r": "hybrid_r", "alpha": "alpha", "dropout": "gralora_dropout"},
        computed={"alpha": lambda cfg: cfg.scaling * (cfg.r + cfg.hybrid_r)},
        tensors={
            "A": "gralora_A",
            "B": "gralora_B",
            "L1": "gralora_A_general.weight",
            "L2": "gralora_B_general.weight",
        },
    )

    def __init__(self, in_features: int, out_features: int, cfg: GraLoRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.A = nn.Parameter(torch.empty(cfg.K, in_features // cfg.K, cfg.r))
        self.B = nn.Parameter(torch.empty(cfg.K, cfg.r, out_features // cfg.K))
        if cfg.hybrid_r:
            self.L1 = nn.Parameter(torch.empty(cfg.hybrid_r, in_features))
            self.L2 = nn.Parameter(torch.empty(out_features, cfg.hybrid_r))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        kaiming_uniform_(self.A, self.A.shape[1])
        nn.init.zeros_(self.B)
        if self.cfg.hybrid_r:
            kaiming_uniform_(self.L1)
            nn.init.zeros_(self.L2)

    def effective_weight(self, W: Tensor) -> Tensor:
        q = self.cfg.r // self.cfg.K
        A, B = self.A.unflatten(2, (-1, q)), self.B.unflatten(1, (-1, q))  # A_ij at [j, :, i], B_ij at [i, j]
        delta = torch.einsum("jciq,ijqo->iojc", A, B).reshape(W.shape)
        if self.cfg.hybrid_r:
            delta = delta + self.L2 @ self.L1
        return W + self.cfg.scaling * delta

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two batched thin products: x_j by the A_ij of all rows i of the grid, these summed over j by B_ij."""
        K, r = self.cfg.K, self.cfg.r
        columns = F.dropout(x, self.cfg.dropout, self.training).reshape(-1, K, self.in_features // K).transpose(0, 1)
        h = torch.bmm(columns, self.A.to(x.dtype)).view(K, -1, K, r // K).permute(2, 1, 0, 3).flatten(2)
        rows = F.linear(x, W, bias).view(-1, K, self.out_features // K).transpose(0, 1)
        y = torch.baddbmm(rows, h, self.B.to(x.dtype), alpha=self.cfg.scaling)
        y = y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        if self.cfg.hybrid_r:
            h = F.linear(F.dropout(x, self.cfg.dropout, self.training), self.L1.to(x.dtype))
            y = y + F.linear(h, (self.cfg.scaling * self.L2).to(x.dtype))
        return y

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: GraLoRAConfig) -> None:
        if in_features % cfg.K or out_features % cfg.K:
            shape = (out_features, in_features)
            raise DoesNotFit(cls, cfg, "K", "must divide in_features and out_features", shape, divides=shape)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: GraLoRAConfig) -> int:
        return (cfg.r + cfg.hybrid_r) * (in_features + out_features)
