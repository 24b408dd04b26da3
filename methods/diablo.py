"""DiaBlo: the blocks along the diagonal train, in full.

    W' = W + blkdiag(D_1, …, D_N)

| symbol | shape         | start      | trained |
| ------ | ------------- | ---------- | ------- |
| W      | (n, k)        | pretrained | no      |
| D      | (N, n/N, k/N) | 0          | yes     |

Trainable: n k / N per weight; on a square weight N = k / 2r has as many as LoRA of rank r. W' = W at the start because
D = 0. rank(ΔW) <= min(n, k), and with one block ΔW is any matrix.

Source: Gurses et al., "DiaBlo: Diagonal Blocks Are Sufficient For Finetuning", ICLR 2026, arXiv 2506.03230 (the update,
its start and that nothing scales it).
Reference code: ziyangjoy/DiaBlo @ 83ffb6c, diablo/block_linear.py (block_A, whose blocks are transposed to ours).
Differences: where N divides no side the reference takes ⌈n/N⌉ x ⌈k/N⌉ blocks, as many as cover the longer side, parts of
which lie outside the weight; here N must divide both. It keeps D in the base's dtype, here D is fp32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.plugin import DoesNotFit, Method, Site, UserError, register_method


@dataclass(frozen=True, kw_only=True)
class DiaBloConfig:
    N: int = 64
    """Number of blocks."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""

    def __post_init__(self) -> None:
        if self.N < 1:
            raise UserError(f"diablo: N must be >= 1, got N={self.N}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"diablo: dropout must be in [0, 1), got dropout={self.dropout}")


@register_method(config=DiaBloConfig)
class DiaBlo(Method):
    default_lr = 5e-3
    examples = ({"N": 4}, {"N": 1}, {"N": 8})

    def __init__(self, in_features: int, out_features: int, cfg: DiaBloConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.D = nn.Parameter(torch.empty(cfg.N, out_features // cfg.N, in_features // cfg.N))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.D)

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + torch.block_diag(*self.D)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias + [x_g D_gᵀ], one batched product on the pieces x_g of x̃."""
        N, rows, columns = self.D.shape
        pieces = F.dropout(x, self.cfg.dropout, self.training).reshape(-1, N, columns).transpose(0, 1)
        y = F.linear(x, W, bias).view(-1, N, rows).transpose(0, 1)
        y = torch.baddbmm(y, pieces, self.D.to(x.dtype).mT)
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: DiaBloConfig) -> None:
        if in_features % cfg.N or out_features % cfg.N:
            shape = (out_features, in_features)
            raise DoesNotFit(cls, cfg, "N", "must divide in_features and out_features", shape, divides=shape)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: DiaBloConfig) -> int:
        return in_features * out_features // cfg.N
