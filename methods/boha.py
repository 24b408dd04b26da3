"""BoHA: the Hadamard product of W and a grid of blocks, each of low rank on its own.

    W' = W ⊙ (1 + M),    M = [A_ij B_ij], i, j = 1 … b

| symbol | shape            | start        | trained |
| ------ | ---------------- | ------------ | ------- |
| W      | (n, k)           | pretrained   | no      |
| A      | (b, b, n/b, r/b) | 0            | yes     |
| B      | (b, b, r/b, k/b) | U(±1/√(k/b)) | yes     |

A_ij and B_ij make the block in the i-th rows and the j-th columns.

Trainable: r (n + k) per weight, as many as LoRA and HiRA of rank r have. W' = W at the start because A = 0. rank(M) <= b r,
b times HiRA's, and rank(ΔW) <= min(n, k). With one block BoHA is HiRA.

Source: Yu et al., "BoHA: Blockwise Hadamard Product Adaptation for Parameter-Efficient Fine-Tuning", arXiv 2509.21637
(version 1 calls it BHRA; the blocks of one total rank are its definition).
Reference code: none that is public.
Differences: the start and the lack of a scaling are HiRA's, block by block, and the default of b is ours: we know none of
the paper's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from highrank.model.kernels import rebuilt_linear
from highrank.plugin import DoesNotFit, Method, Site, UserError, kaiming_uniform_, nearest_divisors, register_method


@dataclass(frozen=True, kw_only=True)
class BoHAConfig:
    r: int = 16
    """Rank of the LoRA update with as many parameters; a block has rank r / b."""
    b: int = 4
    """Blocks along each side of the grid."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"boha: r must be >= 1, got r={self.r}")
        if self.b < 1:
            raise UserError(f"boha: b must be >= 1, got b={self.b}")
        if self.r % self.b:
            near = nearest_divisors(self.b, self.r)
            raise UserError(f"boha: b must divide r, got b={self.b} with r={self.r}; the nearest that do: {near}")


@register_method(config=BoHAConfig)
class BoHA(Method):
    default_lr = 1.6e-2
    examples = ({"r": 2, "b": 2}, {"r": 8, "b": 4}, {"r": 2, "b": 1})

    def __init__(self, in_features: int, out_features: int, cfg: BoHAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        b = cfg.b
        self.A = nn.Parameter(torch.empty(b, b, out_features // b, cfg.r // b))
        self.B = nn.Parameter(torch.empty(b, b, cfg.r // b, in_features // b))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.A)
        kaiming_uniform_(self.B)

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + update(W, self.A, self.B)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        return rebuilt_linear(x, W, update, gradients, (W, self.A, self.B), bias, self.cached)

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: BoHAConfig) -> None:
        if in_features % cfg.b or out_features % cfg.b:
            shape = (out_features, in_features)
            raise DoesNotFit(cls, cfg, "b", "must divide in_features and out_features", shape, divides=shape)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: BoHAConfig) -> int:
        return cfg.r * (in_features + out_features)


def update(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Returns W ⊙ M, (n, k)."""
    return (A @ B).transpose(1, 2).reshape(W.shape) * W


def gradients(G: Tensor, W: Tensor, A: Tensor, B: Tensor) -> tuple[None, Tensor, Tensor]:
    """Returns those of A and B from G, the update's: with H = G ⊙ W, ∂A_ij = H_ij B_ijᵀ and ∂B_ij = A_ijᵀ H_ij."""
    b = len(A)
    H = G.mul_(W).view(b, A.shape[2], b, B.shape[3]).transpose(1, 2).contiguous()
    return None, H @ B.mT, A.mT @ H
