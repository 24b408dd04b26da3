"""Statistics of singular values against closed forms and longhand formulas."""

import numpy as np
import pytest
import torch

from highrank.analysis import statistics
from highrank.analysis.spectra import ratio, singular_values

GEOMETRIC = 2.0 ** -np.arange(12)  # 1, 1/2, ..., 2^-11


def test_normalized_rank_counts_at_and_above_a_hundredth():
    values = np.array([0.5, 0.02, 0.01, 0.0099, 0.0])
    assert statistics.normalized_rank(values, 10) == 0.3
    assert statistics.normalized_rank(values, 10, relative=True) == 0.4  # 0.01 of 0.5 is 0.005
    assert statistics.normalized_rank(100 * values, 2) == 2.0  # above 1 where W has few ranks
    assert statistics.normalized_rank(1e-3 * values, 10) == 0.0
    assert statistics.normalized_rank(1e-3 * values, 10, relative=True) == 0.4  # whatever the size


def test_count_is_strictly_above():
    assert statistics.count_above(np.array([0.1, 0.0051, 0.005, 0.004])) == 2


def test_energy_is_the_squared_frobenius_norm():
    M = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(statistics.energy(singular_values(M).values), float(M.square().sum()), rtol=1e-12)


@pytest.mark.parametrize(("n", "k", "r"), [(30, 20, 5), (20, 30, 20), (8, 8, 1)])
def test_numerical_rank_is_numpys(n, k, r):
    rng = np.random.default_rng(0)
    M = (rng.normal(size=(n, r)) @ rng.normal(size=(r, k))).astype(np.float32)
    values = singular_values(torch.from_numpy(M)).values
    assert statistics.numerical_rank(values, (n, k)) == r == np.linalg.matrix_rank(M)


def test_numerical_rank_has_its_tolerance_at_max_n_k_eps_of_the_largest():
    edge = 100 * 2.0**-23  # eps of fp32 is 2^-23
    assert statistics.numerical_rank(np.array([1.0, 1.01 * edge]), (100, 2)) == 2
    assert statistics.numerical_rank(np.array([1.0, 0.99 * edge]), (100, 2)) == 1
    assert statistics.numerical_rank(np.array([1e-6, 1.01e-6 * edge]), (2, 100)) == 2


def test_effective_rank():
    assert statistics.effective_rank(np.full(7, 0.3)) == pytest.approx(7)
    assert statistics.effective_rank(np.array([2.0, 0.0, 0.0])) == pytest.approx(1)
    # p_i = 2^-i up to 2^-11 of their sum: the entropy of a geometric law of 1/2 is 2 ln 2
    assert statistics.effective_rank(2.0 ** -np.arange(60)) == pytest.approx(4)
    p = GEOMETRIC / GEOMETRIC.sum()
    assert statistics.effective_rank(GEOMETRIC) == pytest.approx(np.prod(p**-p))
    assert statistics.effective_rank(5 * GEOMETRIC) == pytest.approx(statistics.effective_rank(GEOMETRIC))


def test_normalized_has_a_unit_sum_of_squares():
    found = statistics.normalized(np.array([3.0, 4.0, 0.0]))
    np.testing.assert_allclose(found, [0.6, 0.8, 0.0])


def test_a_zero_update():
    zeros = singular_values(torch.zeros(5, 3)).values
    assert zeros.tolist() == [0, 0, 0]
    assert statistics.numerical_rank(zeros, (5, 3)) == 0
    assert statistics.normalized_rank(zeros, 3) == statistics.normalized_rank(zeros, 3, relative=True) == 0
    assert statistics.count_above(zeros) == statistics.energy(zeros) == statistics.effective_rank(zeros) == 0
    assert statistics.normalized(zeros).tolist() == [0, 0, 0]


def test_the_toy_example_of_hira_theorem_1():
    E, W = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[4.0, 2.0], [1.0, 2.0]])
    quotient, masked, left_out = ratio(E, W, tiny=1e-8)
    assert (masked, left_out) == (0, 0.0)
    values = [singular_values(M).values for M in (quotient, W, E)]
    assert statistics.expressive_bound(values[0], values[1], 1) == pytest.approx(0, abs=1e-15)
    assert statistics.low_rank_error(values[2], 1) == pytest.approx(1)
    assert statistics.low_rank_error(values[2], 2) == 0  # rank 2 is all there is


