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
from lightning_kd.comparison.tables import p_cells


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("t", [0.0, 0.1, -1.0, 2.5, 4.3, 12.0, -60.0])
def test_the_tails_of_t_are_those_of_scipy(t, degrees):
    assert t_tails(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), abs=1e-12)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 9, 30, 101, 999])
def test_small_tails_of_t_are_not_lost(degrees):
    for p in (0.9, 0.5, 0.3, 0.05, 1e-5, 1e-15, 1e-17, 1e-32, 1e-60, 1e-100):
        t = stats.t.isf(p / 2, degrees)
        assert t_tails(t, degrees) == pytest.approx(2 * stats.t.sf(t, degrees), rel=1e-10, abs=0)


def test_a_p_value_is_never_shown_as_zero():
    assert t_tails(1e300, 9) == 0
    assert p_cells(6.25e-32, 0.0) == ["6.25e-32", "<1e-300"]


@pytest.mark.parametrize("seeds", [2, 3, 4, 7, 10])
def test_the_paired_test_is_that_of_scipy(seeds):
    draw = np.random.default_rng(seeds)
    one, other = draw.normal(size=(2, seeds))
    expected = stats.ttest_rel(one, other).pvalue
    assert paired_t_test(list(one), list(other)) == pytest.approx(expected, rel=1e-9)


def test_what_cannot_be_tested_is_not():
    assert paired_t_test([1.0], [0.0]) is None
    assert paired_t_test([0.25, 0.5], [0.25, 0.5]) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([0.95, 0.95], [0.9, 0.9]),
        ([0.3, 0.4], [0.1, 0.2]),
        ([0.95, 0.85, 0.75], [0.9, 0.8, 0.7]),
        ([3e9, 4e9], [1e9 + 0.5, 2e9 + 0.25]),
    ],
)
def test_equal_differences_have_no_spread_to_be_measured_by(one, other):
    """Counts of few examples often differ by the same; SciPy's p of rounding noise is near zero."""
    assert paired_t_test(one, other) is None


def test_small_numbers_are_not_taken_for_noise():
    one, other = [1e-12, 3e-12, 4e-12], [0.0, 1e-12, 1e-12]
    assert paired_t_test(one, other) == pytest.approx(stats.ttest_rel(one, other).pvalue)


def test_mean_and_deviation_are_those_of_numpy():
    values = list(np.random.default_rng(0).normal(size=5))
    found = summarize(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert summarize([2.0]).deviation is None


def test_numbers_that_are_not_finite_have_a_mean_and_no_deviation():
    assert math.isnan(summarize([math.inf, -math.inf]).mean)
    assert math.isnan(summarize([math.nan, 1.0]).mean)
    assert summarize([math.inf, 1.0]).mean == math.inf
    assert summarize([math.inf, 1.0]).deviation is None


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


def test_differences_that_lack_a_seed_count_in_the_correction_and_have_no_p():
    """What is left of a run that failed may be the seeds that went well."""
    values = {
        "a": {0: 1.0, 1: 2.0, 2: 4.0},
        "b": {0: 0.0, 1: 1.5, 2: 3.0},
        "c": {1: 1.5, 2: 3.0},
        "d": {0: 1.0, 1: math.nan, 2: 3.0},
    }
    pairs = [("a", "b"), ("a", "c"), ("d", "a"), ("a", "gone")]
    found = differences(values, pairs, [0, 1, 2])
    assert [(d.one, d.other) for d in found] == pairs
    ab, ac, da, gone = found
    assert ab.p == pytest.approx(stats.ttest_rel([1, 2, 4], [0, 1.5, 3]).pvalue)
    assert ab.corrected == pytest.approx(4 * ab.p)
    assert ab.lacking == ""
    assert (ac.summary.mean, ac.summary.seeds, ac.positive) == (0.75, 2, 2)
    assert [each.p for each in (ac, da, gone)] == [None] * 3
    assert ac.lacking == "c, seed 0 is missing"
    assert da.lacking == "d, seed 1 is nan"
    assert gone.summary is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1e308, -1e308, 5e307], [-1e308, 1e308, 0.0]),
        ([1e308, 9e307, 1.5e308], [0.0, 1e307, 2e307]),
    ],
)
def test_the_test_of_numbers_at_the_end_of_the_range_is_that_of_smaller_ones(one, other):
    smaller = [[value / 1e300 for value in values] for values in (one, other)]
    assert paired_t_test(one, other) == pytest.approx(stats.ttest_rel(*smaller).pvalue)
    values = {"A": dict(enumerate(one)), "B": dict(enumerate(other))}
    (found,) = differences(values, [("A", "B")], [0, 1, 2])
    assert found.summary is not None


def test_the_mean_of_numbers_at_the_end_of_the_range_is_that_of_numpy():
    values = [1.5e308, 1.2e308, 9e307]
    made, smaller = summarize(values), np.array(values) / 1e300
    assert made.mean == pytest.approx(smaller.mean() * 1e300)
    assert made.deviation == pytest.approx(smaller.std(ddof=1) * 1e300)
