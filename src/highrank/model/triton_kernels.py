"""Kernels for a GPU in Triton, which comes with PyTorch's builds for one: what `kernels` takes there in place of its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_K = 64, 64
"""Rows and columns of W' that one program makes. 64 x 128 and 128 x 128 were slower on an H100."""


def hadamard(W: Tensor, A: Tensor, B: Tensor, with_one: bool, dtype: torch.dtype) -> Tensor:
    """Returns W ⊙ (A B), or with a one W ⊙ (1 + A B), (n, k): each entry is computed in fp32 and rounded once.

    Shapes: W (n, k), A (n, r) and B (r, k) in fp32; A B itself is never written to memory.
    """
    (n, k), r = W.shape, A.shape[1]
    W, A, B = W.contiguous(), A.contiguous(), B.contiguous()
    found = torch.empty(n, k, dtype=dtype, device=W.device)
    block_r = min(32, max(16, triton.next_power_of_2(r)))
    with torch.cuda.device(W.device):
        _hadamard[triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K)](
            W, A, B, found, n, k, r, with_one, BLOCK_N, BLOCK_K, block_r
        )
    return found


@triton.jit
def _hadamard(  # type: ignore[no-untyped-def]
    W,
    A,
    B,
    found,
    n,
    k,
    r,
    with_one: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_r: tl.constexpr,
):
    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)[:, None]
    columns = tl.program_id(1) * block_k + tl.arange(0, block_k)[None, :]
    AB = tl.zeros((block_n, block_k), tl.float32)
    for start in range(0, r, block_r):
        ranks = start + tl.arange(0, block_r)
        a = tl.load(A + rows * r + ranks[None, :], mask=(rows < n) & (ranks[None, :] < r), other=0.0)
        b = tl.load(B + ranks[:, None] * k + columns, mask=(ranks[:, None] < r) & (columns < k), other=0.0)
        AB += tl.dot(a, b, input_precision="ieee")
    entries = rows.to(tl.int64) * k + columns
    inside = (rows < n) & (columns < k)
    w = tl.load(W + entries, mask=inside, other=0.0).to(tl.float32)
    product = w * AB
    if with_one:
        product += w
    tl.store(found + entries, product.to(found.dtype.element_ty), mask=inside)
