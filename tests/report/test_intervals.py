"""Intervals and tests of the report against scipy on the same numbers, where scipy has them."""

import numpy as np
import pytest
from scipy import stats

from highrank.report.statistics import (
    correlation,
    deviation,
    example_values,
    holm,
    interval,
    paired_test,
    seed_means,
    seed_variance,
)

RNG = np.random.default_rng(0)
QUANTILE = 0.2
"""Of a standard error: four standard deviations of a 2.5 % quantile of 4,000 draws, sqrt(p(1 - p) / 4000) / density."""


def scipy_interval(statistic, *samples):
    found = stats.bootstrap(samples, statistic, method="percentile", n_resamples=20_000, rng=1, vectorized=False)
    return np.array(found.confidence_interval), found.standard_error


def test_with_seeds_that_agree_the_interval_is_the_bootstrap_over_examples():
    x = 100.0 * (RNG.random(150) < 0.7)
    expected, error = scipy_interval(np.mean, x)
    assert interval([np.tile(x, (3, 1))]) == pytest.approx(expected, abs=QUANTILE * error)


def test_with_examples_that_agree_the_interval_is_the_bootstrap_over_seeds():
    seeds = 60 + 5 * RNG.standard_normal(9)
    expected, error = scipy_interval(np.mean, seeds)
    assert interval([np.tile(seeds[:, None], (1, 20))]) == pytest.approx(expected, abs=QUANTILE * error)


def test_examples_of_different_sets_are_drawn_apart():
    a, b = 100.0 * (RNG.random(80) < 0.6), 100.0 * (RNG.random(200) < 0.3)
    expected, error = scipy_interval(lambda x, y: (x.mean() + y.mean()) / 2, a, b)
    assert interval([np.tile(a, (2, 1)), np.tile(b, (2, 1))]) == pytest.approx(expected, abs=QUANTILE * error)


def test_seeds_are_drawn_once_for_all_sets():
    seeds = np.tile((60 + 5 * RNG.standard_normal(9))[:, None], (1, 20))
    one, four = interval([seeds]), interval([seeds] * 4)
    assert four == pytest.approx(one, abs=0.5)  # half as wide if every set drew its own


def test_seeds_and_examples_both_widen_the_interval():
    x = np.tile(100.0 * (RNG.random(100) < 0.5), (5, 1))
    noisy = x + 10 * RNG.standard_normal((5, 1))
    assert np.ptp(interval([noisy])) > 1.2 * np.ptp(interval([x]))


def test_one_seed_claims_nothing():
    x = [100.0 * (RNG.random((1, 50)) < 0.5)]
    assert interval(x) is None
    assert paired_test(x, x) is None
    assert deviation([50.0]) is None
    assert deviation([50.0, 52.0]) == pytest.approx(np.sqrt(2))


def test_where_only_seeds_vary_it_is_the_paired_t_test_over_seeds():
    a, b = 60 + 2 * RNG.standard_normal((2, 5))
    found = paired_test([np.tile(a[:, None], (1, 40))], [np.tile(b[:, None], (1, 40))])
    expected = stats.ttest_rel(a, b)
    assert (found.p, found.df) == pytest.approx((expected.pvalue, expected.df))
    assert found.difference == pytest.approx((a - b).mean())


def test_where_only_examples_vary_it_is_the_paired_t_test_over_examples():
    a, b = 100.0 * (RNG.random((2, 120)) < [[0.7], [0.55]])
    found = paired_test([np.tile(a, (3, 1))], [np.tile(b, (3, 1))])
    expected = stats.ttest_rel(a, b)
    assert (found.p, found.df) == pytest.approx((expected.pvalue, expected.df))


def test_in_between_it_is_min_f_of_the_two_t_tests():
    a, b = 100.0 * (RNG.random((2, 4, 90)) < 0.6)
    b[1] = 0
    by_seed, by_example = stats.ttest_rel(a.mean(1), b.mean(1)), stats.ttest_rel(a.mean(0), b.mean(0))
    f1, f2 = by_seed.statistic**2, by_example.statistic**2
    f, df = f1 * f2 / (f1 + f2), (f1 + f2) ** 2 / (f1**2 / by_example.df + f2**2 / by_seed.df)
    found = paired_test([a], [b])
    assert (found.df, found.p) == pytest.approx((df, stats.f.sf(f, 1, df)))


def test_sets_are_averaged():
    a, b = (
        [100.0 * (RNG.random((3, n)) < 0.5) for n in (40, 90)],
        [100.0 * (RNG.random((3, n)) < 0.4) for n in (40, 90)],
    )
    difference = (a[0].mean() - b[0].mean() + a[1].mean() - b[1].mean()) / 2
    assert paired_test(a, b).difference == pytest.approx(difference)
    seeds = [np.tile(RNG.random((4, 1)), (1, n)) for n in (10, 30)]
    zero = [np.zeros((4, n)) for n in (10, 30)]
    expected = stats.ttest_1samp((seeds[0][:, 0] + seeds[1][:, 0]) / 2, 0)
    assert paired_test(seeds, zero).p == pytest.approx(expected.pvalue)


