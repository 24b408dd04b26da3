"""BOFT: orthogonal fine-tuning with butterfly factors.

    W' = diag(s) W Qᵀ,    Q = F_{m-1} ... F_1 F_0,    F_i = P_i blkdiag(Q_i) P_iᵀ
    Q_ij = (I - S) (I + S)⁻¹,    S = (R_ij - R_ijᵀ) / 2      (Cayley: a rotation of b coordinates)

| symbol | shape           | start      | trained |
| ------ | --------------- | ---------- | ------- |
| W      | (n, k)          | pretrained | no      |
| R      | (m, k/b, b, b)  | 0          | yes     |
| s      | (n,)            | 1          | yes     |

P_i works inside groups of b 2^i neighbours: it takes their chunks of b/2 evens first, then odds. A block of F_i thus mixes
chunk c with chunk c + 2^i of its group, and Q is block-diagonal with blocks of g = b 2^(m-1). m = 1 is OFT.

Trainable: m k b + n per weight (of the R, only k m (b - 1) / 2 numbers are free). W' = W at the start because R = 0 makes
every factor I, and s = 1. rank(ΔW) <= min(n, k).

Source: Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv 2311.06243, section 4.
Reference code: huggingface/peft 0.21, tuners/boft/layer.py (boft_R = R, boft_s = s as (n, 1), boft_n_butterfly_factor = m).
Differences: PEFT drops every m to 1 where its CUDA extension does not build, and multiplies dense k x k factors. Here the
factors are multiplied inside their groups, k g numbers, and the g x g blocks act on the input; no k x k matrix exists
(unless g = k). PEFT's multiplicative dropout is off by default and absent here. s does not decay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.kernels import row_scaled
from highrank.plugin import DoesNotFit, Method, PeftForm, Site, UserError, register_method


@dataclass(frozen=True, kw_only=True)
class BOFTConfig:
    block_size: int = 4
    """b, coordinates per rotation; 0 to give block_num instead."""
    block_num: int = 0
    """k / b, rotations per factor; 0 to give block_size instead."""
    butterfly_factor: int = 1
    """m, number of factors."""

    def __post_init__(self) -> None:
        for name in ("block_size", "block_num"):
            if getattr(self, name) < 0:
                raise UserError(f"boft: {name} must be >= 0, got {name}={getattr(self, name)}")
        if (self.block_size == 0) == (self.block_num == 0):
            raise UserError(
                f"boft: exactly one of block_size and block_num must be 0, got block_size={self.block_size}, "
                f"block_num={self.block_num}"
            )
        if self.butterfly_factor < 1:
            raise UserError(f"boft: butterfly_factor must be >= 1, got butterfly_factor={self.butterfly_factor}")

    def b(self, in_features: int) -> int:
        return self.block_size or in_features // self.block_num


def _factors_of(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Without its CUDA extension PEFT computes with one factor, and still writes the number that was asked for."""
    (m,) = {len(tensor) for key, tensor in tensors.items() if key.endswith("boft_R")} or {fields["butterfly_factor"]}
    return {**fields, "butterfly_factor": m}


@register_method(config=BOFTConfig)
class BOFT(Method):
    no_decay = ("s",)
    examples = (
        {"butterfly_factor": 2},
        {"butterfly_factor": 1},
        {"butterfly_factor": 3},
        {"block_size": 2, "butterfly_factor": 4},
        {"block_size": 8, "butterfly_factor": 2},
        {"block_size": 16},
        {"block_size": 0, "block_num": 8, "butterfly_factor": 3},
    )
    peft = PeftForm(
        type="BOFT",
        fields={
            "block_size": "boft_block_size",
            "block_num": "boft_block_num",
            "butterfly_factor": "boft_n_butterfly_factor",
        },
        ignored=("boft_dropout",),
        tensors={"R": "boft_R", "s": "boft_s"},
        shapes={"s": (-1, 1)},
        linear_only=True,
        read=_factors_of,
    )

    def __init__(self, in_features: int, out_features: int, cfg: BOFTConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        b = cfg.b(in_features)
        self.R = nn.Parameter(torch.empty(cfg.butterfly_factor, in_features // b, b, b))
        self.s = nn.Parameter(torch.empty(out_features))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.R)
        nn.init.ones_(self.s)

    def rotation(self) -> Tensor:
        """Returns the diagonal blocks of Q (k/g, g, g)."""
        S = (self.R - self.R.mT) / 2
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        with torch.autocast(S.device.type, enabled=False):
            factors = torch.linalg.solve(eye + S, eye - S)  # the two commute: same as (I - S) (I + S)⁻¹
            Q = factors[0]
            for factor in factors[1:]:
                Q = _butterfly(factor, _pair(Q))
        return Q

    def effective_weight(self, W: Tensor) -> Tensor:
        Q = self.rotation()
        dtype = torch.promote_types(W.dtype, Q.dtype)
        return self.s[:, None] * _times(W.to(dtype), Q.mT.to(dtype))

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = s ⊙ (W (Qᵀ x)) + bias, each block of Q on its slice of x."""
        return row_scaled(F.linear(_times(x, self.cached("Q", W, self.rotation).to(x.dtype)), W), self.s, bias)

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: BOFTConfig) -> None:
        name, shape = "block_size" if cfg.block_size else "block_num", (out_features, in_features)
        if in_features % getattr(cfg, name):
            raise DoesNotFit(cls, cfg, name, "must divide in_features", shape, divides=(in_features,))
        b, m = cfg.b(in_features), cfg.butterfly_factor
        if m > 1 and b % 2:
            rule = "must make blocks of even size for butterfly_factor > 1"
            raise DoesNotFit(cls, cfg, name, rule, shape, divides=(in_features,))
        if in_features % (b * 2 ** (m - 1)):
            rule = f"must be such that {b} * 2^(butterfly_factor - 1) divides in_features"
            most = next(factors for factors in range(m, 0, -1) if in_features % (b * 2 ** (factors - 1)) == 0)
            raise DoesNotFit(cls, cfg, "butterfly_factor", rule, shape, most=most)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: BOFTConfig) -> int:
        return cfg.butterfly_factor * in_features * cfg.b(in_features) + out_features


def _times(x: Tensor, Q: Tensor) -> Tensor:
    """Returns x blkdiag(Q): x (..., k), Q (k/g, g, g)."""
    return torch.einsum("...cg,cgh->...ch", x.unflatten(-1, Q.shape[:2]), Q).flatten(-2)


def _pair(Q: Tensor) -> Tensor:
    """Puts neighbouring blocks on one diagonal: (2 c, h, h) -> (c, 2 h, 2 h)."""
    h = Q.shape[-1]
    return torch.cat([F.pad(Q[0::2], (0, h)), F.pad(Q[1::2], (h, 0))], dim=1)


def _butterfly(factor: Tensor, Q: Tensor) -> Tensor:
    """Returns F_i Q group by group: factor (k/b, b, b), Q (k/g, g, g) with g = b 2^i."""
    g, half = Q.shape[-1], factor.shape[-1] // 2
    chunks = Q.unflatten(1, (2, -1, half)).transpose(1, 2)  # P_iᵀ: block c is chunks (c, c + 2^i)
    mixed = factor @ chunks.reshape(-1, 2 * half, g)
    return mixed.view(len(Q), -1, 2, half, g).transpose(1, 2).reshape(-1, g, g)
