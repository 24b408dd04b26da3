"""DeLoRA: a low-rank update whose size is a number of its own, apart from its direction.

    W' = W + (f(A, B, λ) - f(A_0, B_0, λ_0)) diag(w),    f(A, B, λ) = (λ / r) Σ_i b_i a_iᵀ / (|b_i| |a_i|)

with a_i the rows of A, b_i the columns of B, and |·| the length or 1e-4, whichever is more. With start=zeros B_0 = 0.

| symbol   | shape  | start                                      | trained |
| -------- | ------ | ------------------------------------------ | ------- |
| W        | (n, k) | pretrained                                 | no      |
| A        | (r, k) | U(±1/√k)                                   | yes     |
| B        | (n, r) | U(±1/√r), for start=zeros 0                | yes     |
| λ        | (1,)   | boundary                                   | yes     |
| w        | (k,)   | lengths of W's columns                     | no      |
| A_0, B_0 | as A, B| their starts (for start=copy alone)        | no      |

Trainable: r (n + k) + 1 per weight; frozen: k, and r (n + k) for start=copy. W' = W at the start because f is f at the
start. ‖f‖ <= λ whatever the learning rate. rank(ΔW) <= 2 r, for start=zeros <= r: there it is LoRA with A diag(w) and
B scaled column by column.

Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation", arXiv 2503.18225 (ICLR 2025), section 2
(eqs. 5-9 and 15; the copy of the start is eq. 9).
Reference code: huggingface/peft 0.21, tuners/delora/layer.py (delora_A, delora_B, delora_lambda, delora_w_norm = w).
Differences: the paper has one norm ‖W‖ where PEFT and this have w. PEFT starts with B = 0 and subtracts nothing, which the
paper found unstable: the first step alone makes an update of full size; start=zeros is that form. What is subtracted is
never saved, but drawn again; the update is computed from A - A_0 and B - B_0, so that small ones are not rounded away.
λ does not decay.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.kernels import low_rank_linear
from highrank.plugin import Method, PeftForm, Site, UserError, kaiming_uniform_, register_method

STARTS = ("copy", "zeros")


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig:
    r: int = 8
    """Rank of f."""
    boundary: float = 15.0
    """Start of λ, the most that f can measure."""
    start: str = "copy"
    """How W' is W at first: copy (the start is subtracted) or zeros (B = 0, as PEFT has it)."""
    dropout: float = 0.0
    """Probability of dropping an input of the update."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"delora: r must be >= 1, got r={self.r}")
        if self.boundary <= 0:
            raise UserError(f"delora: boundary must be > 0, got boundary={self.boundary}")
        if self.start not in STARTS:
            raise UserError(f"delora: start must be one of {', '.join(STARTS)}, got start={self.start}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"delora: dropout must be in [0, 1), got dropout={self.dropout}")


@register_method(config=DeLoRAConfig)
class DeLoRA(Method):
    default_lr = 3.2e-4
    no_decay = ("lambda_",)
    examples = ({"r": 2}, {"r": 3, "start": "zeros", "boundary": 2.0})
    peft = PeftForm(
        type="DELORA",
        fields={"r": "r", "boundary": "delora_lambda", "start": "init_weights", "dropout": "module_dropout"},
        values={"start": {"zeros": True}},
        tensors={"A": "delora_A", "B": "delora_B", "lambda_": "delora_lambda"},
        frozen=lambda adapter: {"delora_w_norm": adapter.w},
        linear_only=True,
        lacks=lambda cfg: (
            ""
            if cfg.start == "zeros"
            else f"PEFT's DeLoRA subtracts no start, got start={cfg.start}; train with start=zeros"
        ),
    )

    def __init__(self, in_features: int, out_features: int, cfg: DeLoRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.A = nn.Parameter(torch.empty(cfg.r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, cfg.r))
        self.lambda_ = nn.Parameter(torch.empty(1))
        self.register_buffer("w", torch.empty(in_features), persistent=False)
        if cfg.start == "copy":
            self.register_buffer("A_0", torch.empty(cfg.r, in_features), persistent=False)
            self.register_buffer("B_0", torch.empty(out_features, cfg.r), persistent=False)

    @torch.no_grad()
    def reset_parameters(self, W: Tensor, site: Site) -> None:
        self.w.copy_(W.norm(dim=0))
        self.lambda_.fill_(self.cfg.boundary)
        if self.cfg.start == "zeros":
            kaiming_uniform_(self.A)
            nn.init.zeros_(self.B)
            return
        rng = torch.Generator().manual_seed(site.seed)
        for parameter, start in ((self.A, self.A_0), (self.B, self.B_0)):
            bound = parameter.shape[1] ** -0.5
            start.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng))
            parameter.copy_(start)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns the update's factors, (n, r) and (r, k), or with twice the r if the start is subtracted.

        That is (B̂ - B̂_0) A + B̂_0 (A - A_0) with the scaled B̂: what did not move gives an exact 0.
        """
        B = self._scaled(self.A, self.B, self.lambda_)
        if self.cfg.start == "zeros":
            return B, self.A * self.w
        B_0 = self._scaled(self.A_0, self.B_0, self.lambda_.new_full((1,), self.cfg.boundary))
        return torch.cat([B - B_0, B_0], dim=1), torch.cat([self.A, self.A - self.A_0]) * self.w

    def _scaled(self, A: Tensor, B: Tensor, size: Tensor) -> Tensor:
        return B * (size / self.cfg.r / (A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)))

    def effective_weight(self, W: Tensor) -> Tensor:
        left, right = self.factors()
        return W + left @ right

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two thin products beside the frozen one, as LoRA."""
        left = self.cached("left", W, lambda: self.factors()[0])
        right = self.cached("right", W, lambda: self.factors()[1])
        if not (self.cfg.dropout and self.training):
            return low_rank_linear(x, W, right, left, 1.0, bias)
        dropped = F.dropout(x, self.cfg.dropout)
        return F.linear(x, W, bias) + F.linear(F.linear(dropped, right.to(x.dtype)), left.to(x.dtype))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: DeLoRAConfig) -> int:
        return cfg.r * (in_features + out_features) + 1

    @classmethod
    def num_frozen_extra(cls, in_features: int, out_features: int, cfg: DeLoRAConfig) -> int:
        return in_features + (cfg.r * (in_features + out_features) if cfg.start == "copy" else 0)
