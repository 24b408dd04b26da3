"""HiRA: the Hadamard product of a frozen R and a low-rank matrix.

    W' = W + R ⊙ (A B),    with R = W by default, so W' = W ⊙ (1 + A B)

| symbol | shape  | start                            | trained |
| ------ | ------ | -------------------------------- | ------- |
| W      | (n, k) | pretrained                       | no      |
| R      | (n, k) | W, or one of the choices below   | no      |
| A      | (n, r) | 0                                | yes     |
| B      | (r, k) | U(±1/√k)                         | yes     |

Choices of R, as the paper compares them: `w0` = W; `random_uniform` from U[0, 1); `random_scaled` from N(0, std(W)²);
`w0_trunc` = U_v Σ_v V_vᵀ, W's best approximation of rank v = R_rank; `w0_smooth`, the mean of W over layers l-1, l, l+1;
`ones`, which is LoRA with scaling 1.

Trainable: r (n + k) per weight. W' = W at the start because A = 0. rank(ΔW) <= min(rank(R) r, n, k).

Source: Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025,
section 4 (method; 4.3 for R = 1), 6.3 (random R), appendix E.1 (truncated), E.2 (smoothed).
Reference code: hqsiswiliam/hira @ f75f0cf, hira/tuners/lora.py (our A is lora_B, our B is lora_A); huggingface/peft 0.21,
tuners/hira/layer.py (hira_B, hira_A). `random_scaled` is ours: `random_uniform` is some 25 times larger than a typical W.
Differences: the official code rounds A B + 1 to bf16, which erases every |A B| below about 2e-3; here A B stays in fp32,
and `official_numerics` brings the rounding back. At either end of the model `w0_smooth` averages the layers there are.
The official dropout and scaling are stored and never applied: there are none here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from highrank.model.kernels import hadamard, in_compute_dtype
from highrank.plugin import DoesNotFit, Method, PeftForm, Site, UserError, kaiming_uniform_, register_method

CHOICES = ("w0", "random_uniform", "random_scaled", "w0_trunc", "w0_smooth", "ones")


@dataclass(frozen=True, kw_only=True)
class HiRAConfig:
    r: int = 16
    """Rank of A B."""
    R: str = "w0"
    """The frozen factor: w0, random_uniform, random_scaled, w0_trunc, w0_smooth or ones."""
    R_rank: int | None = None
    """Rank v of R; for R=w0_trunc alone."""
    official_numerics: bool = False
    """Whether to round A B + 1 to bf16 as the official code does; for R=w0 alone."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"hira: r must be >= 1, got r={self.r}")
        if self.R not in CHOICES:
            raise UserError(f"hira: R must be one of {', '.join(CHOICES)}, got R={self.R}")
        if self.R == "w0_trunc" and self.R_rank is None:
            raise UserError("hira: R=w0_trunc needs a rank, got R_rank=None; add R_rank=128")
        if self.R != "w0_trunc" and self.R_rank is not None:
            raise UserError(f"hira: R_rank belongs to R=w0_trunc, got R_rank={self.R_rank} with R={self.R}")
        if self.R_rank is not None and self.R_rank < 1:
            raise UserError(f"hira: R_rank must be >= 1, got R_rank={self.R_rank}")
        if self.official_numerics and self.R != "w0":
            raise UserError(f"hira: official_numerics needs R=w0, got official_numerics=True with R={self.R}")


def _beyond_peft(cfg: HiRAConfig) -> str:
    got = f"R={cfg.R}" if cfg.R != "w0" else f"official_numerics={cfg.official_numerics}"
    return f"PEFT's HiRA has R = W in full precision, got {got}" if cfg.R != "w0" or cfg.official_numerics else ""


