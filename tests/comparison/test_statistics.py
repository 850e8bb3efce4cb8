"""Against NumPy, SciPy and the definition of what Holm's procedure rejects."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from lightning_kd.comparison.statistics import (
    differences,
    holm,
    least_possible_p,
    paired_t_test,
    summarize,
    t_tails,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("t", [0.0, 0.1, -1.0, 2.5, 4.3, 12.0, -60.0])
def test_the_tails_of_t_are_those_of_scipy(t, degrees):
    assert t_tails(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), abs=1e-12)


@pytest.mark.parametrize("seeds", [2, 3, 4, 7, 10])
def test_the_paired_test_is_that_of_scipy(seeds):
    draw = np.random.default_rng(seeds)
    one, other = draw.normal(size=(2, seeds))
    expected = stats.ttest_rel(one, other).pvalue
    assert paired_t_test(list(one - other)) == pytest.approx(expected, rel=1e-9)


def test_what_cannot_be_tested_is_not():
    assert paired_t_test([1.0]) is None
    assert paired_t_test([1.0, math.nan, 2.0]) is None
    assert paired_t_test([0.0, 0.0]) == 1
    assert paired_t_test([0.5, 0.5]) == 0


def test_mean_and_deviation_are_those_of_numpy():
    values = list(np.random.default_rng(0).normal(size=5))
    found = summarize(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert summarize([2.0]).deviation is None


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_closure_of_bonferroni(seed):
    """A hypothesis falls where every set that contains it falls by Bonferroni's test."""
    p = list(np.random.default_rng(seed).uniform(0, 0.2, size=5))
    every = range(len(p))
    expected = [
        max(
            min(1.0, len(chosen) * min(p[i] for i in chosen))
            for size in range(1, len(p) + 1)
            for chosen in combinations(every, size)
            if index in chosen
        )
        for index in every
    ]
    assert holm(p) == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_least_p_of_signs_is_that_of_an_exact_sign_test(seeds):
    assert least_possible_p(seeds) == pytest.approx(stats.binomtest(seeds, seeds).pvalue)


def test_differences_use_the_seeds_that_both_have_and_are_corrected_together():
    values = {"a": {0: 1.0, 1: 2.0, 2: 4.0}, "b": {1: 1.5, 2: 3.0, 3: 9.0}, "c": {0: 1.0}}
    found = {(d.one, d.other): d for d in differences(values)}
    assert set(found) == {("a", "b"), ("a", "c")}
    ab = found["a", "b"]
    assert (ab.summary.mean, ab.summary.seeds, ab.positive) == (0.75, 2, 2)
    assert ab.p == pytest.approx(stats.ttest_rel([2, 4], [1.5, 3]).pvalue)
    assert ab.corrected == ab.p  # the other has one seed, and no p
    assert found["a", "c"].p is None
    assert [d.one for d in differences(values, [("b", "a")])] == ["b"]
