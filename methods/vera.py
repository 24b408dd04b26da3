"""VeRA: vector-based random matrix adaptation.

    W' = W + diag(λ_b) B diag(λ_d) A,    A = A_shared[:, :k],    B = B_shared[:n]

| symbol   | shape  | start                     | trained                |
| -------- | ------ | ------------------------- | ---------------------- |
| W        | (n, k) | pretrained                | no                     |
| λ_b      | (n,)   | 0                         | yes                    |
| λ_d      | (r,)   | d_initial                 | yes                    |
| A_shared | (r, K) | U(±√(6/K)), K = largest k | no, once for the model |
| B_shared | (N, r) | U(±√(6/r)), N = largest n | no, once for the model |

Trainable: n + r per weight; frozen: r (N + K) per model. W' = W at the start because λ_b = 0. rank(ΔW) <= r.

Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, eq. 2 (Λ_b = diag(λ_b),
Λ_d = diag(λ_d); d_initial = 0.1).
Reference code: huggingface/peft 0.21, tuners/vera (vera_lambda_b, vera_lambda_d, vera_A, vera_B): the same numbers bit
for bit, drawn A first, then B, from one CPU generator seeded with projection_prng_key.
Differences: the projections are drawn again when an adapter is loaded, never saved. They are slices: a weight narrower
than K gets the smaller bound of K.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from highrank.plugin import Method, PeftForm, Site, UserError, register_method


@dataclass(frozen=True, kw_only=True)
class VeRAConfig:
    r: int = 256
    """Rank of the shared projections."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""
    d_initial: float = 0.1
    """Start of every entry of λ_d."""
    projection_prng_key: int = 0
    """Seed of the shared projections."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"vera: r must be >= 1, got r={self.r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"vera: dropout must be in [0, 1), got dropout={self.dropout}")
        if self.d_initial == 0:
            raise UserError("vera: d_initial must not be 0, got d_initial=0; with λ_b = 0 nothing would train")


class Projections(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, int]], cfg: VeRAConfig):
        super().__init__()
        N, K = _largest(shapes)
        rng = torch.Generator().manual_seed(cfg.projection_prng_key)
        self.register_buffer("A", _uniform(cfg.r, K, rng), persistent=False)
        self.register_buffer("B", _uniform(N, cfg.r, rng), persistent=False)


@register_method(config=VeRAConfig)
class VeRA(Method):
    default_lr = 3e-3
    examples = ({"r": 4},)
    peft = PeftForm(
        type="VERA",
        fields={key: key for key in ("r", "projection_prng_key", "d_initial")} | {"dropout": "vera_dropout"},
        fixed={"save_projection": True},
        ignored=("save_projection",),
        tensors={"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"},
        shared={"A": "vera_A", "B": "vera_B"},
    )

    def __init__(self, in_features: int, out_features: int, cfg: VeRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.lambda_b = nn.Parameter(torch.empty(out_features))
        self.lambda_d = nn.Parameter(torch.empty(cfg.r))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.lambda_b)
        nn.init.constant_(self.lambda_d, self.cfg.d_initial)

    def _projections(self) -> tuple[Tensor, Tensor]:
        return self.shared_tensors.A[:, : self.in_features], self.shared_tensors.B[: self.out_features]

    def effective_weight(self, W: Tensor) -> Tensor:
        A, B = self._projections()
        return W + (self.lambda_b[:, None] * B) @ (self.lambda_d[:, None] * A)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias + λ_b ⊙ (B (λ_d ⊙ (A x̃))): the vectors act on activations, in fp32."""
        A, B = self._projections()
        narrow = F.linear(F.dropout(x, self.cfg.dropout, self.training), A.to(x.dtype))
        return Widen.apply(narrow, self.lambda_d, B.to(narrow.dtype), self.lambda_b, F.linear(x, W, bias))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: VeRAConfig) -> int:
        return out_features + cfg.r

    @classmethod
    def num_frozen_shared(cls, shapes: Sequence[tuple[int, int]], cfg: VeRAConfig) -> int:
        return cfg.r * sum(_largest(shapes))

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, int]], cfg: VeRAConfig) -> nn.Module:
        return Projections(shapes, cfg)


class Widen(torch.autograd.Function):
    """y = base + λ_b ⊙ (B (λ_d ⊙ p)), keeping p (..., r); wide = B (λ_d ⊙ p) (..., n) is kept only where n > r, else built
    again.

    With δ = ∂y and ∂s = B^T (λ_b ⊙ δ): ∂p = λ_d ⊙ ∂s, ∂λ_d = Σ p ⊙ ∂s, ∂λ_b = Σ δ ⊙ wide, ∂base = δ. B is frozen.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, d: Tensor, B: Tensor, b: Tensor, base: Tensor) -> Tensor:
        wide = F.linear((d * p).to(p.dtype), B)
        ctx.save_for_backward(p, d, B, b, wide if B.shape[0] > B.shape[1] else None)
        return torch.addcmul(base, b, wide).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        p, d, B, b, wide = ctx.saved_tensors
        if wide is None:
            wide = F.linear((d * p).to(p.dtype), B)
        db = (dy * wide).reshape(-1, len(b)).sum(0, dtype=b.dtype)
        ds = (b * dy).to(p.dtype) @ B
        dd = (p * ds).reshape(-1, len(d)).sum(0, dtype=d.dtype)
        return (d * ds).to(p.dtype), dd, None, db, dy


def _largest(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(n for n, _ in shapes), max(k for _, k in shapes)


def _uniform(rows: int, fan_in: int, rng: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / fan_in)
    return torch.empty(rows, fan_in).uniform_(-bound, bound, generator=rng)
