"""LoKr: a Kronecker product of a small matrix and a matrix of low rank.

    W' = W + s w1 ⊗ w2,    s = alpha / r,    n = n1 n2,    k = k1 k2

Row i1 n2 + i2 and column j1 k2 + j2 of w1 ⊗ w2 hold w1[i1, j1] w2[i2, j2]. `factor` f > 0 that divides a side splits it into
f and side/f; otherwise a side is split into the most square pair whose smaller number is at most f (f = -1: any).

| symbol | shape    | start      | trained |
| ------ | -------- | ---------- | ------- |
| W      | (n, k)   | pretrained | no      |
| w1     | (n1, k1) | 0          | yes     |
| w2_a   | (n2, r)  | U(±1/√r)   | yes     |
| w2_b   | (r, k2)  | U(±1/√k2)  | yes     |

w2 = w2_a w2_b, or, if r >= max(n2, k2)/2, a matrix w2 (n2, k2) that starts as U(±1/√k2). With decompose_both and
r < max(n1, k1)/2 also w1 = w1_a w1_b, with w1_a (n1, r) = 0 and w1_b (r, k1) from U(±1/√k1).

Trainable: the sizes of these. W' = W at the start because w1 = 0. rank(ΔW) = rank(w1) rank(w2).

Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024, arXiv
2309.14859 (LoKr); the Kronecker product after KronA, Edalati et al., arXiv 2212.10650.
Reference code: huggingface/peft 0.21, tuners/lokr/layer.py (lokr_w1, lokr_w1_a, ...; r, alpha, decompose_both,
decompose_factor = factor).
Differences: PEFT builds the update in every step and keeps it for backward; here x, folded to (k1, k2), is multiplied by
the factors, and x and these are kept. PEFT's rank_dropout and module_dropout, off by default, and its start "lycoris", with
w2 = 0 in w1's place, are absent here.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from highrank.model.kernels import in_compute_dtype
from highrank.plugin import Method, PeftForm, Site, UserError, kaiming_uniform_, register_method


@dataclass(frozen=True, kw_only=True)
class LoKrConfig:
    r: int = 8
    """Rank of w2, and of w1 with decompose_both, where that is below half their longer side."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; default r, as in PEFT."""
    factor: int = -1
    """How sides are split: the first number of a side, or at most that; -1 as evenly as can be."""
    decompose_both: bool = False
    """Whether w1 has low rank too."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lokr: r must be >= 1, got r={self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"lokr: alpha must be > 0, got alpha={self.alpha}")
        if self.factor < 1 and self.factor != -1:
            raise UserError(f"lokr: factor must be >= 1, or -1 for an even split, got factor={self.factor}")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r

    def split(self, side: int) -> tuple[int, int]:
        """Returns the two numbers whose product `side` is."""
        if self.factor > 0 and side % self.factor == 0:
            return self.factor, side // self.factor
        most = side if self.factor == -1 else self.factor
        first = max(d for d in range(1, min(most, math.isqrt(side)) + 1) if side % d == 0)
        return first, side // first

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, int]]:
        """Returns the shapes of the parameters by their names."""
        (n1, n2), (k1, k2) = self.split(out_features), self.split(in_features)
        r, first, second = self.r, (n1, k1), (n2, k2)
        w1 = {"w1_a": (n1, r), "w1_b": (r, k1)} if self.decompose_both and 2 * r < max(first) else {"w1": first}
        w2 = {"w2_a": (n2, r), "w2_b": (r, k2)} if 2 * r < max(second) else {"w2": second}
        return w1 | w2


@register_method(config=LoKrConfig)
class LoKr(Method):
    default_lr = 9.5e-3
    examples = (
        {"r": 1},
        {"r": 2, "alpha": 3.0},
        {"r": 1, "factor": 8, "decompose_both": True},
        {"r": 4, "factor": 3},
        {"r": 16, "factor": 1},
    )
    peft = PeftForm(
        type="LOKR",
        fields={"r": "r", "alpha": "alpha", "factor": "decompose_factor", "decompose_both": "decompose_both"},
        computed={"alpha": lambda cfg: cfg.scaling * cfg.r},
        ignored=("rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d"),
        tensors={name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
        linear_only=True,
    )

    def __init__(self, in_features: int, out_features: int, cfg: LoKrConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        for name, shape in cfg.shapes(in_features, out_features).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        for name, parameter in self.named_parameters():
            if name in ("w1", "w1_a"):
                nn.init.zeros_(parameter)
            else:
                kaiming_uniform_(parameter)

    def factors(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns s w1, and w2 as the matrices whose product it is."""
        named = dict(self.named_parameters())
        w1 = named["w1"] if "w1" in named else named["w1_a"] @ named["w1_b"]
        return self.cfg.scaling * w1, (named["w2"],) if "w2" in named else (named["w2_a"], named["w2_b"])

    def effective_weight(self, W: Tensor) -> Tensor:
        w1, w2 = self.factors()
        return W + torch.kron(w1, w2[0] if len(w2) == 1 else w2[0] @ w2[1])

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias + s w1 X w2ᵀ with x folded to X (k1, k2), and the result (n1, n2) flattened."""
        y = F.linear(x, W, bias)
        x, _ = in_compute_dtype(x, None)
        with torch.autocast(x.device.type, enabled=False):
            w1, w2 = self.factors()
            return y + KroneckerLinear.apply(x, w1.to(x.dtype), *(w.to(x.dtype) for w in w2))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: LoKrConfig) -> int:
        return sum(rows * columns for rows, columns in cfg.shapes(in_features, out_features).values())


class KroneckerLinear(torch.autograd.Function):
    """y = x (w1 ⊗ w2)ᵀ as Y = w1 X w2ᵀ with w2 = w w' …, keeping x and these: the products X w'ᵀ, … are made again.

    With δ = ∂Y and Z = X w2ᵀ: ∂w1 = Σ δ Zᵀ and ∂Z = w1ᵀ δ over the tokens; then back through the factors of w2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, *w2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, *w2)
        Z = _chain(x, w1, w2)[-1]
        return torch.bmm(w1.expand(len(Z), -1, -1), Z).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, *w2 = ctx.saved_tensors
        steps = _chain(x, w1, w2)
        dY = dy.reshape(len(steps[-1]), len(w1), -1)
        dw1 = torch.bmm(dY, steps[-1].mT).sum(0)
        dZ = torch.bmm(w1.T.expand(len(dY), -1, -1), dY)
        dw2 = []
        for w, before in zip(w2, reversed(steps[:-1]), strict=True):
            dw2.append(dZ.flatten(0, 1).T @ before.flatten(0, 1))
            dZ = dZ @ w
        return dZ.reshape(x.shape), dw1, *dw2


def _chain(x: Tensor, w1: Tensor, w2: Any) -> list[Tensor]:
    """Returns X (T, k1, k2) and its products with the factors of w2, the last one first, up to X w2ᵀ (T, k1, n2)."""
    steps = [x.reshape(-1, w1.shape[1], x.shape[-1] // w1.shape[1])]
    for w in reversed(w2):
        steps.append(steps[-1] @ w.T)
    return steps
