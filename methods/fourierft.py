"""FourierFT: a few entries of the update's Fourier transform.

    W' = W + s Re(F⁻¹(S)),    S[u_t, v_t] = c_t at p chosen places, 0 elsewhere,    F⁻¹ the inverse transform in 2 dimensions

so that ΔW[o, i] = s / (n k) Σ_t c_t cos(2π (u_t o / n + v_t i / k)).

| symbol | shape  | start                                     | trained |
| ------ | ------ | ----------------------------------------- | ------- |
| W      | (n, k) | pretrained                                | no      |
| c      | (p,)   | 0                                         | yes     |
| u, v   | (p,)   | p of the n k places, by random_loc_seed   | no      |

Trainable: p = n_frequency per weight; frozen: as many places. W' = W at the start because c = 0. rank(ΔW) <= min(2 p, n, k).
Weights of one shape share their places.

Source: Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", arXiv 2405.03003, section 3.1
(eqs. 2-4; s = α; the 1 / (n k) is of Algorithm 1's ifft2).
Reference code: huggingface/peft 0.21, tuners/fourierft/layer.py (fourierft_spectrum = c): the same places, entry for entry.
Differences: paper and PEFT start with c ~ N(0, 1), so that W' is not W; here c = 0, which trains as well since ΔW is linear
in c (PEFT's init_weights=True). They build ΔW in every step and keep it; here x is all that is kept. Where it is less work,
ΔW is not built at all: x is transformed along its k entries, p numbers are moved from v to u, and these transformed along n.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fft import ifft, ifft2

from highrank.model.kernels import rebuilt_linear
from highrank.plugin import DoesNotFit, Method, PeftForm, Site, UserError, register_method


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig:
    n_frequency: int = 1000
    """p, entries of the transform that train."""
    scaling: float = 150.0
    """s."""
    random_loc_seed: int = 777
    """Seed of the places, the same for every weight."""

    def __post_init__(self) -> None:
        if self.n_frequency < 1:
            raise UserError(f"fourierft: n_frequency must be >= 1, got n_frequency={self.n_frequency}")
        if self.scaling <= 0:
            raise UserError(f"fourierft: scaling must be > 0, got scaling={self.scaling}")


@register_method(config=FourierFTConfig)
class FourierFT(Method):
    default_lr = 3e-2
    examples = ({"n_frequency": 20}, {"n_frequency": 200, "scaling": 300.0, "random_loc_seed": 3})
    peft = PeftForm(
        type="FOURIERFT",
        fields={key: key for key in ("n_frequency", "scaling", "random_loc_seed")},
        tensors={"c": "fourierft_spectrum"},
    )

    def __init__(self, in_features: int, out_features: int, cfg: FourierFTConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.c = nn.Parameter(torch.empty(cfg.n_frequency))
        self.register_buffer("places", torch.empty(cfg.n_frequency, dtype=torch.int32), persistent=False)

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.c)
        self.places.copy_(_places(W.numel(), self.cfg.n_frequency, self.cfg.random_loc_seed))

    def update(self, c: Tensor) -> Tensor:
        n, k = self.out_features, self.in_features
        return self.cfg.scaling * ifft2(c.new_zeros(n * k).index_copy(0, self.places.long(), c).view(n, k)).real

    def _gradients(self, G: Tensor, c: Tensor) -> tuple[Tensor]:
        """∂c = s Re(F⁻¹(G)) at the places: the transform is symmetric."""
        return (self.cfg.scaling * ifft2(G).real.flatten()[self.places],)

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + self.update(self.c)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias + s Re(F_n⁻¹ S F_k⁻¹ x) on activations, or one dense product with W + ΔW.

        By measurement the former takes tokens (n + k + p), the latter n k (2 + tokens / 1400), in the same unit.
        """
        n, k, tokens = self.out_features, self.in_features, x.numel() // x.shape[-1]
        if not torch.is_grad_enabled() or tokens * (n + k + len(self.c)) > n * k * (2 + tokens / 1400):
            return rebuilt_linear(x, W, self.update, self._gradients, [self.c], bias, self.cached)
        y = F.linear(x, W, bias)
        u, v = self.places.long() // self.in_features, self.places.long() % self.in_features
        with torch.autocast(x.device.type, enabled=False):
            return y + (self.cfg.scaling * Waves.apply(x, self.c, u, v, self.out_features)).to(y.dtype)

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: FourierFTConfig) -> None:
        if cfg.n_frequency > in_features * out_features:
            shape = (out_features, in_features)
            raise DoesNotFit(cls, cfg, "n_frequency", "must be <= out * in", shape, most=in_features * out_features)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: FourierFTConfig) -> int:
        return cfg.n_frequency

    @classmethod
    def num_frozen_extra(cls, in_features: int, out_features: int, cfg: FourierFTConfig) -> int:
        return cfg.n_frequency


@functools.lru_cache(maxsize=8)
def _places(size: int, p: int, seed: int) -> Tensor:
    """Returns the first p of a permutation of all places; a model has few shapes, and many weights of each."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:p].clone()


class Waves(torch.autograd.Function):
    """y = Re(F_n⁻¹ S F_k⁻¹ x) in c's dtype, keeping x and c. With X = F_k⁻¹ x and D = F_n⁻¹ δ of δ = ∂y:
    ∂x = Re(F_k⁻¹ Sᵀ D), ∂c_t = Σ Re(D[u_t] X[v_t]) over tokens; both transforms are symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, u: Tensor, v: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x, c, u, v)
        return _moved(ifft(x.to(c.dtype)), c, v, u, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, c, u, v = ctx.saved_tensors
        dx, dc, D = None, None, ifft(dy.to(c.dtype))
        if ctx.needs_input_grad[0]:
            dx = _moved(D, c, u, v, x.shape[-1]).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dc = (D[..., u] * ifft(x.to(c.dtype))[..., v]).real.reshape(-1, len(c)).sum(0)
        return dx, dc, None, None, None


def _moved(X: Tensor, c: Tensor, start: Tensor, end: Tensor, size: int) -> Tensor:
    """Returns Re(F⁻¹ Y) for Y (..., size) with Y[end_t] = Σ c_t X[start_t]."""
    Y = X.new_zeros(*X.shape[:-1], size).index_add(-1, end, X[..., start] * c)
    return ifft(Y).real
