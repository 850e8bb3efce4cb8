"""What the terminal and the page show of the results."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_kd.comparison.experiment import Experiment
from lightning_kd.comparison.metrics import COSTS, USUAL_COSTS, Metric
from lightning_kd.comparison.plan import Job
from lightning_kd.comparison.statistics import (
    Difference,
    Summary,
    differences,
    least_possible_p,
    summarize,
)

LEVEL = 0.05
"""Below it, a corrected p-value is called significant."""

Results = Sequence[Mapping[str, Any]]


def metrics_of(experiment: Experiment, results: Results) -> list[Metric]:
    """Return the columns: those that the experiment names, or all that every run has."""
    if experiment.metrics:
        return list(experiment.metrics)
    common = set.intersection(*(set(result["metrics"]) for result in results)) if results else ()
    return [Metric(name) for name in sorted(common)]


def with_wall_time(experiment: Experiment, jobs: Sequence[Job]) -> Experiment:
    """Return the experiment with the cost that a budget of time is of, where none are named.

    ``max_time`` has validation in it; ``seconds`` have not.
    """
    timed = any(job.fit.get("trainer", {}).get("max_time") for job in jobs if job.budget)
    if timed and [*experiment.costs] == [*USUAL_COSTS]:
        return replace(experiment, costs=[*USUAL_COSTS, "wall_seconds"])
    return experiment


def of_budget(results: Results, budget: str) -> list[Mapping[str, Any]]:
    """Return the results under a budget, and those of runs that all budgets share."""
    return [result for result in results if result["budget"] in ("", budget)]


def by_run(results: Results, part: str, name: str) -> dict[str, dict[int, float]]:
    """Return a number of each run, by seed.

    Args:
        results: Of all runs.
        part: ``metrics`` or ``cost``.
        name: Of the number.
    """
    found: dict[str, dict[int, float]] = {}
    for result in results:
        if name in result[part]:
            found.setdefault(result["run"], {})[result["seed"]] = result[part][name]
    return found


def rows(experiment: Experiment, results: Results, seeds: Sequence[int]) -> list[list[str]]:
    """Return the table of one budget: a header, then a row for each run.

    Args:
        experiment: Names the runs.
        results: Of one budget.
        seeds: Those that each run was to have; a mean over fewer says so.
    """
    metrics = metrics_of(experiment, results)
    columns = [(by_run(results, "metrics", m.name), m) for m in metrics]
    costs = [(by_run(results, "cost", name), name) for name in experiment.costs]
    header = ["", *(_head(m) for m in metrics), *(COSTS[name] for name in experiment.costs)]
    table = [header]
    for variant in (each for each in experiment.variants if each.shown):
        cells = [variant.label]
        for values, metric in columns:
            summary = _summary_of(values.get(variant.name, {}))
            cells.append(shown(summary, metric) + _of_fewer(summary, seeds))
        for values, name in costs:
            summary = _summary_of(values.get(variant.name, {}))
            cells.append(_cost(summary, name) + _of_fewer(summary, seeds))
        table.append(cells)
    return table


def shown(summary: Summary | None, metric: Metric) -> str:
    """Write mean and deviation; a dash where there are none.

    Example:
        >>> shown(Summary(0.954, 0.033, 3), Metric("a", percent=True))
        '95.4 ± 3.3 %'
    """
    if summary is None:
        return "-"
    if summary.deviation is None:
        return metric.text(summary.mean)
    if metric.percent:
        return f"{100 * summary.mean:.1f} ± {100 * summary.deviation:.1f} %"
    return f"{summary.mean:.4g} ± {summary.deviation:.2g}"


def p_cells(*values: float | None) -> list[str]:
    """Write p-values.

    Example:
        >>> p_cells(0.0123, None, 6.1234e-32, 0.0)
        ['0.0123', '-', '6.12e-32', '<1e-300']
    """
    return ["-" if p is None else "<1e-300" if p < 1e-300 else f"{p:.3g}" for p in values]


def compared(
    experiment: Experiment, results: Results, metric: Metric, seeds: Sequence[int]
) -> list[Difference]:
    """Return the differences between runs in one metric: of the pairs that are named, or of all."""
    names = [variant.name for variant in experiment.variants if variant.shown]
    pairs = experiment.pairs or [*combinations(names, 2)]
    return differences(by_run(results, "metrics", metric.name), pairs, seeds)


def rich_table(table: Sequence[Sequence[str]], title: str) -> Table:
    """Return a table for the terminal."""
    made = Table(title=Text(title) if title else None)
    for head in table[0]:
        # A name breaks behind its stage, and a word nowhere, however narrow the terminal is.
        head = head.replace("/", "/\n") if " /" not in head else head
        longest = max(map(len, head.split()), default=0)
        made.add_column(Text(head), overflow="fold", min_width=longest)
    for cells in table[1:]:
        made.add_row(*map(Text, cells))
    return made


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a table for a page."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def difference_rows(
    experiment: Experiment, found: Sequence[Difference], metric: Metric
) -> list[list[str]]:
    """Return the table of differences in a metric, the surest first."""
    labels = {variant.name: variant.label for variant in experiment.variants}
    table = [["difference", _head(metric), "seeds above zero", "p", "p, corrected"]]
    for each in sorted(found, key=lambda d: 2.0 if d.p is None else d.p):
        name = f"{labels[each.one]} - {labels[each.other]}"
        signs = f"{each.positive} of {each.summary.seeds if each.summary else 0}"
        said = shown(each.summary, metric) + (f" ({each.lacking})" if each.lacking else "")
        table.append([name, said, signs, *p_cells(each.p, each.corrected)])
    return table


def verdict(experiment: Experiment, found: Sequence[Difference], metric: Metric) -> str:
    """Return which runs are better than which in a metric that says what is, in a sentence."""
    labels = {variant.name: variant.label for variant in experiment.variants}
    sure = [d for d in found if d.corrected is not None and d.corrected < LEVEL]
    if not sure:
        return f"{metric.shown}: no difference is significant at {LEVEL}"
    parts = []
    for each in sure:
        above = each.summary is not None and each.summary.mean > 0
        first = above == (metric.better == "higher")
        better, worse = (each.one, each.other) if first else (each.other, each.one)
        parts.append(f"{labels[better]} better than {labels[worse]} ({metric.better})")
    return f"{metric.shown}, significant at {LEVEL}: {', '.join(parts)}"


def what_can_be_told(seeds: int) -> str:
    """Return what so many seeds allow to say.

    Example:
        >>> what_can_be_told(1)
        'One seed: there are no error bars, and no difference can be tested.'
    """
    if seeds < 2:
        return "One seed: there are no error bars, and no difference can be tested."
    return (
        f"± is the sample standard deviation over {seeds} seeds. Differences are paired by seed; p is "
        "of a two-sided t-test, which takes them to be normally distributed, corrected for the number "
        "of differences in the table (Holm). Without that assumption, by the signs alone, "
        f"{seeds} seeds can give no p below {least_possible_p(seeds):g}."
    )


def _head(metric: Metric) -> str:
    arrow = {"higher": " ↑", "lower": " ↓", "": ""}[metric.better]
    return metric.shown + arrow


def _summary_of(values: Mapping[int, float]) -> Summary | None:
    return summarize([*values.values()]) if values else None


def _of_fewer(summary: Summary | None, seeds: Sequence[int]) -> str:
    if summary is None or summary.seeds == len(seeds):
        return ""
    return f" ({summary.seeds} seed{'s' if summary.seeds > 1 else ''})"


def _cost(summary: Summary | None, name: str) -> str:
    if summary is None:
        return "-"
    if "seconds" in name:
        return f"{summary.mean:.0f} s" if summary.mean >= 10 else f"{summary.mean:.1f} s"
    return f"{summary.mean:,.0f}{' MB' if name == 'peak_memory_mb' else ''}"