@register_method(config=HiRAConfig)
class HiRA(Method):
    default_lr = 5e-3
    examples = (
        {"r": 2},
        *({"r": 2, "R": R} for R in ("random_uniform", "random_scaled", "w0_smooth", "ones")),
        {"r": 2, "R": "w0_trunc", "R_rank": 3},
    )
    peft = PeftForm(
        type="HIRA",
        fields={"r": "r"},
        ignored=("hira_dropout",),
        tensors={"A": "hira_B", "B": "hira_A"},
        factors=("A", "B"),
        lacks=_beyond_peft,
    )

    def __init__(self, in_features: int, out_features: int, cfg: HiRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.A = nn.Parameter(torch.empty(out_features, cfg.r))
        self.B = nn.Parameter(torch.empty(cfg.r, in_features))
        if cfg.R == "w0_trunc":
            v = cfg.R_rank or 0
            self.register_buffer("US", torch.empty(out_features, v), persistent=False)
            self.register_buffer("Vt", torch.empty(v, in_features), persistent=False)
        elif cfg.R not in ("w0", "ones"):
            self.register_buffer("R", torch.empty(out_features, in_features), persistent=False)

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.A)
        kaiming_uniform_(self.B)
        rng = torch.Generator().manual_seed(site.seed)
        if self.cfg.R == "random_uniform":
            self.R.copy_(torch.rand(W.shape, generator=rng))
        elif self.cfg.R == "random_scaled":
            self.R.copy_(torch.randn(W.shape, generator=rng)).mul_(float(W.to(self.R.dtype).std()))
        elif self.cfg.R == "w0_smooth":
            self.R.copy_(torch.stack([w.to(self.R.dtype) for w in site.neighbours()]).mean(0))
        elif self.cfg.R == "w0_trunc":
            U, S, Vt = torch.linalg.svd(W.to(self.US.dtype), full_matrices=False)
            self.US.copy_((U * S)[:, : self.cfg.R_rank])
            self.Vt.copy_(Vt[: self.cfg.R_rank])

    def _R(self, W: Tensor) -> Tensor | float:
        match self.cfg.R:
            case "w0":
                return W
            case "ones":
                return 1.0
            case "w0_trunc":
                return self.US @ self.Vt
            case _:
                return self.R

    def effective_weight(self, W: Tensor) -> Tensor:
        if self.cfg.official_numerics:
            return W * (self.A.bfloat16() @ self.B.bfloat16() + 1).to(self.A.dtype)
        return W + self._R(W) * (self.A @ self.B)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.cfg.official_numerics:
            return super().forward(x, W, bias)
        if self.cfg.R == "w0":
            return hadamard_linear(x, W, self.A, self.B, bias, self.cached)
        x, bias = in_compute_dtype(x, bias)
        with torch.autocast(x.device.type, enabled=False):
            operand = self.cached(str(x.dtype), W, lambda: _operand(W, self._R(W), self.A, self.B, x.dtype))
            return _linear(x, W, operand, bias)

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: HiRAConfig) -> None:
        shape = (out_features, in_features)
        if cfg.R_rank is not None and cfg.R_rank > min(shape):
            raise DoesNotFit(cls, cfg, "R_rank", "must be <= min(out, in)", shape, most=min(shape))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: HiRAConfig) -> int:
        return cfg.r * (in_features + out_features)

    @classmethod
    def num_frozen_extra(cls, in_features: int, out_features: int, cfg: HiRAConfig) -> int:
        if cfg.R_rank is not None:
            return cfg.R_rank * (in_features + out_features)
        return 0 if cfg.R in ("w0", "ones") else in_features * out_features


def hadamard_linear(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, cached: Callable[[str, Tensor, Callable], Tensor]
) -> Tensor:
    """Returns x (W ⊙ (1 + A B))ᵀ + bias; `cached` is the adapter's, so that decoding builds the (n, k) operand once."""
    x, bias = in_compute_dtype(x, bias)
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            return HadamardLinear.apply(x, W, A, B, bias)
        return _linear(x, W, cached(str(x.dtype), W, lambda: _operand(W, W, A, B, x.dtype)), bias)


class HadamardLinear(torch.autograd.Function):
    """y = x M^T + bias with M = W ⊙ (1 + A B), keeping only x: M is built again in backward.

    With δ = ∂y and G = W ⊙ (δᵀ x): ∂x = δ M, ∂A = G Bᵀ, ∂B = Aᵀ G. W is frozen and gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        return _linear(x, W, _operand(W, W, A, B, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        dx = dA = dB = dbias = None
        with torch.autocast(x.device.type, enabled=False):
            dy = dy.reshape(-1, W.shape[0])
            if ctx.needs_input_grad[0]:
                dx = (dy @ hadamard(W, A, B, True, dy.dtype)).reshape(x.shape)
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                G = (dy.T @ x.reshape(-1, W.shape[1])).to(A.dtype).mul_(W)
                dA, dB = G @ B.T, A.T @ G
            if ctx.needs_input_grad[4]:
                dbias = dy.sum(0)
        return dx, None, dA, dB, dbias


def _operand(W: Tensor, R: Tensor | float, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns W' for an input of 32 or 64 bits. In 16 bits W' would round the update away: returns ΔW alone."""
    if R is W:
        return hadamard(W, A, B, dtype.itemsize > 2, dtype)
    update = (A @ B).mul_(R)
    return update.to(dtype) if dtype.itemsize == 2 else update.add_(W)


def _linear(x: Tensor, W: Tensor, operand: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype.itemsize > 2:
        return F.linear(x, operand.to(x.dtype), bias)
    return F.linear(x, W.to(x.dtype), bias) + F.linear(x, operand)
