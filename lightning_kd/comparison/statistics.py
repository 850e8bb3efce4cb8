"""Means and deviations over seeds, and paired differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev


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
    summary: Summary
    positive: int
    """Seeds for which it is above zero."""
    p: float | None
    """Of a two-sided paired t-test; None for a single seed."""
    corrected: float | None
    """The same with Holm's correction for all the differences that are tested together."""


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and sample standard deviation.

    Example:
        >>> summarize([1.0, 2.0, 3.0])
        Summary(mean=2.0, deviation=1.0, seeds=3)
    """
    spread = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return Summary(fmean(values), spread, len(values))


def differences(
    values: Mapping[str, Mapping[int, float]], pairs: Sequence[tuple[str, str]] = ()
) -> list[Difference]:
    """Return the paired differences of one number between runs.

    Args:
        values: Of each run, by seed. Pairs use the seeds that both runs have.
        pairs: The runs that are compared. Defaults to all pairs.
    """
    found = []
    for one, other in pairs or combinations(values, 2):
        if not (one in values and other in values):
            continue
        seeds = sorted(values[one].keys() & values[other].keys())
        gaps = [values[one][seed] - values[other][seed] for seed in seeds]
        if gaps:
            found.append((one, other, gaps, paired_t_test(gaps)))
    tested = [p for *_, p in found if p is not None]
    corrected = iter(holm(tested))
    return [
        Difference(
            one,
            other,
            summarize(gaps),
            sum(gap > 0 for gap in gaps),
            p,
            None if p is None else next(corrected),
        )
        for one, other, gaps, p in found
    ]


def paired_t_test(gaps: Sequence[float]) -> float | None:
    r"""Return the two-sided p-value of a paired t-test, from the differences.

    With :math:`t = \bar d \sqrt n / s` and :math:`n - 1` degrees of freedom. It takes the differences
    to be normally distributed. Those that are all the same have p = 1 if they are zero, and else 0.

    Args:
        gaps: One difference for each pair.

    Returns:
        The p-value; None for fewer than two pairs, or where a difference is not finite.

    Example:
        >>> round(paired_t_test([1.0, 2.0, 4.0]), 4)
        0.1181
    """
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return None
    spread, mean = stdev(gaps), fmean(gaps)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return t_tails(mean * math.sqrt(len(gaps)) / spread, len(gaps) - 1)


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


def least_possible_p(seeds: int) -> float:
    r"""Return the least two-sided p-value of a test that only asks for the signs of differences.

    :math:`2^{1-n}` for n pairs: what can be told without taking them to be normal.

    Example:
        >>> least_possible_p(3)
        0.25
    """
    return float(min(1.0, 2.0 ** (1 - seeds)))