def test_equal_runs_do_not_differ_and_a_constant_difference_is_certain():
    x = 100.0 * (RNG.random((3, 50)) < 0.5)
    assert paired_test([x], [x]).p == 1
    assert paired_test([x + 1], [x]).p == 0


def test_the_seeds_variance_of_two_arms_is_that_of_their_differences():
    a, b = RNG.standard_normal((2, 6))
    variance, df = seed_variance([dict(enumerate(a)), dict(enumerate(b))])
    assert (variance, df) == (pytest.approx((a - b).var(ddof=1)), 5)


def test_the_seeds_variance_of_many_arms_is_the_error_of_the_analysis_of_variance():
    y = RNG.standard_normal((5, 3)) + 10 * RNG.standard_normal((5, 1)) + 10 * RNG.standard_normal((1, 3))
    left = y - y.mean(1, keepdims=True) - y.mean(0, keepdims=True) + y.mean()
    variance, df = seed_variance([dict(enumerate(row)) for row in y])
    assert (variance, df) == (pytest.approx(2 * (left**2).sum() / 8), 8)
    lacking = [dict(enumerate(row)) for row in y]
    del lacking[0][2]
    assert seed_variance(lacking)[1] == 7
    assert seed_variance([{0: 1.0}, {0: 2.0}]) == (0.0, 0)


def test_the_pooled_variance_counts_where_it_is_the_larger():
    a, b = (np.tile(60 + RNG.standard_normal((3, 1)), (1, 20)) for _ in range(2))
    alone = paired_test([a], [b])
    assert paired_test([a], [b], (0.0, 2)) == alone
    pooled = paired_test([a], [b], (50.0, 12))
    t = abs(alone.difference) / np.sqrt(50 / 3)
    assert pooled.p == pytest.approx(2 * stats.t.sf(t, 12))


@pytest.mark.parametrize("noise", [(0.2, 0.2, 0.2, 0.2), (0.3, 0.05, 0.05, 0.05)])
def test_chance_is_called_real_no_more_often_than_it_should(noise):
    """Four arms that differ by chance alone, over three seeds and over examples: 5 %, here of 300 (9 % is 3 sd off)."""
    rng, real = np.random.default_rng(7), 0
    for _ in range(300):
        hard = rng.standard_normal(60)
        arms = []
        for sd in noise:
            own = hard + 0.5 * rng.standard_normal(60) + sd * rng.standard_normal((3, 1))
            arms.append([100.0 * (own + rng.standard_normal((3, 60)) > 0)])
        pooled = seed_variance([dict(enumerate(seed_means(arm))) for arm in arms])
        real += paired_test(arms[0], arms[1], pooled).p < 0.05
    assert real <= 0.09 * 300


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


def test_correlations_as_values_per_example():
    x = RNG.standard_normal(60)
    y = x + RNG.standard_normal(60)
    whole, without = correlation(x, y)
    assert whole == pytest.approx(stats.pearsonr(x, y).statistic)
    assert without[7] == pytest.approx(stats.pearsonr(np.delete(x, 7), np.delete(y, 7)).statistic)
    rows = [{"output": a, "gold": b} for a, b in zip(x, y, strict=True)]
    values = example_values("pearson", rows)
    assert values.mean() == pytest.approx(100 * whole)
    # the jackknife's standard error is near the correlation's own, (1 - r²) / sqrt(n - 2)
    assert values.std(ddof=1) / np.sqrt(60) == pytest.approx(100 * (1 - whole**2) / np.sqrt(58), rel=0.3)


def test_matthews_is_the_correlation_of_classes():
    from torch import tensor
    from torchmetrics.functional import matthews_corrcoef

    output, gold = RNG.integers(0, 2, (2, 40))
    rows = [{"output": int(a), "gold": int(b)} for a, b in zip(output, gold, strict=True)]
    expected = 100 * float(matthews_corrcoef(tensor(output), tensor(gold), "multiclass", num_classes=2))
    assert example_values("matthews", rows).mean() == pytest.approx(expected, abs=1e-4)  # torchmetrics counts in fp32
    constant = example_values("matthews", [{**row, "output": 1} for row in rows])
    assert (constant == 0).all()


def test_accuracy_and_what_is_no_mean_over_examples():
    assert list(example_values("accuracy", [{"correct": True}, {"correct": False}])) == [100, 0]
    assert example_values("bleu", [{"output": "a", "gold": "b"}]) is None


def test_a_loss_per_token_as_values_per_example():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 60, 400)
    rows = [{"nats": float(t * (1 + 0.2 * rng.standard_normal())), "target_tokens": int(t)} for t in tokens]
    values = example_values("loss", rows)

    def loss(rows):
        return sum(row["nats"] for row in rows) / sum(row["target_tokens"] for row in rows)

    assert values.mean() == pytest.approx(loss(rows))
    draws = [loss([rows[i] for i in rng.integers(0, len(rows), len(rows))]) for _ in range(1000)]
    assert values.std(ddof=1) / np.sqrt(len(rows)) == pytest.approx(
        np.std(draws), rel=0.1
    )  # the bootstrap of the ratio
