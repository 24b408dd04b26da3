"""MoRA: high-rank updating with one small square matrix.

    W' = W + ΔW,    ΔW x = decompress(M compress(x)),    r̂ = ⌊√(r (n + k)) + ½⌋, for type 6 the even number at or below

Type 1, sharing:   x, continued from its own start to a multiple of r̂, is cut into blocks of r̂ and the blocks are
                   summed; the r̂ outputs of M are repeated until there are n.
Type 6, rotation:  x is continued and cut likewise; block i is M Rot_i x_i, nothing is summed; the blocks' outputs in a
                   row, cut or repeated, are the n outputs. Rot_i turns the coordinates j and j + r̂/2 of a block by the
                   angle i 10000^(-2j/r̂), as rotary position embeddings do.

| symbol | shape  | start      | trained |
| ------ | ------ | ---------- | ------- |
| W      | (n, k) | pretrained | no      |
| M      | (r̂, r̂) | 0          | yes     |

Trainable: r̂² per weight, about what LoRA of rank r has. W' = W at the start because M = 0.
rank(ΔW) <= min(n, k): type 1 has r̂ at most, type 6 is made of the blocks M Rot_i along the diagonal and can reach full rank; for n < k its cut drops the blocks
behind the first ⌈n/r̂⌉, so that the inputs in them get no update.

Source: Jiang et al., "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning", arXiv 2405.12130, section 4 (the
paper has r̂ = ⌊√(r (n + k))⌋; types are the numbers of the reference code).
Reference code: kongds/MoRA, peft-mora/src/peft/tuners/lora/layer.py (lora_A = M, mora_type).
Differences: M is turned instead of x, once per weight, and blocks that the cut drops are not computed. W' is formed for a
single block too. alpha does not act there either and is absent here.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.plugin import Method, Site, UserError, register_method

SHARING, ROTATION = 1, 6


@dataclass(frozen=True, kw_only=True)
class MoRAConfig:
    r: int = 8
    """Rank of the LoRA update with about as many parameters."""
    type: int = 6
    """How x is compressed: 1 by sums of shared blocks (for large r), 6 by rotated blocks (for small r)."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"mora: r must be >= 1, got r={self.r}")
        if self.type not in (SHARING, ROTATION):
            raise UserError(f"mora: type is 1 (sharing) or 6 (rotation), got type={self.type}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"mora: dropout must be in [0, 1), got dropout={self.dropout}")

    def side(self, in_features: int, out_features: int) -> int:
        """Returns r̂, the number of rows and columns of M."""
        rounded = (math.isqrt(4 * self.r * (in_features + out_features)) + 1) // 2
        return rounded - rounded % 2 if self.type == ROTATION else rounded


@register_method(config=MoRAConfig)
class MoRA(Method):
    default_lr = 3e-4
    examples = ({"r": 2}, {"r": 1}, {"r": 3}, {"r": 8}, {"r": 1, "type": 1}, {"r": 3, "type": 1})

    def __init__(self, in_features: int, out_features: int, cfg: MoRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        side = cfg.side(in_features, out_features)
        self.M = nn.Parameter(torch.empty(side, side))
        self.num_blocks = -(-in_features // side)
        if cfg.type == ROTATION:
            self.num_blocks = min(self.num_blocks, -(-out_features // side))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.M)

    def rotated(self) -> Tensor:
        """Returns M Rot_i for every block i, (num_blocks, r̂, r̂)."""
        half = len(self.M) // 2
        j = torch.arange(half, dtype=torch.float64, device=self.M.device)
        i = torch.arange(self.num_blocks, dtype=torch.float64, device=self.M.device)
        angle = i[:, None, None] * 10000 ** (-j / half)
        cos, sin = angle.cos().to(self.M.dtype), angle.sin().to(self.M.dtype)
        left, right = self.M[:, :half], self.M[:, half:]
        return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1)

    def effective_weight(self, W: Tensor) -> Tensor:
        padded = torch.block_diag(*self.rotated()) if self.cfg.type == ROTATION else self.M.repeat(1, self.num_blocks)
        k = self.in_features
        folded = F.pad(padded, (0, -padded.shape[1] % k)).unflatten(1, (-1, k)).sum(1)
        return W + _cycle(folded.mT, self.out_features).mT

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias + decompress(M compress(x̃)), on activations: no (n, k) update exists."""
        blocks = _cycle(F.dropout(x, self.cfg.dropout, self.training), self.num_blocks * len(self.M))
        blocks = blocks.unflatten(-1, (self.num_blocks, -1))
        if self.cfg.type == ROTATION:
            rotated = self.cached(f"rotated {x.dtype}", W, lambda: self.rotated().to(x.dtype))
            update = torch.einsum("...bs,bts->...bt", blocks, rotated).flatten(-2)
        else:
            update = F.linear(blocks.sum(-2), self.M.to(x.dtype))
        return F.linear(x, W, bias) + _cycle(update, self.out_features)

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: MoRAConfig) -> None:
        if cfg.side(in_features, out_features) < 1:
            raise UserError(
                f"mora: r must give M at least 2 rows for type=6, got r={cfg.r} for a weight of shape "
                f"({out_features}, {in_features})"
            )

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: MoRAConfig) -> int:
        return cfg.side(in_features, out_features) ** 2


def _cycle(x: Tensor, size: int) -> Tensor:
    """Returns the first `size` entries of x, x, x, ... along the last dimension."""
    repeats, rest = divmod(size, x.shape[-1])
    pieces = [x] * repeats + [x[..., :rest]] * (rest > 0)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
