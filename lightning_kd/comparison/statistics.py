"""Means and deviations over seeds, and paired differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

_ROUNDING = 1e-9
"""Part of a number's size that is taken for noise of its computation."""

_TERMS = 10_000
"""Of a continued fraction, at most; it takes about the square root of the degrees of freedom."""


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of a number over seeds."""

    mean: float
    deviation: float | None
    """With the divisor n - 1; None for a single seed."""
    seeds: int


@dataclass(frozen=True)
class Difference:
    """A number of one run minus that of another, paired by seed."""

    one: str
    other: str
    summary: Summary | None
    """Over the seeds that both runs have; None where there is none."""
    positive: int
    """Seeds for which it is above zero."""
    p: float | None
    """Of a two-sided paired t-test of all seeds; None where it cannot be told."""
    corrected: float | None
    """The same with Holm's correction for all the differences that are tested together."""
    lacking: str = ""
    """Which number is missing or not finite, the first of them; empty if none is."""


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and sample standard deviation; those of numbers that are not finite have none.

    Example:
        >>> summarize([1.0, 2.0, 3.0])
        Summary(mean=2.0, deviation=1.0, seeds=3)
    """
    if not all(map(math.isfinite, values)):
        return Summary(sum(values) / len(values), None, len(values))
    try:
        return Summary(fmean(values), stdev(values) if len(values) > 1 else None, len(values))
    except OverflowError:  # of a sum or a square on the way
        size = max(map(abs, values))
        part = summarize([value / size for value in values])
        deviation = None if part.deviation is None else part.deviation * size
        return Summary(part.mean * size, deviation, len(values))


def differences(
    values: Mapping[str, Mapping[int, float]],
    pairs: Sequence[tuple[str, str]],
    seeds: Sequence[int],
) -> list[Difference]:
    """Return the paired differences of one number between runs.

    Every pair is there and counts in the correction, whatever became of its runs: which of them are
    compared was decided before. One that lacks a seed has no p, as the seeds that are there may be
    those that went well.

    Args:
        values: Of each run, by seed.
        pairs: The runs that are compared.
        seeds: Those that each run was to have.
    """
    found = [_difference(values, one, other, seeds) for one, other in pairs]
    corrected = corrected_together([each.p for each in found])
    return [replace(each, corrected=own) for each, own in zip(found, corrected, strict=True)]


def _difference(
    values: Mapping[str, Mapping[int, float]], one: str, other: str, seeds: Sequence[int]
) -> Difference:
    first, second = values.get(one, {}), values.get(other, {})
    lacking = _first_lacking(values, (one, other), seeds)
    gaps = [first[seed] - second[seed] for seed in seeds if seed in first and seed in second]
    return Difference(
        one,
        other,
        summarize(gaps) if gaps else None,
        sum(gap > 0 for gap in gaps),
        None if lacking else paired_t_test([first[s] for s in seeds], [second[s] for s in seeds]),
        None,
        lacking,
    )


def _first_lacking(
    values: Mapping[str, Mapping[int, float]], runs: Sequence[str], seeds: Sequence[int]
) -> str:
    for run in runs:
        for seed in seeds:
            value = values.get(run, {}).get(seed)
            if value is None or not math.isfinite(value):
                return f"{run}, seed {seed} is {'missing' if value is None else value}"
    return ""


def paired_t_test(one: Sequence[float], other: Sequence[float]) -> float | None:
    r"""Return the two-sided p-value of a paired t-test.

    With :math:`t = \bar d \sqrt n / s` of the differences :math:`d` and :math:`n - 1` degrees of
    freedom. It takes the differences to be normally distributed. Where they differ by no more than
    rounding does, there is no spread that they could be measured by.

    Args:
        one: A finite number for each pair.
        other: The other number of each pair.

    Returns:
        The p-value, which is 1 where all differences are zero; None for fewer than two pairs, and
        where the spread of the differences is below 1e-9 of the largest number.

    Example:
        >>> round(paired_t_test([1.0, 2.0, 4.0], [0.0, 0.0, 0.0]), 4)
        0.1181
    """
    gaps = [first - second for first, second in zip(one, other, strict=True)]
    if len(gaps) < 2:
        return None
    if not any(gaps):
        return 1.0
    try:
        spread, mean = stdev(gaps), fmean(gaps)
    except (OverflowError, AttributeError):  # of an infinite difference, or a square on the way
        size = max(map(abs, [*one, *other]))  # the test is the same in any unit
        return paired_t_test([value / size for value in one], [value / size for value in other])
    if spread <= _ROUNDING * max(map(abs, [*one, *other])):
        return None
    return t_tails(mean * math.sqrt(len(gaps)) / spread, len(gaps) - 1)


def t_tails(t: float, degrees: int) -> float:
    r"""Return the probability that Student's t is at least as far from zero.

    :math:`I_x(\nu / 2, 1 / 2)` with :math:`x = \nu / (\nu + t^2)`, the regularized incomplete beta
    function: the tail itself, which one minus the rest would lose below 1e-16.

    Args:
        t: The statistic.
        degrees: Degrees of freedom :math:`\nu`, 1 or more.

    Example:
        >>> round(t_tails(4.302653, 2), 6)
        0.05

    References:
        Abramowitz and Stegun, *Handbook of Mathematical Functions*, 26.7.1 and 26.5.8.
    """
    # As logarithms of x and 1 - x, neither of which is then lost in the other.
    ratio = t * t / degrees
    if not ratio:
        return 1.0
    if math.isinf(ratio):
        return 0.0
    log_x, log_rest = -math.log1p(ratio), -math.log1p(1 / ratio)
    a, b = degrees / 2, 0.5
    if math.exp(log_x) < (a + 1) / (a + b + 2):
        return min(1.0, _incomplete_beta(a, b, log_x, log_rest))
    return max(0.0, 1.0 - _incomplete_beta(b, a, log_rest, log_x))


def _incomplete_beta(a: float, b: float, log_x: float, log_rest: float) -> float:
    r"""Return :math:`I_x(a, b)` by its continued fraction, which is fast for x below its mean.

    Args:
        a: First parameter.
        b: Second parameter.
        log_x: Logarithm of x.
        log_rest: Logarithm of 1 - x.

    References:
        Lentz's method: Press et al., *Numerical Recipes*, 5.2 and 6.4.
    """
    x = math.exp(log_x)
    beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * log_x + b * log_rest - beta) / a
    upper, lower = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    total = lower
    for m in range(1, _TERMS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            lower = 1 / (1 + term * lower)
            upper = 1 + term / upper
            total *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    return front * total


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, after Holm.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    References:
        Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def corrected_together(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for the number of all tests; one that has none counts as 1.

    Example:
        >>> corrected_together([0.01, None])
        [0.02, None]
    """
    corrected = holm([1.0 if p is None else p for p in p_values])
    return [None if p is None else own for p, own in zip(p_values, corrected, strict=True)]


def least_possible_p(seeds: int) -> float:
    r"""Return the least two-sided p-value of a test that only asks for the signs of differences.

    :math:`2^{1-n}` for n pairs: what can be told without taking them to be normal.

    Example:
        >>> least_possible_p(3)
        0.25
    """
    return float(min(1.0, 2.0 ** (1 - seeds)))
