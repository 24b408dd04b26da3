"""Statistics of a weight update ΔW (n, k), each a function of its singular values σ_1 >= σ_2 >= ... >= 0.

Sources: HyperAdapt (arXiv 2509.18629), figures 3 and 4; HiRA (ICLR 2025), theorem 1 and figures 1, 4, 5, 7, 8, 10, 11.
"""

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

NORMALIZED_RANK_THRESHOLD = 1e-2
COUNT_THRESHOLD = 5e-3
HEAD = 50
EPSILON = float(np.finfo(np.float32).eps)


def numerical_rank(values: Values, shape: tuple[int, int]) -> int:
    """Returns #{σ_i > max(n, k) ε σ_1} with ε of fp32, as `torch.linalg.matrix_rank` counts a matrix of `shape` in fp32.

    Neither paper states its tolerance.
    """
    return int(np.sum(values > max(shape) * EPSILON * values.max(initial=0.0)))


def normalized_rank(values: Values, base_rank: int, relative: bool = False) -> float:
    """Returns #{σ_i >= 1e-2} / rank(W), or with `relative` #{σ_i / σ_1 >= 1e-2} / rank(W) (HyperAdapt, figure 3).

    The paper's threshold is absolute: it measures the update's size as much as its rank. The bound is rank(ΔW) / rank(W),
    which is 2 for HyperAdapt where W is rank-deficient.
    """
    largest = values.max(initial=0.0)
    if largest == 0:
        return 0.0
    return float(np.sum(values >= NORMALIZED_RANK_THRESHOLD * (largest if relative else 1.0))) / base_rank


def count_above(values: Values, threshold: float = COUNT_THRESHOLD) -> int:
    """Returns #{σ_i > threshold} (HiRA, figure 4: 0.005)."""
    return int(np.sum(values > threshold))


def energy(values: Values) -> float:
    """Returns Σ σ_i² = ‖ΔW‖_F² (HiRA, figure 5)."""
    return float(np.sum(values**2))


def effective_rank(values: Values) -> float:
    """Returns exp(-Σ p_i ln p_i), p_i = σ_i / Σ σ, with 0 ln 0 = 0; 0 for ΔW = 0 (HiRA, figures 8 and 11)."""
    positive = values[values > 0]
    if not len(positive):
        return 0.0
    p = positive / positive.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def normalized(values: Values) -> Values:
    """Returns σ / ‖σ‖₂, zeros for ΔW = 0 (HiRA, figure 10, whose curves have a unit sum of squares)."""
    norm = np.linalg.norm(values)
    return values / norm if norm else values


def low_rank_error(values: Values, r: int) -> float:
    """Returns σ_{r+1}, the spectral error of the best approximation of rank r (Eckart and Young)."""
    return float(values[r]) if r < len(values) else 0.0


def expressive_bound(ratio: Values, base: Values, r: int, left_out: float = 0.0) -> float:
    """Returns σ_{r+1}(E ⊘ W) ‖W‖₂ + left_out >= min_X ‖E - W ⊙ X‖₂ over X of rank r (HiRA, theorem 1).

    `ratio` and `base` are the singular values of E ⊘ W and of W; `left_out` is the Frobenius norm of E where E ⊘ W was
    masked, since X stands for nothing there. LoRA's counterpart `low_rank_error` of E is exact, this is an upper bound.
    """
    return low_rank_error(ratio, r) * low_rank_error(base, 0) + left_out
