"""The best low-rank pair of a matrix against PyTorch's singular value decomposition."""

import pytest
import torch

from highrank.model.low_rank import best_low_rank


def matrix(n, k, rank=None):
    torch.manual_seed(0)
    return torch.randn(n, k) if rank is None else torch.randn(n, rank) @ torch.randn(rank, k)


@pytest.mark.parametrize(("n", "k"), [(24, 16), (16, 24), (1, 5), (40, 40)])
@pytest.mark.parametrize("rank", [1, 5])
def test_it_is_the_truncated_decomposition(n, k, rank):
    M = matrix(n, k)
    rank = min(rank, n, k)
    B, A, missed = best_low_rank(M, rank)
    U, S, Vt = torch.linalg.svd(M.double(), full_matrices=False)
    assert (B.shape, A.shape) == ((n, rank), (rank, k))
    torch.testing.assert_close(B.double() @ A.double(), U[:, :rank] * S[:rank] @ Vt[:rank], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(missed, torch.tensor([float(S[i:].square().sum()) for i in range(len(S) + 1)]).double())
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))  # neither factor is small for a cast to 16 bits


@pytest.mark.parametrize(("n", "k"), [(24, 16), (200, 120), (120, 200)])
def test_a_matrix_of_that_rank_is_exact(n, k):
    """The larger ones by a sketch of their range."""
    M = matrix(n, k, rank=3)
    B, A, missed = best_low_rank(M, 4)
    torch.testing.assert_close(B @ A, M, rtol=0, atol=1e-6 * float(M.norm()))
    assert float(missed[2]) > 1e-3 * float(missed[0])
    assert float(missed[4].sqrt()) < 1e-6 * float(missed[0].sqrt())


def test_zero_is_zero():
    B, A, missed = best_low_rank(torch.zeros(6, 4), 2)
    assert not B.any()
    assert not A.any()
    assert not missed.any()
