"""LoRA: low-rank adaptation, and the members of its family that differ in scaling, start or learning rate alone.

    W' = W + (alpha / r) B A
    W' = W + s B A,                s = alpha / √r        with scaling=rs (rsLoRA)
    W' = W + s (B A - B0 A0)                             with init=pissa or olora, and either s

| symbol | shape  | start, by `init`                                                              | trained |
| ------ | ------ | ----------------------------------------------------------------------------- | ------- |
| W      | (n, k) | pretrained                                                                    | no      |
| A      | (r, k) | kaiming: U(±1/√k); gaussian: N(0, 1/r²); else A0                              | yes     |
| B      | (n, r) | kaiming, gaussian: 0; else B0                                                 | yes     |
| A0, B0 |        | pissa: √(Σ_r/s) V_rᵀ, U_r √(Σ_r/s) of W = U Σ Vᵀ; olora: R_r, Q_r of W = Q R  | no      |

Trainable: r (n + k) per weight, and r (n + k) frozen with pissa and olora; the others have no A0 and B0. W' = W at the start
because B = 0, or because B A = B0 A0. rank(ΔW) <= r, with pissa and olora 2 r. With `lr_ratio` (LoRA+) B learns at
lr_ratio times A's rate.

Source: Hu et al., "LoRA", arXiv 2106.09685, section 4.1 (h = W0 x + BA x; alpha / r scaling below eq. 3); Kalajdzievski,
"rsLoRA", arXiv 2312.03732; Meng et al., "PiSSA", arXiv 2404.02948; Büyükakyüz, "OLoRA", arXiv 2406.01775; Hayou et al.,
"LoRA+", arXiv 2402.12354.
Reference code: huggingface/peft 0.21, tuners/lora/layer.py (same names, lora_A and lora_B; use_rslora, init_lora_weights),
optimizers/loraplus.py. Dropout acts on the update's input only, as in LoRA's.
Differences: PiSSA and OLoRA put W - s B0 A0 into the base, rounded to its dtype, and train A and B; here W stays, A0 and B0
are made from it again when an adapter is loaded (in fp64, so that any device makes the same), and the update is computed as
(B - B0) A + B0 (A - A0), which no rounding of A and B to 16 bits touches while they are near A0 and B0. For PEFT it is
written as a plain LoRA of rank 2 r, A = [A; A0] and B = [B, -B0], and is read back as that; scaling=rs is written as the
alpha / r that it comes to. With these starts A and B do not decay: their neutral values are A0 and B0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.kernels import low_rank_linear, moved_pair
from highrank.plugin import (
    DoesNotFit,
    Method,
    PeftForm,
    Site,
    UserError,
    kaiming_uniform_,
    later_field,
    register_method,
)

SCALINGS = ("alpha_over_r", "rs")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    r: int = 16
    """Rank of the update."""
    alpha: float | None = None
    """Numerator of the scaling s; default 2 r, as in both papers' baselines."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""
    scaling: str = later_field("alpha_over_r")
    """Form of the scaling s: alpha_over_r, or rs for alpha / √r."""
    init: str = later_field("kaiming")
    """How A and B start: kaiming, gaussian, pissa or olora."""
    lr_ratio: float = later_field(1.0)
    """B's learning rate over A's, whose rate is lr."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lora: r must be >= 1, got r={self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"lora: alpha must be > 0, got alpha={self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora: dropout must be in [0, 1), got dropout={self.dropout}")
        if self.scaling not in SCALINGS:
            raise UserError(f"lora: scaling must be one of {', '.join(SCALINGS)}, got scaling={self.scaling}")
        if self.init not in INITS:
            raise UserError(f"lora: init must be one of {', '.join(INITS)}, got init={self.init}")
        if self.lr_ratio <= 0:
            raise UserError(f"lora: lr_ratio must be > 0, got lr_ratio={self.lr_ratio}")

    @property
    def s(self) -> float:
        alpha = 2 * self.r if self.alpha is None else self.alpha
        return alpha / (self.r if self.scaling == "alpha_over_r" else self.r**0.5)


def _kaiming(W: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    return kaiming_uniform_(A), B.zero_()


def _gaussian(W: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    return A.normal_(std=1 / len(A)), B.zero_()


def _pissa(W: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    r = len(A)
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    root = (S[:r] / s).sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root


def _olora(W: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    r = len(A)
    Q, R = torch.linalg.qr(W.double())
    return R[:r], Q[:, :r]


INITS: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "pissa": _pissa,
    "olora": _olora,
}
OF_W = ("pissa", "olora")
"""The starts that are parts of W, and are taken off it again."""


def _peft_rank(cfg: LoRAConfig) -> int:
    return 2 * cfg.r if cfg.init in OF_W else cfg.r


def _with_start(p: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """B A - B0 A0 as one product of rank 2 r, whose base stays as it is."""
    return {"A": torch.cat([p["A"], p["A0"]]), "B": torch.cat([p["B"], -p["B0"]], dim=1)}


@register_method(config=LoRAConfig)
class LoRA(Method):
    examples = (
        {"r": 2},
        {"r": 3, "alpha": 4.5},
        {"r": 1},
        {"r": 2, "scaling": "rs", "init": "gaussian", "lr_ratio": 16.0},
        {"r": 2, "init": "pissa"},
        {"r": 3, "init": "olora", "alpha": 4.5},
    )
    peft = PeftForm(
        type="LORA",
        fields={"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "scaling": "use_rslora"},
        values={"scaling": {"alpha_over_r": False, "rs": True}},
        absent={"use_rslora": False},
        computed={
            "r": lambda cfg: _peft_rank(cfg),
            "lora_alpha": lambda cfg: cfg.s * _peft_rank(cfg),
            "use_rslora": lambda cfg: False,  # s is in lora_alpha, whatever rank joined pairs have
        },
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        factors=("B", "A"),
        converted=lambda adapter, p: _with_start(p) if "A0" in p else p,
    )

    def __init__(self, in_features: int, out_features: int, cfg: LoRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.A = nn.Parameter(torch.empty(cfg.r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, cfg.r))
        if cfg.init in OF_W:
            self.register_buffer("A0", torch.empty_like(self.A), persistent=False)
            self.register_buffer("B0", torch.empty_like(self.B), persistent=False)
            self.no_decay = ("A", "B")
        self.lr_factors = {"B": cfg.lr_ratio}

    @torch.no_grad()
    def reset_parameters(self, W: Tensor, site: Site) -> None:
        A, B = INITS[self.cfg.init](W, self.A, self.B, self.cfg.s)
        self.A.copy_(A)
        self.B.copy_(B)
        if self.cfg.init in OF_W:
            self.A0.copy_(self.A)
            self.B0.copy_(self.B)

    @property
    def _start(self) -> tuple[Tensor, Tensor] | None:
        return (self.A0, self.B0) if self.cfg.init in OF_W else None

    def effective_weight(self, W: Tensor) -> Tensor:
        A, B = moved_pair(self.A, self.B, self._start)
        return W + self.cfg.s * (B @ A)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two thin products beside the frozen one: y = x Wᵀ + bias + s (x̃ Aᵀ) Bᵀ."""
        if not (self.cfg.dropout and self.training):
            return low_rank_linear(x, W, self.A, self.B, self.cfg.s, bias, self._start)
        return F.linear(x, W, bias) + self.added(x)

    def added(self, x: Tensor) -> Tensor:
        A, B = moved_pair(self.A, self.B, self._start)
        low = F.linear(F.dropout(x, self.cfg.dropout, self.training), A.to(x.dtype))
        return F.linear(low, (self.cfg.s * B).to(x.dtype))

    @classmethod
    def exact_base(cls, cfg: LoRAConfig) -> bool:
        return cfg.init in OF_W

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: LoRAConfig) -> None:
        shape = (out_features, in_features)
        if cfg.init in OF_W and cfg.r > min(shape):
            raise DoesNotFit(cls, cfg, "r", f"must be <= min(out, in) for init={cfg.init}", shape, most=min(shape))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: LoRAConfig) -> int:
        return cfg.r * (in_features + out_features)

    @classmethod
    def num_frozen_extra(cls, in_features: int, out_features: int, cfg: LoRAConfig) -> int:
        return cls.num_trainable(in_features, out_features, cfg) if cfg.init in OF_W else 0
