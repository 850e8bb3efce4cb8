"""Orderings that were published, and whether they hold here."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_kd.comparison.experiment import Claim, Experiment
from lightning_kd.comparison.statistics import Summary, corrected_together, differences
from lightning_kd.comparison.tables import LEVEL, Results, by_run, p_cells, shown

HOLDS, OPPOSITE, OPEN = "holds", "does not hold: the opposite does", "not decided"


@dataclass(frozen=True)
class Finding:
    """What the runs say of a claim."""

    claim: Claim
    gain: Summary | None
    """By how much the run is better, paired by seed; below zero where it is worse. None where no
    seed has both runs."""
    agreeing: int
    """Seeds for which it is better."""
    p: float | None
    """Of a two-sided paired t-test of all seeds; None where it cannot be told."""
    corrected: float | None
    """The same with Holm's correction for all claims."""
    lacking: str = ""
    """Which number is missing or not finite, the first of them; empty if none is."""

    @property
    def verdict(self) -> str:
        """Whether it holds: ``not decided`` where no corrected p is below the level."""
        if self.lacking:
            return f"cannot be told: {self.lacking}"
        if self.gain is None or self.gain.seeds < 2:
            return "cannot be told: one seed"
        if self.corrected is None or self.corrected >= LEVEL:
            return OPEN
        return HOLDS if self.gain.mean > 0 else OPPOSITE


def read_claims(given: Any, where: str) -> list[Claim]:
    """Read claims: which run beats which, in which metric, and who says so.

    Args:
        given: What a file says.
        where: It stands.

    Raises:
        ValueError: If one lacks something, or has what a claim does not have.
    """
    if not isinstance(given, list):
        raise ValueError(f"{where} is a list of claims, not {given!r:.80}")
    known = [each.name for each in fields(Claim)]
    needed = known[:-1]
    found = []
    for place, said in enumerate(given):
        texts = isinstance(said, dict) and all(isinstance(value, str) for value in said.values())
        if not texts or not {*needed} <= said.keys() <= {*known}:
            raise ValueError(
                f"{where}[{place}] is {said!r:.120}; a claim has the texts {', '.join(needed)}, and "
                f"may have {known[-1]}"
            )
        found.append(Claim(**said))
    return found


def check_claims(experiment: Experiment, where: str) -> None:
    """Validate that claims are about runs and metrics of the tables.

    Raises:
        ValueError: If one is not.
    """
    runs = [variant.name for variant in experiment.variants if variant.shown]
    metrics = [metric.name for metric in experiment.metrics if metric.better]
    for claim in experiment.claims:
        if claim.run == claim.beats:
            raise ValueError(f"{where}: {claim.run} cannot beat itself")
        for run in (claim.run, claim.beats):
            if run not in runs:
                raise ValueError(f"{where}: no run {run!r} is shown; choose of {', '.join(runs)}")
        same = [
            other
            for other in experiment.claims
            if {other.run, other.beats} == {claim.run, claim.beats} and other.metric == claim.metric
        ]
        if len(same) > 1:
            raise ValueError(
                f"{where}: {claim.run} and {claim.beats} are compared twice in {claim.metric}, and "
                "p-values would be corrected for one test too many; write one claim, which also says "
                "whether the opposite holds"
            )
        if claim.metric not in metrics:
            raise ValueError(
                f"{where}: {claim.metric!r} is none of the metrics that say what is better; choose of "
                f"{', '.join(metrics) or 'none: give metrics'}"
            )


def judged(experiment: Experiment, results: Results, seeds: Sequence[int]) -> list[Finding]:
    """Return what the results of one budget say of each claim.

    Args:
        experiment: Has the claims, all of which are corrected for.
        results: Of one budget.
        seeds: Those that each run was to have.
    """
    better = {metric.name: metric.better for metric in experiment.metrics}
    found = []
    for claim in experiment.claims:
        values = by_run(results, "metrics", claim.metric)
        pair = (claim.run, claim.beats)
        pair = pair if better[claim.metric] == "higher" else pair[::-1]
        found += differences(values, [pair], seeds)
    corrected = corrected_together([each.p for each in found])
    return [
        Finding(claim, each.summary, each.positive, each.p, own, each.lacking)
        for claim, each, own in zip(experiment.claims, found, corrected, strict=True)
    ]


def said_of(experiment: Experiment, finding: Finding) -> str:
    """Return a claim and its verdict, in a line."""
    return f"{_text(experiment, finding.claim)}: {finding.verdict}"


def claim_rows(experiment: Experiment, found: Sequence[Finding]) -> list[list[str]]:
    """Return the table of claims: a header, then a row for each."""
    metrics = {metric.name: metric for metric in experiment.metrics}
    table = [["claim", "by", "better by", "seeds that agree", "p", "p, corrected", ""]]
    for each in found:
        text, gain = _text(experiment, each.claim), shown(each.gain, metrics[each.claim.metric])
        agreeing = f"{each.agreeing} of {each.gain.seeds if each.gain else 0}"
        ps = p_cells(each.p, each.corrected)
        table.append([text, each.claim.source, gain, agreeing, *ps, f"**{each.verdict}**"])
    return table


def _text(experiment: Experiment, claim: Claim) -> str:
    labels = {variant.name: variant.label for variant in experiment.variants}
    (title,) = (metric.shown for metric in experiment.metrics if metric.name == claim.metric)
    return f"{labels[claim.run]} beats {labels[claim.beats]} in {title}"
