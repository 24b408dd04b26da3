"""RandLoRA: a full-rank sum of random low-rank matrices, of which scalings alone train.

    W' = W + s Σ_j C_j diag(λ_j) A diag(γ_j)    for n >= k, else W' = W + the transpose of such a sum;    s = alpha / r

with m = min(n, k), M = max(n, k), j = 1 ... n_b, n_b = ⌈m / r⌉, A = A_shared[:, 0, :m], and C_j (M, r) of the columns of
B_shared[:M, :n_b]: these laid side by side, basis after basis, are counted off, and C_j has every n_b-th from the j-th on.

| symbol   | shape        | start                            | trained                |
| -------- | ------------ | -------------------------------- | ---------------------- |
| W        | (n, k)       | pretrained                       | no                     |
| λ        | (r, n_b)     | 0                                | yes                    |
| γ        | (n_b, m)     | 1 / max(n_b, m)                  | yes                    |
| A_shared | (r, 1, K)    | U(±1/√K) over its deviation      | no, once for the model |
| B_shared | (N, n_B, r)  | U(±1/√r) over its deviation      | no, once for the model |

K is the smaller of the model's largest n and largest k, N the greater, n_B = ⌈K / r⌉.

Trainable: n_b (r + m) per weight, so that a smaller r has more; frozen: r K + N n_B r per model. W' = W at the start because
λ = 0. rank(ΔW) <= min(n, k). With one basis (r >= m) and n < k it is VeRA, whose λ_b is γ and λ_d is s λ.

Source: Albert et al., "RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models", arXiv 2502.00987 (ICLR 2025),
section 4.2, eq. 4 (B_j = C_j, Λ_j = diag(λ_j), Γ_j = diag(γ_j)).
Reference code: huggingface/peft 0.21, tuners/randlora (randlora_lambda, randlora_gamma, randlora_A, randlora_B,
randlora_alpha = alpha): the same numbers bit for bit, drawn in bf16 from one CPU generator seeded with projection_prng_key.
Differences: eq. 4 would have B_j itself; the reference code lays the two products out in different orders, which gives C_j,
columns as random. Bases are drawn again when an adapter is loaded, never saved. The sparse ones are left out. Where a step
has many tokens the update is built, and again in backward; the reference code passes every token through both products.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from highrank.model.kernels import rebuilt_linear
from highrank.plugin import Method, PeftForm, Site, UserError, register_method


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig:
    r: int = 32
    """Rank of each random matrix."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; default 20 r, as in the reference code."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""
    projection_prng_key: int = 0
    """Seed of the shared bases."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"randlora: r must be >= 1, got r={self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"randlora: alpha must be > 0, got alpha={self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"randlora: dropout must be in [0, 1), got dropout={self.dropout}")

    @property
    def scaling(self) -> float:
        return 20.0 if self.alpha is None else self.alpha / self.r


class Bases(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, int]], cfg: RandLoRAConfig):
        super().__init__()
        N, K = _largest(shapes)
        rng = torch.Generator().manual_seed(cfg.projection_prng_key)
        A = _uniform(cfg.r, K, rng)
        B = torch.stack([_uniform(N, cfg.r, rng) for _ in range(-(-K // cfg.r))], dim=1)
        self.register_buffer("A", (A / A.std()).float()[:, None], persistent=False)
        self.register_buffer("B", (B / B.std()).float(), persistent=False)


@register_method(config=RandLoRAConfig)
class RandLoRA(Method):
    default_lr = 3.2e-4
    examples = ({"r": 4}, {"r": 5, "alpha": 20.0}, {"r": 20})
    peft = PeftForm(
        type="RANDLORA",
        fields={
            "r": "r",
            "alpha": "randlora_alpha",
            "dropout": "randlora_dropout",
            "projection_prng_key": "projection_prng_key",
        },
        computed={"randlora_alpha": lambda cfg: cfg.scaling * cfg.r},
        fixed={"save_projection": False},  # PEFT would have the bases once more for every weight
        ignored=("save_projection",),
        tensors={"lambda_": "randlora_lambda", "gamma": "randlora_gamma"},
        shared={"A": "randlora_A", "B": "randlora_B"},
    )

    def __init__(self, in_features: int, out_features: int, cfg: RandLoRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.least = min(in_features, out_features)
        self.num_bases = -(-self.least // cfg.r)
        self.lambda_ = nn.Parameter(torch.empty(cfg.r, self.num_bases))
        self.gamma = nn.Parameter(torch.empty(self.num_bases, self.least))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.lambda_)
        nn.init.constant_(self.gamma, 1 / max(self.gamma.shape))

    @property
    def is_wide(self) -> bool:
        return self.least < self.in_features

    def _bases(self) -> tuple[Tensor, Tensor]:
        """Returns A (r, m) and C (M, n_b, r), whose entries [:, i n_b + j] of the last two in a row go with λ_ij."""
        A, B = self.shared_tensors.A, self.shared_tensors.B
        return A[:, 0, : self.least], B[: max(self.in_features, self.out_features), : self.num_bases]

    def update(self, scaled: Tensor, gamma: Tensor) -> Tensor:
        """Returns ΔW for s λ and γ."""
        A, C = self._bases()
        delta = C.flatten(1) @ _Q(A, scaled, gamma)
        return delta.T if self.is_wide else delta

    def _gradients(self, G: Tensor, scaled: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        A, C = self._bases()
        return _gradients(C.flatten(1).T @ (G.T if self.is_wide else G), A, scaled, gamma)

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + self.update(self.cfg.scaling * self.lambda_, self.gamma)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """For few tokens two products beside the dense one, else a product with W + ΔW: whichever is less work in a step.

        In units of m M: 5 per token there (2 forward, 2 for ∂x, 1 for ∂λ and ∂γ); here 1 per token, for δᵀ x, and 3 m to
        build ΔW twice and take its gradient.
        """
        scaled, dropping = self.cfg.scaling * self.lambda_, self.training and self.cfg.dropout > 0
        if not dropping and not (torch.is_grad_enabled() and 4 * x.numel() // x.shape[-1] < 3 * self.least):
            return rebuilt_linear(x, W, self.update, self._gradients, [scaled, self.gamma], bias, self.cached)
        y = F.linear(x, W, bias)
        with torch.autocast(x.device.type, enabled=False):
            dropped = F.dropout(x.to(y.dtype), self.cfg.dropout, self.training)
            return y + TwoProducts.apply(dropped, *self._bases(), scaled, self.gamma, self.is_wide)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: RandLoRAConfig) -> int:
        m = min(in_features, out_features)
        return -(-m // cfg.r) * (cfg.r + m)

    @classmethod
    def num_frozen_shared(cls, shapes: Sequence[tuple[int, int]], cfg: RandLoRAConfig) -> int:
        N, K = _largest(shapes)
        return cfg.r * (K + N * -(-K // cfg.r))

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, int]], cfg: RandLoRAConfig) -> nn.Module:
        return Bases(shapes, cfg)


class TwoProducts(torch.autograd.Function):
    """y = C (Q x), or Qᵀ (Cᵀ x) if wide, keeping x and for the latter h = Cᵀ x; Q is built again in backward.

    With δ = ∂y: ∂h = Cᵀ δ, ∂x = Qᵀ ∂h, ∂Q = ∂h xᵀ, or ∂h = Q δ, ∂x = C ∂h, ∂Q = h δᵀ. A and C are frozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, C: Tensor, scaled: Tensor, gamma: Tensor, wide: bool) -> Tensor:
        Q, flat = _Q(A, scaled, gamma).to(x.dtype), C.flatten(1).to(x.dtype)
        h = x @ (flat if wide else Q.T)
        ctx.save_for_backward(x, A, C, scaled, gamma, h if wide else None)
        return h @ (Q if wide else flat.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, C, scaled, gamma, h = ctx.saved_tensors
        Q, flat = _Q(A, scaled, gamma).to(dy.dtype), C.flatten(1).to(dy.dtype)
        dh = dy @ (flat if h is None else Q.T)
        left, right = (dh, x) if h is None else (h, dy)
        dQ = (left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])).to(A.dtype)
        return dh @ (Q if h is None else flat.T), None, None, *_gradients(dQ, A, scaled, gamma), None


def _Q(A: Tensor, scaled: Tensor, gamma: Tensor) -> Tensor:
    """Returns the rows s λ_ij A_i ⊙ γ_j, (r n_b, m)."""
    return (scaled[:, :, None] * A[:, None] * gamma).flatten(0, 1)


def _gradients(dQ: Tensor, A: Tensor, scaled: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Σ ∂Q_ij ⊙ A_i ⊙ γ_j for every i and j, and Σ_i s λ_ij ∂Q_ij ⊙ A_i for every j."""
    dQ = dQ.unflatten(0, scaled.shape) * A[:, None]
    return torch.einsum("ijb,jb->ij", dQ, gamma), torch.einsum("ijb,ij->jb", dQ, scaled)


def _largest(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns N >= K, the largest n and the largest k, the greater first."""
    n, k = max(n for n, _ in shapes), max(k for _, k in shapes)
    return max(n, k), min(n, k)


def _uniform(rows: int, fan_in: int, rng: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(rows, fan_in, dtype=torch.bfloat16), a=math.sqrt(5), generator=rng)
