"""Statistics of a report: intervals and paired tests in which seeds and test examples are both random draws.

A score is the unweighted mean over test sets t of the mean over seeds s and examples i of x[t][s, i], in percent or nats. Runs of
one arm see the same examples under every seed, so seeds and examples cross. With one seed nothing is said about seeds:
there is no deviation, no interval and no test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = Sequence[NDArray[np.float64]]
"""Per test set, (seeds, examples): what each example adds to the mean, in percent or nats."""
DRAWS = 4000
LEVEL = 0.95
ALPHA = 0.05
LOSS = "loss"
"""The metric of the gold answers, in nats per token, of which less is better; every other is in percent."""


def example_values(metric: str, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64] | None:
    """Returns one value per example, in the metric's unit, whose mean is the metric; None for a metric that has none.

    accuracy: 100 if correct, else 0. pearson and matthews (of two classes, where it is Pearson's correlation of the
    class indices): jackknife pseudo-values n θ - (n - 1) θ₋ᵢ, shifted to mean θ (Miller 1974, Biometrika 61, 1-15).
    loss, a ratio L of nats sᵢ to tokens tᵢ: L + (sᵢ - L tᵢ) / mean t, its linearisation (Cochran, Sampling Techniques, 1977,
    chapter 6).
    """
    if metric == LOSS:
        nats, tokens = (np.array([float(row[key]) for row in rows]) for key in ("nats", "target_tokens"))
        loss = nats.sum() / tokens.sum()
        return np.asarray(loss + (nats - loss * tokens) / tokens.mean())
    if metric == "accuracy" and all("correct" in row for row in rows):
        return np.array([100.0 * bool(row["correct"]) for row in rows])
    if metric in ("pearson", "matthews") and len(rows) > 2:
        x, y = (np.array([float(row[key]) for row in rows]) for key in ("output", "gold"))
        theta, without = correlation(x, y)
        pseudo = len(rows) * theta - (len(rows) - 1) * without
        return 100 * (pseudo + (theta - pseudo.mean()))
    return None


def correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Returns Pearson's correlation of x and y, and that without each of the n examples, (n); 0 where undefined."""
    n, x, y = len(x), x - x.mean(), y - y.mean()
    m = np.array([n, *[n - 1] * n])
    sx, sy = np.concatenate([[0.0], -x]), np.concatenate([[0.0], -y])
    sxx, syy, sxy = ((a * b).sum() - np.concatenate([[0.0], a * b]) for a, b in ((x, x), (y, y), (x, y)))
    square = (sxx - sx**2 / m) * (syy - sy**2 / m)
    defined = square > 1e-18 * max(square[0], 1e-300)
    correlations = np.where(defined, (sxy - sx * sy / m) / np.sqrt(np.where(defined, square, 1)), 0.0)
    return float(correlations[0]), correlations[1:]


def deviation(scores: Sequence[float]) -> float | None:
    """Returns the standard deviation over seeds (n - 1 in the denominator); None for one seed."""
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def interval(scores: Scores, draws: int = DRAWS, seed: int = 0) -> tuple[float, float] | None:
    """Returns the 95 % percentile interval of the score under the pigeonhole bootstrap; None for one seed.

    A draw takes seeds with replacement, the same ones for every test set, and examples of each test set with
    replacement, the same ones for every seed (Owen 2007, Annals of Applied Statistics 1, 386-411).
    """
    num_seeds = len(scores[0])
    if num_seeds < 2:
        return None
    rng = np.random.default_rng(seed)
    by_seed = np.zeros((draws, num_seeds))
    for x in scores:
        n = x.shape[1]
        kinds, counts = np.unique(x, axis=1, return_counts=True)  # 0/1 columns come in few kinds: draw how often each
        by_seed += rng.multinomial(n, counts / n, size=draws) @ kinds.T / n / len(scores)
    weights = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws) / num_seeds
    low, high = np.quantile((weights * by_seed).sum(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Test:
    """A paired comparison."""

    difference: float
    """In points or nats."""
    df: float
    p: float
    """Two-sided, of no difference."""


def seed_means(scores: Scores) -> NDArray[np.float64]:
    """Returns the score under each seed, (seeds)."""
    return np.asarray(np.mean([x.mean(axis=1) for x in scores], axis=0))


def seed_variance(arms: Sequence[Mapping[Any, float]]) -> tuple[float, int]:
    """Returns the variance over seeds of a difference of two arms, and its degrees of freedom, from all arms together.

    `arms` map seeds to scores. The variance is twice the mean square of what is left of the scores after an effect per
    arm and one per seed (the error of a two-way analysis of variance); of two arms it is that of their differences.
    """
    seeds = list(dict.fromkeys(seed for scores in arms for seed in scores))
    cells = [(a, seeds.index(seed), score) for a, scores in enumerate(arms) for seed, score in scores.items()]
    design = np.zeros((len(cells), len(arms) + len(seeds)))
    for row, (a, s, _) in enumerate(cells):
        design[row, [a, len(arms) + s]] = 1
    y = np.array([score for *_, score in cells])
    fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    df = len(cells) - int(rank)
    return (2 * float(((y - design @ fit) ** 2).sum()) / df if df else 0.0), df


def paired_test(ours: Scores, theirs: Scores, pooled: tuple[float, int] | None = None) -> Test | None:
    """Tests the difference of two scores, paired by seed and example; None for one seed or one example.

    t² = min F' of Clark (1973, Journal of Verbal Learning and Verbal Behavior 12, 335-359): the squared difference over
    the sum of its squared standard errors over seeds and over examples, df after Satterthwaite. Where only seeds vary it
    is the paired t-test over seeds, where only examples vary that over examples; in between it is conservative.
    Two or three seeds say little about their own variance: `pooled`, what `seed_variance` returns for all arms that are
    compared, is taken where it is not below the pair's own.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    num_seeds, num_sets = len(differences[0]), len(differences)
    if num_seeds < 2 or min(d.shape[1] for d in differences) < 2:
        return None
    by_seed = seed_means(differences)
    var_seeds, df_seeds = by_seed.var(ddof=1), num_seeds - 1
    if pooled is not None:
        var_seeds, df_seeds = max(var_seeds, pooled[0]), max(df_seeds, pooled[1])
    parts = [(var_seeds / num_seeds, df_seeds)]
    for d in differences:
        n = d.shape[1]
        parts.append((d.mean(axis=0).var(ddof=1) / n / num_sets**2, n - 1))
    difference, variance = float(by_seed.mean()), sum(v for v, _ in parts)
    if variance < 1e-20:
        return Test(difference, float("inf"), float(abs(difference) < 1e-10))
    df = variance**2 / sum(v**2 / d for v, d in parts)
    return Test(difference, float(df), float(2 * stats.t.sf(abs(difference) / np.sqrt(variance), df)))


def holm(p: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6, 65-70)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, stepped)
    return corrected.tolist()
