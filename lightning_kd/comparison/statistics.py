"""Means and deviations over seeds, and paired differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

_ROUNDING = 1e-9
"""Part of a number's size that is taken for noise of its computation."""


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
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


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
    spread = stdev(gaps)
    if spread <= _ROUNDING * max(map(abs, [*one, *other])):
        return None
    return t_tails(fmean(gaps) * math.sqrt(len(gaps)) / spread, len(gaps) - 1)


def t_tails(t: float, degrees: int) -> float:
    r"""Return the probability that Student's t is at least as far from zero.

    By the finite series for whole degrees of freedom :math:`\nu`, with
    :math:`\theta = \arctan(t / \sqrt\nu)`.

    Args:
        t: The statistic.
        degrees: Degrees of freedom, 1 or more.

    Example:
        >>> round(t_tails(4.302653, 2), 6)
        0.05

    References:
        Abramowitz and Stegun, *Handbook of Mathematical Functions*, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    # cos + 2/3 cos^3 + (2 4)/(3 5) cos^5 + ..., or 1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 + ...
    term, total = cosine if odd else 1.0, 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= power / (power + 1) * cosine**2
    inside = math.sin(angle) * total
    within = 2 / math.pi * (angle + inside) if odd else inside
    return min(1.0, max(0.0, 1.0 - within))


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