@pytest.mark.parametrize("r", [0, 1, 3, 6])
def test_the_bound_holds_for_the_truncated_quotient(r):
    """W ⊙ X, with X the best approximation of rank r of E ⊘ W, is a HiRA update: its error is below the bound."""
    rng = torch.Generator().manual_seed(1)
    E, W = (torch.randn(8, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    W[0, 0], W[3, 2], W[5, 5] = 0.0, 1e-9, -1e-9
    quotient, masked, left_out = ratio(E, W, tiny=1e-8)
    assert masked == 3
    assert left_out == pytest.approx(float(torch.stack([E[0, 0], E[3, 2], E[5, 5]]).norm()))
    U, S, Vt = torch.linalg.svd(quotient, full_matrices=False)
    X = (U[:, :r] * S[:r]) @ Vt[:r]
    error = float(torch.linalg.matrix_norm(E - W * X, 2))
    bound = statistics.expressive_bound(S.numpy(), torch.linalg.svdvals(W).numpy(), r, left_out)
    assert error <= bound + 1e-12
    if r == 6:  # all that is left is what was masked
        assert 0 < error <= left_out
        assert bound == pytest.approx(left_out)


def test_the_quotient_is_zero_where_masked_and_exact_elsewhere():
    E, W = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 4.0], [1e-3, -2.0]])
    quotient, masked, left_out = ratio(E, W, tiny=1e-2)
    assert quotient.tolist() == [[0.0, 0.5], [0.0, -2.0]]
    assert masked == 2
    assert left_out == pytest.approx(10**0.5)
    assert ratio(E, W, tiny=0.0)[1] == 1  # an exact zero is always masked


class TestSingularValues:
    def matrix(self, n, k, r=None):
        rng = torch.Generator().manual_seed(n + k)
        if r is None:
            return torch.randn(n, k, generator=rng)
        return torch.randn(n, r, generator=rng) @ torch.randn(r, k, generator=rng)

    @pytest.mark.parametrize(("n", "k"), [(5, 5), (40, 17), (17, 40), (300, 260)])
    def test_exact(self, n, k):
        M = self.matrix(n, k)
        found = singular_values(M)
        expected = np.linalg.svd(M.double().numpy(), compute_uv=False)
        assert found.error == 0
        np.testing.assert_allclose(found.values, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("n", "k"), [(300, 260), (260, 300)])
    def test_an_update_of_low_rank_is_found_by_its_range(self, n, k):
        """fp32 leaves rounding behind the rank, and the stated error covers it."""
        M = self.matrix(n, k, r=4)
        found = singular_values(M)
        expected = np.linalg.svd(M.double().numpy(), compute_uv=False)
        assert 0 < found.error <= 1e-6 * np.linalg.norm(M)
        assert len(found.values) == 260
        assert statistics.numerical_rank(found.values, (n, k)) == 4
        slack = 1e-12 * expected[0]
        assert (found.values <= expected + slack).all()
        assert (expected <= found.values + found.error + slack).all()

    @pytest.mark.parametrize(("r", "noise"), [(70, 0.0), (4, 1e-4)])
    def test_what_only_looks_like_low_rank_is_decomposed_exactly(self, r, noise):
        """More than the 64 columns tried, or small values behind the rank that are no rounding."""
        M = self.matrix(300, 260, r=r) + noise * self.matrix(300, 260)
        found = singular_values(M)
        assert found.error == 0
        expected = np.linalg.svd(M.double().numpy(), compute_uv=False)
        np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12)
        assert statistics.numerical_rank(found.values, (300, 260)) == r

    @pytest.mark.parametrize("columns", [1, 8, 32])
    def test_a_randomised_one_states_its_error(self, columns):
        M = self.matrix(60, 50) @ torch.diag(0.8 ** torch.arange(50))
        found = singular_values(M, sketch=columns)
        expected = np.linalg.svd(M.double().numpy(), compute_uv=False)
        assert (found.values <= expected + 1e-12).all()
        assert (expected <= found.values + found.error + 1e-12).all()
        assert (found.values[columns:] == 0).all()
        # Nothing is wasted: what lies outside the sketch is at least the best approximation's error.
        assert found.error >= np.linalg.norm(expected[columns:]) - 1e-12
        assert found.error <= 2 * np.linalg.norm(expected[columns:])
        assert found.values[0] == pytest.approx(expected[0], rel=0.01)

    def test_a_sketch_as_wide_as_the_matrix_is_exact(self):
        M = self.matrix(20, 30)
        assert singular_values(M, sketch=20).error == 0
