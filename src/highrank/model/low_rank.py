"""A matrix as the product of two thin ones: the best of a given rank, and what each rank would miss.

Source: Eckart and Young, 1936 (the first r singular triplets are the best approximation of rank r); Halko et al., arXiv
0909.4061, algorithm 4.1 (the range of a matrix from its products with random vectors).
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-6
"""What a product in fp32 leaves behind its rank, relative to the Frobenius norm."""
OVERSAMPLED = 8
"""Columns of a sketch beyond the rank asked for."""


class LowRank(NamedTuple):
    """The best approximation B A of a matrix, as large in B as in A, in fp32."""

    B: Tensor
    """(n, r)."""
    A: Tensor
    """(r, k)."""
    missed: Tensor
    """‖M - M_R‖² of the best M_R of every rank R = 0, 1, …; beyond its end the last one. In fp64."""


@torch.no_grad()
def best_low_rank(M: Tensor, rank: int) -> LowRank:
    """Returns the best approximation of M (n, k) of a rank, or of min(n, k) if that is less, computed in fp64 on a GPU if there is one.

    By the eigenvectors of M Mᵀ, so that a singular value is exact to 1e-8 of the largest. A matrix that has no more than
    that rank, as far as fp32 tells, is recognised by a sketch of its range and not decomposed whole.
    """
    M = M.detach().to("cuda" if torch.cuda.is_available() else "cpu", torch.float64)
    tall = M.shape[0] > M.shape[1]
    M = M.mT if tall else M
    U, squares, rest = _left_vectors(M, rank)
    U, sizes = U[:, :rank], squares[:rank].sqrt().sqrt()
    B, A = U * sizes, torch.where(sizes[:, None] > 0, U.mT @ M / sizes[:, None], 0.0)
    B, A = (A.mT, B.mT) if tall else (B, A)
    missed = squares.flip(0).cumsum(0).flip(0)
    missed = torch.cat([missed, missed.new_zeros(1)]) + rest
    return LowRank(B.float().cpu().contiguous(), A.float().cpu().contiguous(), missed.cpu())


def _left_vectors(M: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Returns left singular vectors of M, the squares of its singular values, and ‖M‖² beyond these, all in fp64."""
    columns = rank + OVERSAMPLED
    if len(M) >= 4 * columns:
        Q = range_of(M, columns)
        inside = Q.mT @ M
        rest = float((M - Q @ inside).norm())
        if rest <= ROUNDING * float(M.norm()):
            U, S, _ = torch.linalg.svd(inside, full_matrices=False)
            return Q @ U, S.square(), rest**2
    squares, U = torch.linalg.eigh(M @ M.mT)
    return U.flip(1), squares.flip(0).clamp(min=0), 0.0


def range_of(M: Tensor, columns: int, power: int = 0) -> Tensor:
    """Returns an orthonormal basis (n, columns) of where M sends random vectors."""
    rng = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(M @ torch.randn(M.shape[1], columns, generator=rng, dtype=M.dtype).to(M.device)).Q
    for _ in range(power):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q).Q).Q
    return Q
