"""C3A: the update is made of circulant blocks, that is of circular convolutions.

    W' = W + ΔW,    block (i, j) of ΔW, of b x b, has c_ij[(q - p) mod b] / k at its row p and column q

| symbol | shape          | start      | trained |
| ------ | -------------- | ---------- | ------- |
| W      | (n, k)         | pretrained | no      |
| c      | (n/b, k/b, b)  | 0          | yes     |

Trainable: n k / b per weight. W' = W at the start because c = 0. rank(ΔW) <= min(n, k). b = 1 is any update at all.

Source: Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv 2407.19342, sections 3.2 (eq. 1,
by the fast Fourier transform) and 3.4 (eqs. 3-4, blocks; the division by k is of the code).
Reference code: huggingface/peft 0.21, tuners/c3a (c3a_kernel = c).
Differences: PEFT's backward gives x another gradient than its forward has: it reads c in the other direction, so that what
lies below is trained by a wrong one. Here it is the derivative. PEFT starts c at random by default, U(±√(6 / (n + k))), with
W' near W; here c = 0, which trains as well since ΔW is linear in c. It transforms x to complex numbers of full length and
keeps them; here half of them are enough, and x is kept and transformed again in backward.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fft import irfft, rfft

from highrank.model.kernels import updated_linear
from highrank.plugin import DoesNotFit, Method, PeftForm, Site, UserError, register_method


@dataclass(frozen=True, kw_only=True)
class C3AConfig:
    block_size: int = 64
    """b, rows and columns of a block; divides every adapted weight's."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UserError(f"c3a: block_size must be >= 1, got block_size={self.block_size}")


@register_method(config=C3AConfig)
class C3A(Method):
    default_lr = 0.3
    examples = ({"block_size": 4}, {"block_size": 8}, {"block_size": 1})
    peft = PeftForm(type="C3A", fields={"block_size": "block_size"}, tensors={"c": "c3a_kernel"}, linear_only=True)

    def __init__(self, in_features: int, out_features: int, cfg: C3AConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        b = cfg.block_size
        self.c = nn.Parameter(torch.empty(out_features // b, in_features // b, b))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.c)

    def update(self) -> Tensor:
        p = torch.arange(self.cfg.block_size, device=self.c.device)
        blocks = self.c[:, :, (p - p[:, None]) % self.cfg.block_size]
        return blocks.transpose(1, 2).reshape(self.out_features, self.in_features) / self.in_features

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + self.update()

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias + the correlations, in a step by the Fourier transform of blocks of x: no (n, k) update exists."""
        if not torch.is_grad_enabled():
            return updated_linear(x, W, self.update, bias, self.cached)
        y = F.linear(x, W, bias)
        with torch.autocast(x.device.type, enabled=False):
            return y + (Correlations.apply(x, self.c) / self.in_features).to(y.dtype)

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: C3AConfig) -> None:
        if in_features % cfg.block_size or out_features % cfg.block_size:
            shape = (out_features, in_features)
            raise DoesNotFit(cls, cfg, "block_size", "must divide in_features and out_features", shape, divides=shape)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: C3AConfig) -> int:
        return in_features * out_features // cfg.block_size


class Correlations(torch.autograd.Function):
    """y_i[p] = Σ_j Σ_q c_ij[(q - p) mod b] x_j[q], in c's dtype, keeping x and c.

    With X, C, Y the transforms along b: Y_i = Σ_j X_j C̄_ij. With those of δ = ∂y, D: ∂X_j = Σ_i D_i C_ij,
    ∂C_ij = Σ D̄_i X_j over tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, c)
        return _back(torch.einsum("tjf,ijf->tif", _transformed(x, c), rfft(c).conj()), c).reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, c = ctx.saved_tensors
        dx, dc, D = None, None, _transformed(dy, c)
        if ctx.needs_input_grad[0]:
            dx = _back(torch.einsum("tif,ijf->tjf", D, rfft(c)), c).reshape(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dc = _back(torch.einsum("tif,tjf->ijf", D.conj(), _transformed(x, c)), c)
        return dx, dc


def _transformed(x: Tensor, c: Tensor) -> Tensor:
    """Returns the transforms of blocks of x, (tokens, blocks, b // 2 + 1)."""
    return rfft(x.reshape(-1, x.shape[-1] // c.shape[-1], c.shape[-1]).to(c.dtype))


def _back(X: Tensor, c: Tensor) -> Tensor:
    return irfft(X, n=c.shape[-1])
