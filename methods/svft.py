"""SVFT: a sparse matrix in the coordinates of W's own singular vectors.

    W' = W + U M Vᵀ,    W = U Σ Vᵀ (thin SVD, q = min(n, k)),    M[i_t, j_t] = m_t at p chosen places, 0 elsewhere

| symbol | shape  | start                          | trained |
| ------ | ------ | ------------------------------ | ------- |
| W      | (n, k) | pretrained                     | no      |
| m      | (p,)   | 0                              | yes     |
| U      | (n, q) | left singular vectors of W     | no      |
| Vᵀ     | (q, k) | right singular vectors of W    | no      |
| places | (p,)   | by `pattern`, in row order     | no      |

Patterns: `plain`, the diagonal, so that W' has the singular values |σ_i + m_i|; `banded`, the diagonal and d more on each
side; `random`, as many places of the q q, each with the same chance; `top_k`, as many with the largest |u_iᵀ v_j|, for a
square W. Signs of the singular vectors: the largest entry of each u_i is positive. They are computed from W in fp64, again
when an adapter is loaded: in fp32 another machine's would differ, and m mean another ΔW.

Trainable: q (2d + 1) - d (d + 1) per weight, with d = 0 for plain; frozen: q (n + k), twice to three times W, and p places
(none for plain). W' = W at the start because M = 0. rank(ΔW) <= min(p, q). With d = q - 1 M is any matrix, and ΔW any
whose columns and rows lie in the span of U and V: so is (IA)³.

Source: Lingam et al., "SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors", arXiv 2405.19597, section 3.1 (eq. 1
and the four patterns) and the lemma of 3.2 (structure, rank).
Reference code: VijayLingam95/SVFT, svft/svft_layers.py.
Differences: the paper writes whole U and V of a W that is not square, whose further columns M could reach too. The code
starts M at random behind a gate, M = σ(g) s with g = 0, which the paper does not have: W' is then not W at the start; here
M = 0. It computes U (Σ + M) Vᵀ x in place of W x, so that the base is W up to the rounding of its SVD; here W is kept.
Its random places can repeat, and its top_k takes the largest u_iᵀ v_j by sign, which is the SVD's choice for i ≠ j.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from highrank.model.kernels import rebuilt_linear
from highrank.plugin import DoesNotFit, Method, Site, UserError, register_method

PATTERNS = ("plain", "banded", "random", "top_k")


@dataclass(frozen=True, kw_only=True)
class SVFTConfig:
    pattern: str = "plain"
    """Which entries of M train: plain, banded, random or top_k."""
    d: int = 0
    """Off-diagonals on each side, or as many places as these have; 0 for pattern=plain."""

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise UserError(f"svft: pattern must be one of {', '.join(PATTERNS)}, got pattern={self.pattern}")
        if self.d < 0:
            raise UserError(f"svft: d must be >= 0, got d={self.d}")
        if self.pattern == "plain" and self.d:
            raise UserError(f"svft: pattern=plain has d = 0, got d={self.d}; use pattern=banded")
        if self.pattern == "banded" and not self.d:
            raise UserError("svft: pattern=banded needs d >= 1, got d=0; pattern=plain is the diagonal alone")


@register_method(config=SVFTConfig)
class SVFT(Method):
    default_lr = 5e-2
    examples = ({"pattern": "plain"}, {"pattern": "banded", "d": 2}, {"pattern": "random", "d": 1})

    def __init__(self, in_features: int, out_features: int, cfg: SVFTConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        q, p = min(in_features, out_features), self.num_trainable(in_features, out_features, cfg)
        self.m = nn.Parameter(torch.empty(p))
        self.register_buffer("U", torch.empty(out_features, q), persistent=False)
        self.register_buffer("Vt", torch.empty(q, in_features), persistent=False)
        places = None if cfg.pattern == "plain" else torch.empty(p, dtype=torch.int32)
        self.register_buffer("places", places, persistent=False)

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.m)
        U, _, Vt = torch.linalg.svd(W.double(), full_matrices=False)
        signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        self.U.copy_(U * signs)
        self.Vt.copy_(Vt * signs.T)
        if self.cfg.pattern != "plain":
            self.places.copy_(self._order(U, Vt, site)[: len(self.m)].sort().values)

    def _order(self, U: Tensor, Vt: Tensor, site: Site) -> Tensor:
        """Returns places of M, row by row, those to train first."""
        q = len(Vt)
        match self.cfg.pattern:
            case "banded":
                i = torch.arange(q)
                return ((i[:, None] - i).abs() <= self.cfg.d).flatten().nonzero().flatten()
            case "random":
                return torch.randperm(q * q, generator=torch.Generator().manual_seed(site.seed))
            case _:
                return (Vt @ U).T.abs().flatten().sort(descending=True, stable=True).indices

    def update(self, m: Tensor) -> Tensor:
        M = sparse(m, self.places, len(self.Vt))
        return (self.U * M if M.ndim == 1 else self.U @ M) @ self.Vt

    def _gradients(self, G: Tensor, m: Tensor) -> tuple[Tensor]:
        """∂m = (Uᵀ G V) at the places."""
        left = self.U.T @ G
        if self.cfg.pattern == "plain":
            return ((left * self.Vt).sum(1),)
        return ((left @ self.Vt.T).flatten()[self.places],)

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + self.update(self.m)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """For few tokens products with V, M and U beside the dense one, else a product with W + U M Vᵀ, built again in
        backward: whichever is less work in a step.

        With m <= M of n and k, in units of m: 2 (m + M) per token there; here M per token, for δᵀ x, and 3 m M to build the
        update twice and take its gradient.
        """
        least, most = sorted((self.in_features, self.out_features))
        tokens = x.numel() // x.shape[-1]
        if not torch.is_grad_enabled() or tokens * (most + 2 * least) > 3 * least * most:
            return rebuilt_linear(x, W, self.update, self._gradients, [self.m], bias, self.cached)
        y = F.linear(x, W, bias)
        with torch.autocast(x.device.type, enabled=False):
            return y + InCoordinates.apply(x.to(y.dtype), self.U, self.Vt, self.m, self.places)

    @classmethod
    def exact_base(cls, cfg: SVFTConfig) -> bool:
        return True

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: SVFTConfig) -> None:
        shape = (out_features, in_features)
        if cfg.pattern == "top_k" and in_features != out_features:
            raise UserError(
                f"svft: pattern=top_k needs a square weight, got pattern=top_k for a weight of shape {shape}; use "
                "pattern=random, or placement=[q,o] where these are square"
            )
        if cfg.d >= min(shape):
            raise DoesNotFit(cls, cfg, "d", "must be < min(out, in)", shape, most=min(shape) - 1)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: SVFTConfig) -> int:
        return min(in_features, out_features) * (2 * cfg.d + 1) - cfg.d * (cfg.d + 1)

    @classmethod
    def num_frozen_extra(cls, in_features: int, out_features: int, cfg: SVFTConfig) -> int:
        places = 0 if cfg.pattern == "plain" else cls.num_trainable(in_features, out_features, cfg)
        return min(in_features, out_features) * (in_features + out_features) + places


class InCoordinates(torch.autograd.Function):
    """y = U M h with h = Vᵀ x, keeping h. With δ = ∂y and g = Uᵀ δ: ∂x = V Mᵀ g, ∂m = Σ g hᵀ over tokens at the places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, Vt: Tensor, m: Tensor, places: Tensor | None) -> Tensor:
        h = F.linear(x, Vt.to(x.dtype))
        ctx.save_for_backward(h, U, Vt, m, places)
        M = sparse(m, places, len(Vt)).to(x.dtype)
        return F.linear(h * M if M.ndim == 1 else F.linear(h, M), U.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, U, Vt, m, places = ctx.saved_tensors
        g, M = dy @ U.to(dy.dtype), sparse(m, places, len(Vt)).to(dy.dtype)
        dx = (g * M if M.ndim == 1 else g @ M) @ Vt.to(dy.dtype)
        rows, columns = g.reshape(-1, len(Vt)), h.reshape(-1, len(Vt))
        dm = (
            (rows * columns).sum(0, dtype=m.dtype)
            if places is None
            else (rows.T @ columns).flatten()[places].to(m.dtype)
        )
        return dx, None, None, dm, None


def sparse(m: Tensor, places: Tensor | None, q: int) -> Tensor:
    """Returns M (q, q), or of a diagonal one the diagonal, which is m."""
    return m if places is None else m.new_zeros(q * q).index_copy(0, places.long(), m).view(q, q)
