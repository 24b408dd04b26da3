"""DoRA: weight-decomposed low-rank adaptation.

    W' = diag(g) V,    V = W + s B A,    g_i = m_i / ‖V_i‖,    s = alpha / r

| symbol | shape  | start            | trained |
| ------ | ------ | ---------------- | ------- |
| W      | (n, k) | pretrained       | no      |
| A      | (r, k) | U(±1/√k)         | yes     |
| B      | (n, r) | 0                | yes     |
| m      | (n,)   | ‖W_i‖ of row i   | yes     |

Trainable: r (n + k) + n per weight. W' = W at the start, up to the rounding of m / ‖W_i‖, because B = 0.
rank(ΔW) <= min(n, k), because m scales W's rows. The norm is a constant in the gradient. A row of zeros has g_i = m_i, so it stays zero and finite.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, eq. 5 (W'; "column-wise" there is our
row, one per output) and section 4.3 (the detached norm).
Reference code: NVlabs/DoRA @ 7e2f10a, commonsense_reasoning (dora_simple=True, weight_m_wdecomp = m); huggingface/peft
0.21, tuners/lora/dora.py. As in both, dropout acts on the update and not on W x: W x + (g - 1) W x̃ + g s B A x̃.
Differences: both build B A, an (n, k) matrix, in each step to take its norm; here
‖V_i‖² = ‖W_i‖² + 2 s (W Aᵀ)_i · B_i + s² B_i (A Aᵀ) B_iᵀ with ‖W_i‖² kept. Norms are fp32, and m does not decay.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.kernels import low_rank_linear, row_scaled
from highrank.plugin import Method, PeftForm, Site, UserError, kaiming_uniform_, register_method


@dataclass(frozen=True, kw_only=True)
class DoRAConfig:
    r: int = 16
    """Rank of the update."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; default 2 r, as in the paper's runs."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"dora: r must be >= 1, got r={self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"dora: alpha must be > 0, got alpha={self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dora: dropout must be in [0, 1), got dropout={self.dropout}")

    @property
    def scaling(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.r


@register_method(config=DoRAConfig)
class DoRA(Method):
    no_decay = ("m",)
    exact_gradient = False  # the detached norm: finite differences see it move, the gradient does not
    examples = ({"r": 2}, {"r": 2, "alpha": 3.0})
    peft = PeftForm(
        type="LORA",
        fields={"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        computed={"lora_alpha": lambda cfg: cfg.scaling * cfg.r},
        fixed={"use_dora": True},
        tensors={"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
        factors=("B", "A"),
    )

    def __init__(self, in_features: int, out_features: int, cfg: DoRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.A = nn.Parameter(torch.empty(cfg.r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, cfg.r))
        self.m = nn.Parameter(torch.empty(out_features))
        self.register_buffer("norm2_cache", torch.empty(out_features), persistent=False)  # ‖W_i‖²

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        kaiming_uniform_(self.A)
        nn.init.zeros_(self.B)
        with torch.no_grad():
            self.norm2_cache.copy_(W.to(self.m.dtype).square().sum(1))
            self.m.copy_(self.norm2_cache.sqrt())

    def effective_weight(self, W: Tensor) -> Tensor:
        V = W + self.cfg.scaling * (self.B @ self.A)
        return _gain(self.m, V.detach().square().sum(1))[:, None] * V

    def gain(self, W: Tensor) -> Tensor:
        """Returns g (n,) without building V."""
        s, A, B = self.cfg.scaling, self.A, self.B
        with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
            cross = (W.to(A.dtype) @ A.T).mul_(B).sum(1)
            square = (B @ (A @ A.T)).mul_(B).sum(1)
            norm2 = self.norm2_cache + 2 * s * cross + s * s * square
        return _gain(self.m, norm2)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        g = self.cached("g", W, lambda: self.gain(W))
        if self.cfg.dropout and self.training:
            A, B = self.A.to(x.dtype), (self.cfg.scaling * self.B).to(x.dtype)
            x_dropped = F.dropout(x, self.cfg.dropout)
            y = F.linear(x, W, bias)
            update = (g - 1) * F.linear(x_dropped, W) + g * F.linear(F.linear(x_dropped, A), B)
            return y + update.to(y.dtype)
        return row_scaled(low_rank_linear(x, W, self.A, self.B, self.cfg.scaling), g, bias)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: DoRAConfig) -> int:
        return cfg.r * (in_features + out_features) + out_features


def _gain(m: Tensor, norm2: Tensor) -> Tensor:
    norm = norm2.clamp(min=0).sqrt()
    return m / norm.masked_fill(norm == 0, 1)
