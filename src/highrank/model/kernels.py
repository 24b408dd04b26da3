"""Autograd functions that several methods share: the same numbers as the plain operations, in less time and memory."""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from highrank.model.quantised import QuantisedWeight

HAS_TRITON = bool(
    torch.version.cuda and importlib.util.find_spec("triton")
)  # the build: to ask for a device starts CUDA
if HAS_TRITON:
    from highrank.model import triton_kernels

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What the faster forms of the methods are written for, in inputs and weights."""


def handles(x: Tensor, W: Tensor) -> bool:
    """Whether the faster forms take these dtypes; if not, it says so, once per pair of them."""
    known = x.dtype in DTYPES and W.dtype in DTYPES
    if not known:
        _tell(x.dtype, W.dtype)
    return known


@functools.cache
def _tell(x: torch.dtype, W: torch.dtype) -> None:
    warnings.warn(
        f"kernels: a method's faster form is for {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got an input "
        f"of {x} on a weight of {W}; it is computed by its definition, which builds W' in every call",
        stacklevel=4,
    )


def in_compute_dtype(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Casts as autocast would before a linear layer, so that it can be switched off around fp32 arithmetic."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, None if bias is None else bias.to(x.dtype)


def is_added_apart(x: Tensor, W: Tensor) -> bool:
    """Whether ΔW x is a product of its own beside W x: in 16 bits W + ΔW would round a small ΔW away, and a quantised W
    has no matrix to add it to."""
    return x.dtype.itemsize < 4 or isinstance(W, QuantisedWeight)


def updated_linear(
    x: Tensor,
    W: Tensor,
    update: Callable[[], Tensor],
    bias: Tensor | None,
    cached: Callable[[str, Tensor, Callable], Tensor],
) -> Tensor:
    """Returns x (W + update())ᵀ + bias for an update (n, k) that has no cheaper form; `cached` is the adapter's, so that
    decoding builds it once."""
    x, bias = in_compute_dtype(x, bias)
    with torch.autocast(x.device.type, enabled=False):
        if is_added_apart(x, W):
            delta = cached(f"update {x.dtype}", W, lambda: update().to(x.dtype))
            return F.linear(x, W if isinstance(W, QuantisedWeight) else W.to(x.dtype), bias) + F.linear(x, delta)
        return F.linear(x, cached(f"sum {x.dtype}", W, lambda: (W + update()).to(x.dtype)), bias)


def rebuilt_linear(
    x: Tensor,
    W: Tensor,
    update: Callable[..., Tensor],
    gradients: Callable[..., tuple[Tensor | None, ...]],
    operands: Sequence[Tensor],
    bias: Tensor | None,
    cached: Callable[[str, Tensor, Callable], Tensor],
) -> Tensor:
    """Returns x (W + update(*operands))ᵀ + bias, keeping x and the operands for backward: the update (n, k) is built again.

    `gradients(G, *operands)` returns those of the operands from G = δᵀ x, the update's own; it may write into G. An update
    of W has W itself as the first operand.
    """
    if not torch.is_grad_enabled():
        return updated_linear(x, W, lambda: update(*operands), bias, cached)
    x, bias = in_compute_dtype(x, bias)
    with torch.autocast(x.device.type, enabled=False):
        if operands[0] is W:
            return RebuiltLinear.apply(x, W, bias, update, gradients, True, *operands[1:])
        if isinstance(W, QuantisedWeight):  # its matrix is not needed
            return F.linear(x, W, bias) + RebuiltLinear.apply(x, None, None, update, gradients, False, *operands)
        return RebuiltLinear.apply(x, W, bias, update, gradients, False, *operands)


class RebuiltLinear(torch.autograd.Function):
    """y = x (W + U)ᵀ + bias with the update U, or x Uᵀ without a W. With δ = ∂y: ∂x = δ (W + U), ∂U = δᵀ x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor | None,
        bias: Tensor | None,
        update: Any,
        gradients: Any,
        of_W: bool,
        *rest: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, W, *rest)
        ctx.update, ctx.gradients, ctx.of_W = update, gradients, of_W
        U = update(W, *rest) if of_W else update(*rest)
        if W is None:
            return F.linear(x, U.to(x.dtype), bias)
        if x.dtype.itemsize < 4:
            return F.linear(x, W.to(x.dtype), bias) + F.linear(x, U.to(x.dtype))
        return F.linear(x, _added(U, W).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *rest = ctx.saved_tensors
        operands = (W, *rest) if ctx.of_W else tuple(rest)
        dx = dbias = None
        of_operands: tuple[Tensor | None, ...] = (None,) * len(operands)
        with torch.autocast(x.device.type, enabled=False):
            rows = dy.reshape(-1, dy.shape[-1])
            if ctx.needs_input_grad[0]:
                U = ctx.update(*operands)
                dx = (rows @ (U if W is None else _added(U, W)).to(rows.dtype)).view(x.shape)
                del U
            if any(ctx.needs_input_grad[6:]):
                G = rows.T @ x.reshape(-1, x.shape[-1])
                of_operands = ctx.gradients(G.to(rest[0].dtype), *operands)
            if ctx.needs_input_grad[2]:
                dbias = rows.sum(0)
        return dx, None, dbias, None, None, None, *of_operands[len(operands) - len(rest) :]


def _added(U: Tensor, W: Tensor) -> Tensor:
    """Returns W + U, in U's place where its dtype can hold the sum."""
    return U.add_(W) if U.dtype == torch.promote_types(U.dtype, W.dtype) else U + W


def hadamard(W: Tensor, A: Tensor, B: Tensor, with_one: bool, dtype: torch.dtype) -> Tensor:
    """Returns W ⊙ (A B), or with a one W ⊙ (1 + A B), (n, k), computed in A's dtype; W (n, k), A (n, r), B (r, k)."""
    if _has_gpu_kernel(W, A):
        return triton_kernels.hadamard(W, A, B, with_one, dtype)
    AB = A @ B
    if not with_one:
        return AB.mul_(W).to(dtype)
    merged = (
        torch.addcmul(W, W, AB, out=AB) if W.dtype == AB.dtype else AB.mul_(W).add_(W)
    )  # one pass over memory, or two
    return merged.to(dtype)


def _has_gpu_kernel(W: Tensor, A: Tensor) -> bool:
    """Whether Triton is here and takes these: plain fp32 factors of a plain weight (none in shards, none quantised)."""
    return (
        HAS_TRITON
        and W.is_cuda
        and A.dtype == torch.float32
        and W.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(type(t) in (Tensor, nn.Parameter) for t in (W, A))
        and not torch.compiler.is_compiling()
    )


def hadamard_low_rank_linear(
    x: Tensor,
    W: Tensor,
    factors: tuple[Tensor, Tensor, Tensor, Tensor],
    scaling: float,
    bias: Tensor | None,
    cached: Callable[[str, Tensor, Callable], Tensor],
) -> Tensor:
    """Returns x (W + scaling (B1 A1) ⊙ (B2 A2))ᵀ + bias for `factors` B1 (n, r1), A1 (r1, k), B2 (n, r2), A2 (r2, k).

    The update is B* A* with the rows b1 ⊗ b2 in B* and the columns a1 ⊗ a2 in A* (Khatri-Rao products): two thin products
    of inner size r1 r2. Where that is more work than to build the update, it is built, and again in backward.
    """
    B1, A1, B2, A2 = factors
    if is_thin(len(B1), A1.shape[1], len(A1) * len(A2)):
        A = cached(f"A* {x.dtype}", W, lambda: (A1[:, None] * A2).flatten(0, 1))
        B = cached(f"B* {x.dtype}", W, lambda: (B1[:, :, None] * B2[:, None]).flatten(1))
        return low_rank_linear(x, W, A, B, scaling, bias)

    def update(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
        return hadamard_low_rank(B1, A1, B2, A2, scaling)

    def gradients(G: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> tuple[Tensor, ...]:
        first = (B2 @ A2).mul_(G.mul_(scaling))
        second = G.mul_(B1 @ A1)
        return first @ A1.T, B1.T @ first, second @ A2.T, B2.T @ second

    return rebuilt_linear(x, W, update, gradients, factors, bias, cached)


def hadamard_low_rank(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, scaling: float) -> Tensor:
    """Returns scaling (B1 A1) ⊙ (B2 A2), (n, k)."""
    return (scaling * B1 @ A1) * (B2 @ A2)


def is_thin(n: int, k: int, r: int) -> bool:
    """Whether three products with thin factors, of inner size r, take less than the one dense product more that an update
    (n, k) takes that is built: δᵀ x."""
    return 3 * r * (n + k) <= n * k


def low_rank_linear(
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns x (W + scaling B A)ᵀ + bias as two thin products beside the dense one; keeps x and x Aᵀ for backward.

    Shapes: x (..., k), W (n, k) frozen, A (r, k), B (n, r). A and B take x's dtype in the products, gradients theirs.
    With frozen `start` = (A0, B0) it is x (W + scaling (B A - B0 A0))ᵀ + bias.
    """
    if isinstance(W, QuantisedWeight):
        A, B = moved_pair(A, B, start)
        return F.linear(x, W, bias) + F.linear(F.linear(x, A.to(x.dtype)), (scaling * B).to(x.dtype))
    x, bias = in_compute_dtype(x, bias)
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            y = LowRankLinear.apply(rows, W, A, B, scaling, bias, *(start or ()))
        else:  # of one token's product the autograd function takes more than its arithmetic
            A, B = moved_pair(A, B, start)
            update = F.linear(F.linear(rows, A.to(x.dtype)), B.to(x.dtype))
            y = F.linear(rows, W.to(x.dtype), bias).add_(update, alpha=scaling)
    return y.view(*x.shape[:-1], len(W))


def moved_pair(A: Tensor, B: Tensor, start: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Returns A and B, or with a start (A0, B0) a pair of rank 2 r whose product is B A - B0 A0.

    It is (B - B0) A + B0 (A - A0): 0 at the start, and near it no rounding of A and B to 16 bits touches it.
    """
    if not start:
        return A, B
    A0, B0 = start
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s h Bᵀ with h = x Aᵀ, x (T, k). With δ = ∂y and ∂h = s δ B: ∂x = δ W + ∂h A, ∂A = ∂hᵀ x,
    ∂B = s δᵀ h. The thin products are added into the results of the dense ones.

    With a start, A and B are those of `moved_pair`, in both halves of which A moves, and B in the first; h is kept of that.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None, *start: Tensor
    ) -> Tensor:
        right, left = moved_pair(A, B, start)
        h = F.linear(x, right.to(x.dtype))
        ctx.save_for_backward(x, W, A, B, h[:, : len(A)].clone() if start else h, *start)
        ctx.scaling = scaling
        return F.linear(x, W.to(x.dtype), bias).addmm_(h, left.to(x.dtype).T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h, *start = ctx.saved_tensors
        right, left = moved_pair(A, B, start)
        dh = (dy @ left.to(dy.dtype)).mul_(ctx.scaling)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ W.to(dy.dtype)).addmm_(dh, right.to(dy.dtype))
        if start:
            dh = dh[:, : len(A)] + dh[:, len(A) :]
        dA, dB = (dh.T @ x).to(A.dtype), (dy.T @ h).to(B.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[5]:
            dbias = dy.sum(0)
        return dx, None, dA, dB, None, dbias, *(None for _ in start)


def row_scaled(z: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns scale ⊙ z + bias in z's dtype, multiplied in the wider of both; z (..., n) must not be used afterwards."""
    return RowScaled.apply(z, scale, None if bias is None else bias.to(z.dtype))


class RowScaled(torch.autograd.Function):
    """y = scale ⊙ z + bias. ∂scale = Σ δ z needs z, or, without a bias, y / scale.

    y costs nothing where what follows keeps it too, and takes z's place in memory, so it is kept on a CPU unless a scale
    is 0; to change y in place is then an error in backward. Elsewhere z is: to look for a 0 would make a GPU wait.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        looks = z.device.type == "cpu" and not torch.compiler.is_compiling()
        ctx.keeps_y = looks and bias is None and bool((scale != 0).all())
        if ctx.keeps_y:
            y = z.mul_(scale)
            ctx.mark_dirty(z)
        else:
            y = scale * z if bias is None else torch.addcmul(bias, scale, z)
            y = y.to(z.dtype)
        ctx.save_for_backward(y if ctx.keeps_y else z, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale = ctx.saved_tensors
        dz = dscale = dbias = None
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            dscale = (rows * kept.reshape(rows.shape)).sum(0, dtype=scale.dtype)
            if ctx.keeps_y:
                dscale = dscale / scale
        if ctx.needs_input_grad[0]:
            dz = (dy * scale).to(dy.dtype)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dz, dscale, dbias


def scales_weight(x: Tensor, W: Tensor, a: Tensor | None, b: Tensor | None) -> bool:
    """Whether diag(a) W diag(b) is built, once forward and once backward, instead of scaling activations by its vectors, of
    which one may be missing.

    In 16 bits always: b ⊙ x would be rounded back to x where b is within 2^-9 of 1, and so would a ⊙ z, while of the
    entries of W' a part moves. In more bits, where building it rounds nothing that matters: on a CPU, where every pass over
    memory tells, if that is fewer numbers to touch, and without a 0 in a or b, by which `ScaledWeightLinear` divides.
    """
    if (
        isinstance(W, QuantisedWeight)
        or x.dtype != W.dtype
        or torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()
    ):
        return False
    narrow = x.dtype.itemsize < 4
    if x.device.type != "cpu":  # to look for a 0 would make a GPU wait
        return narrow
    vectors, tokens = [v for v in (a, b) if v is not None], x.numel() // x.shape[-1]
    fewer = tokens * sum(map(len, vectors)) > 2 * W.numel()
    return (narrow or fewer) and all(bool((v != 0).all()) for v in vectors)


def scaled_weight(W: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Returns diag(a) W diag(b) in W's dtype, rounded once."""
    if b is None:
        return (W if a is None else W * a[:, None]).to(W.dtype)
    scaled = W * b
    return (scaled if a is None else scaled.mul_(a[:, None])).to(W.dtype)


class ScaledWeightLinear(torch.autograd.Function):
    """y = x W'^T + bias with W' = diag(a) W diag(b), x (T, k), keeping x and z = y - bias; a or b may be None, for ones.

    With δ = ∂y: ∂x = δ W', ∂a = Σ δ z / a, ∂b = Σ x ∂x / b, because z = a (W (b ⊙ x)) and ∂x = b (Wᵀ (a ⊙ δ)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None) -> Tensor:
        z = F.linear(x, scaled_weight(W, a, b))
        ctx.save_for_backward(None if b is None else x, W, a, b, None if a is None else z)
        return z if bias is None else z + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, a, b, z = ctx.saved_tensors
        dx = da = db = None
        if ctx.needs_input_grad[0] or b is not None:
            dx = dy @ scaled_weight(W, a, b)
        if a is not None:
            da = (dy * z).sum(0, dtype=a.dtype).div_(a.where(a != 0, 1))
        if b is not None:
            db = (x * dx).sum(0, dtype=b.dtype).div_(b.where(b != 0, 1))
        dbias = dy.sum(0) if ctx.needs_input_grad[4] else None
        return dx, None, da, db, dbias
