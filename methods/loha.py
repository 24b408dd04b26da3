"""LoHa: the Hadamard product of two low-rank matrices, started like a LoRA.

    W' = W + s (B1 A1) ⊙ (B2 A2),    s = alpha / r

| symbol | shape  | start      | trained |
| ------ | ------ | ---------- | ------- |
| W      | (n, k) | pretrained | no      |
| B1     | (n, r) | U(±1/√r)   | yes     |
| A1     | (r, k) | U(±1/√k)   | yes     |
| B2     | (n, r) | U(±1/√r)   | yes     |
| A2     | (r, k) | 0          | yes     |

Trainable: 2 r (n + k) per weight, as many as LoRA of rank 2 r has. W' = W at the start because A2 = 0.
rank(ΔW) <= min(r², n, k). It is ABBA's update with r1 = r2, from another start.

Source: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", ICLR 2022,
arXiv 2108.06098, section 2.2, Propositions 1 and 2; as an update of a frozen W: Yeh et al., "Navigating Text-To-Image
Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024, arXiv 2309.14859.
Reference code: huggingface/peft 0.21, tuners/loha/layer.py (hada_w1_a = B1, hada_w1_b = A1, hada_w2_a = B2, hada_w2_b = A2).
Differences: PEFT builds the update in every step and keeps it for backward; here it is two thin products with the
Khatri-Rao products of the pairs, or, past r² of about n k / 3 (n + k), is built again in backward. PEFT's rank_dropout and
module_dropout, off by default, are absent here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from highrank.model.kernels import hadamard_low_rank, hadamard_low_rank_linear
from highrank.plugin import Method, PeftForm, Site, UserError, kaiming_uniform_, register_method


@dataclass(frozen=True, kw_only=True)
class LoHaConfig:
    r: int = 8
    """Rank of B1 A1 and of B2 A2."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; default r, as in PEFT."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"loha: r must be >= 1, got r={self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"loha: alpha must be > 0, got alpha={self.alpha}")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r


@register_method(config=LoHaConfig)
class LoHa(Method):
    default_lr = 1e-2
    examples = ({"r": 1}, {"r": 3, "alpha": 2.0}, {"r": 2})
    peft = PeftForm(
        type="LOHA",
        fields={"r": "r", "alpha": "alpha"},
        computed={"alpha": lambda cfg: cfg.scaling * cfg.r},
        ignored=("rank_dropout", "module_dropout", "use_effective_conv2d"),
        tensors={"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
        linear_only=True,
    )

    def __init__(self, in_features: int, out_features: int, cfg: LoHaConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.B1 = nn.Parameter(torch.empty(out_features, cfg.r))
        self.A1 = nn.Parameter(torch.empty(cfg.r, in_features))
        self.B2 = nn.Parameter(torch.empty(out_features, cfg.r))
        self.A2 = nn.Parameter(torch.empty(cfg.r, in_features))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        for factor in (self.B1, self.A1, self.B2):
            kaiming_uniform_(factor)
        nn.init.zeros_(self.A2)

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + hadamard_low_rank(self.B1, self.A1, self.B2, self.A2, self.cfg.scaling)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias + s (x A*ᵀ) B*ᵀ with the Khatri-Rao products A* (r², k) and B* (n, r²)."""
        factors = (self.B1, self.A1, self.B2, self.A2)
        return hadamard_low_rank_linear(x, W, factors, self.cfg.scaling, bias, self.cached)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: LoHaConfig) -> int:
        return 2 * cfg.r * (in_features + out_features)
