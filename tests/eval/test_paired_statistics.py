from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from diffsparse.eval.paired_statistics import bootstrap_interval, sign_test


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(1).normal(30, 2, 12)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    # An end's own error from 10,000 resamples is about 2 % of the standard error of the mean.
    assert bootstrap_interval(values) == pytest.approx(tuple(expected), abs=0.1 * values.std() / 12**0.5)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [bootstrap_interval(random.normal(5, 1, 30)) for _ in range(100)]
    assert 85 <= sum(low <= 5 <= high for low, high in intervals) <= 100


def test_one_value_has_no_interval_and_equal_ones_have_no_width():
    assert bootstrap_interval([3.0]) is None
    assert bootstrap_interval([3.0] * 4) == (3.0, 3.0)


def test_the_same_values_give_the_same_interval():
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])


@pytest.mark.parametrize("num_above", range(8))
def test_the_sign_test_is_the_binomial_one(num_above):
    differences = [1.5] * num_above + [-0.1] * (7 - num_above)
    assert sign_test(differences) == pytest.approx(scipy.stats.binomtest(num_above, 7).pvalue)


def test_ties_say_nothing():
    assert sign_test([1.0, 1.0, 0.0, 0.0]) == sign_test([1.0, 1.0])
    assert sign_test([0.0, 0.0]) == sign_test([]) == 1.0
