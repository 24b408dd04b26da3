"""OFT: orthogonal fine-tuning, the inputs turned block by block (version 2).

    W' = W blkdiag(R_1, ..., R_{k/b})ᵀ,    S_g = skew-symmetric, θ_g row by row above its diagonal, -θ_g below it
    neumann:  R_g = I + 2 (S_g + ... + S_g^(t-2)) + S_g^(t-1)  ≈ (I + S_g) (I - S_g)⁻¹      (t terms of the series)
    exact:    R_g = (I - S_g) (I + S_g)⁻¹                                                   (Cayley)

| symbol | shape               | start      | trained |
| ------ | ------------------- | ---------- | ------- |
| W      | (n, k)              | pretrained | no      |
| θ      | (k/b, b (b - 1)/2)  | 0          | yes     |

With `block_share` θ is (1, b (b - 1)/2): all blocks turn alike.

Trainable: k (b - 1)/2 per weight, or b (b - 1)/2 if shared. W' = W at the start because S = 0 makes every R_g = I. rank(ΔW) <=
min(n, k). The exact form keeps the lengths of W's rows; the series, which needs no inverse, keeps them nearly, if
the singular values of S are well below 1. The exact form turns the other way for the same θ: it is BOFT with one factor,
its R_ij = S_g and s = 1.

Source: Qiu et al., "Orthogonal Finetuning Made Scalable", arXiv 2506.19847, sections 3.2 (inputs are turned in place of
weights, eq. 2) and 3.3 (the series); Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280 (blocks).
Reference code: huggingface/peft 0.21, tuners/oft/layer.py (oft_R.weight = θ, r = block_num, oft_block_size = block_size,
use_cayley_neumann = neumann, num_cayley_neumann_terms = terms).
Differences: PEFT takes the next divisor where b does not divide k; here that is an error. Its series of 3 terms is the one
of 4, and of 2 or 1 is another: 4 is the least here. Its constraint (coft) and dropout of blocks are off by default and
absent here. It turns a copy of x in fp32; here, in 16 bits, (R - I) x is added to x, so that nothing of a small angle is lost in R.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.plugin import DoesNotFit, Method, PeftForm, Site, UserError, register_method


@dataclass(frozen=True, kw_only=True)
class OFTConfig:
    block_size: int = 32
    """b, inputs per rotation; 0 to give block_num instead."""
    block_num: int = 0
    """k / b, rotations per weight; 0 to give block_size instead."""
    block_share: bool = False
    """Whether all blocks of a weight turn alike."""
    neumann: bool = True
    """Whether the rotation is the truncated series, or exact."""
    terms: int = 5
    """t, terms of the series; for neumann=true alone."""

    def __post_init__(self) -> None:
        for name in ("block_size", "block_num"):
            if getattr(self, name) < 0:
                raise UserError(f"oft: {name} must be >= 0, got {name}={getattr(self, name)}")
        if (self.block_size == 0) == (self.block_num == 0):
            raise UserError(
                f"oft: exactly one of block_size and block_num must be 0, got block_size={self.block_size}, "
                f"block_num={self.block_num}"
            )
        if self.terms < 4:
            raise UserError(f"oft: terms must be >= 4, got terms={self.terms}; PEFT's series of 3 terms is that of 4")
        if not self.neumann and self.terms != 5:
            raise UserError(f"oft: terms belongs to neumann=true, got terms={self.terms} with neumann=false")
        if self.terms > 100:
            raise UserError(f"oft: terms must be <= 100, got terms={self.terms}; neumann=false is the series' limit")

    def b(self, in_features: int) -> int:
        return self.block_size or in_features // self.block_num


@register_method(config=OFTConfig)
class OFT(Method):
    default_lr = 2.5e-4
    examples = (
        {"block_size": 4},
        {"block_size": 8, "terms": 6},
        {"block_size": 4, "neumann": False},
        {"block_size": 0, "block_num": 2, "block_share": True},
        {"block_size": 8, "block_share": True, "neumann": False},
    )
    peft = PeftForm(
        type="OFT",
        fields={
            "block_size": "oft_block_size",
            "block_num": "r",
            "block_share": "block_share",
            "neumann": "use_cayley_neumann",
            "terms": "num_cayley_neumann_terms",
        },
        computed={"num_cayley_neumann_terms": lambda cfg: cfg.terms},
        read=lambda fields, tensors: fields if fields["neumann"] else {**fields, "terms": 5},  # not used there
        fixed={"peft_version": "0.18.0"},  # PEFT asks for it
        since="0.18.0",  # before, the series had another last term
        ignored=("eps", "module_dropout"),  # eps is coft's
        tensors={"theta": "oft_R.weight"},
        linear_only=True,
    )

    def __init__(self, in_features: int, out_features: int, cfg: OFTConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        b = cfg.b(in_features)
        self.theta = nn.Parameter(torch.empty(1 if cfg.block_share else in_features // b, b * (b - 1) // 2))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.theta)

    def turn(self) -> Tensor:
        """Returns R - I block by block, (k/b, b, b), or one block if shared."""
        b = self.cfg.b(self.in_features)
        rows, columns = torch.triu_indices(b, b, 1, device=self.theta.device)
        S = (
            self.theta.new_zeros(len(self.theta), b * b)
            .index_copy(1, rows * b + columns, self.theta)
            .unflatten(1, (b, b))
        )
        S = S - S.mT
        with torch.autocast(S.device.type, enabled=False):
            if not self.cfg.neumann:
                return torch.linalg.solve(torch.eye(b, dtype=S.dtype, device=S.device) + S, -2 * S)
            power, total = S, 2 * S
            for _ in range(self.cfg.terms - 3):
                power = power @ S
                total = total + 2 * power
            return total + power @ S

    def effective_weight(self, W: Tensor) -> Tensor:
        turn = self.turn()
        dtype = torch.promote_types(W.dtype, turn.dtype)
        return W + _times(W.to(dtype), turn.mT.to(dtype))

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = W (R x) + bias, each block of R on its slice of x."""
        if x.dtype.itemsize < 4:
            turn = self.cached("turn", W, lambda: self.turn().to(x.dtype))
            return F.linear((x + _times(x, turn)).to(x.dtype), W, bias)
        R = self.cached("R", W, lambda: self.turn() + torch.eye(self.cfg.b(self.in_features), device=x.device)).to(
            x.dtype
        )
        return F.linear(_times(x, R).to(x.dtype), W, bias)

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: OFTConfig) -> None:
        name = "block_size" if cfg.block_size else "block_num"
        if in_features % getattr(cfg, name) or cfg.b(in_features) < 2:
            rule, shape = "must divide in_features into blocks of at least 2", (out_features, in_features)
            raise DoesNotFit(cls, cfg, name, rule, shape, divides=(in_features,))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: OFTConfig) -> int:
        b = cfg.b(in_features)
        return (1 if cfg.block_share else in_features // b) * b * (b - 1) // 2


def _times(x: Tensor, turn: Tensor) -> Tensor:
    """Returns x blkdiag(turn): x (..., k), turn (k/b, b, b), or (1, b, b) for every block."""
    blocks = x.unflatten(-1, (-1, turn.shape[-1]))
    if len(turn) == 1:
        return (blocks @ turn[0]).flatten(-2)
    return torch.einsum("...cg,cgh->...ch", blocks, turn).flatten(-2)
