"""LoRA: low-rank adaptation.

    W' = W + (alpha / r) B A

| symbol | shape  | start      | trained |
| ------ | ------ | ---------- | ------- |
| W      | (n, k) | pretrained | no      |
| A      | (r, k) | U(±1/√k)   | yes     |
| B      | (n, r) | 0          | yes     |

Trainable: r (n + k) per weight. W' = W at the start because B = 0.

Source: Hu et al., "LoRA", arXiv 2106.09685, section 4.1 (h = W0 x + BA x; alpha / r scaling below eq. 3).
Reference code: huggingface/peft 0.21, tuners/lora/layer.py (same names, lora_A and lora_B).
Dropout acts on the adapter's input only, as in both.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.kernels import low_rank_linear
from highrank.plugin import Method, PeftForm, Site, UserError, kaiming_uniform_, register_method


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    r: int = 16
    """Rank of the update."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; default 2 r, as in both papers' baselines."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lora: r must be >= 1, got r={self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"lora: alpha must be > 0, got alpha={self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora: dropout must be in [0, 1), got dropout={self.dropout}")

    @property
    def scaling(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.r


@register_method(config=LoRAConfig)
class LoRA(Method):
    examples = ({"r": 2}, {"r": 3, "alpha": 4.5}, {"r": 1})
    peft = PeftForm(
        type="LORA",
        fields={"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        computed={"lora_alpha": lambda cfg: cfg.scaling * cfg.r},
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        factors=("B", "A"),
    )

    def __init__(self, in_features: int, out_features: int, cfg: LoRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.A = nn.Parameter(torch.empty(cfg.r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, cfg.r))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        kaiming_uniform_(self.A)
        nn.init.zeros_(self.B)

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + self.cfg.scaling * (self.B @ self.A)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two thin products beside the frozen one: y = x Wᵀ + bias + scaling (x̃ Aᵀ) Bᵀ."""
        if not (self.cfg.dropout and self.training):
            return low_rank_linear(x, W, self.A, self.B, self.cfg.scaling, bias)
        return F.linear(x, W, bias) + self.added(x)

    def added(self, x: Tensor) -> Tensor:
        A, B = self.A.to(x.dtype), (self.cfg.scaling * self.B).to(x.dtype)
        return F.linear(F.linear(F.dropout(x, self.cfg.dropout, self.training), A), B)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: LoRAConfig) -> int:
        return cfg.r * (in_features + out_features)
