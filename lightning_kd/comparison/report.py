"""The page, the numbers and the pictures of a comparison."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_kd.comparison.claims import claim_rows, judged, said_of
from lightning_kd.comparison.documents import check_marks, replace_between_marks
from lightning_kd.comparison.execution import Outcome
from lightning_kd.comparison.experiment import Experiment
from lightning_kd.comparison.figures import draw_bars, draw_curves
from lightning_kd.comparison.plan import Job
from lightning_kd.comparison.provenance import (
    made_differently,
    shown_command,
    versions_of,
    without_places,
)
from lightning_kd.comparison.tables import (
    compared,
    difference_rows,
    markdown,
    metrics_of,
    of_budget,
    rich_table,
    rows,
    verdict,
    what_can_be_told,
    with_wall_time,
)
from lightning_kd.filesystem import copy_file, write_text

MARKS = "results"
"""Name of the marks that a page has."""

_ALT = {
    "curves": "Metrics over steps and over seconds of training, mean and deviation over seeds",
    "bars": "Metrics of each run, mean and deviation over seeds, a dot for each seed",
}


def check_page(page: Path, experiment: Experiment) -> None:
    """Validate that a page has the marks, and that numbers beside it are of the same experiment.

    Raises:
        ValueError: If it is not so, or the page does not exist.
    """
    if not page.is_file():
        raise ValueError(
            f"--write: there is no page {page}; write one with <!-- {MARKS} --> and "
            f"<!-- end of {MARKS} --> where the tables belong"
        )
    check_marks(page, MARKS)
    numbers = page.with_suffix(".json")
    if numbers.exists() and not _is_report(numbers, experiment):
        raise ValueError(
            f"--write: {numbers} would be overwritten, and is no report of {experiment.title!r}; "
            "rename it, or write another page"
        )


def _is_report(path: Path, experiment: Experiment) -> bool:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(said, dict) and "command" in said and said.get("title") == experiment.title


class Report:
    """What the runs of an experiment come to.

    Args:
        experiment: The experiment.
        outcomes: What became of its runs, as far as they were made.
        command: What was typed.
        jobs: All runs that were asked for.
    """

    def __init__(
        self,
        experiment: Experiment,
        outcomes: Sequence[Outcome],
        command: Sequence[str],
        jobs: Sequence[Job],
    ) -> None:
        self.experiment = with_wall_time(experiment, jobs)
        self.outcomes, self.command = outcomes, shown_command(command)
        shown = [o for o in outcomes if o.job.variant.shown]
        self.results = [o.result for o in shown if o.result is not None]
        self.seeds = sorted({job.seed for job in jobs})
        self.budgets = [*experiment.budgets] or [""]
        self.metrics = metrics_of(experiment, self.results)
        there = {o.job.directory for o in outcomes if o.result is not None}
        self.missing = [job.title for job in jobs if job.directory not in there]
        self.without_curve: dict[str, list[str]] = {}
        """Of each budget whose pictures were drawn, what no run has logged, in a line each."""
        self.count = f"{len(jobs) - len(self.missing)} of {len(jobs)} runs are there"

    def show(self, console: Console) -> None:
        """Print the tables, which differences are significant, and what becomes of the claims."""
        if self.missing:
            console.print(self.count, markup=False)
        for budget in self.budgets:
            own = of_budget(self.results, budget)
            table = rich_table(rows(self.experiment, own, self.seeds), budget)
            console.print(table, crop=False)  # numbers are not cut off, however narrow it is
            if differently := made_differently(own):
                console.print(differently, markup=False, highlight=False)
            if len(self.seeds) > 1:
                for metric in self._directed():
                    found = compared(self.experiment, own, metric, self.seeds)
                    console.print(verdict(self.experiment, found, metric), markup=False)
            for finding in judged(self.experiment, own, self.seeds):
                console.print(said_of(self.experiment, finding), markup=False)

    def write(self, output: Path) -> None:
        """Write ``report.md``, ``report.json`` and the pictures."""
        numbers = json.dumps(without_infinities(self._numbers(output)), indent=2, allow_nan=False)
        write_text(output / "report.json", numbers + "\n")
        for budget in self.budgets:
            places: dict[str, list[Path]] = {}
            for outcome in self.outcomes:
                job = outcome.job
                if (
                    outcome.result is None
                    or not job.variant.shown
                    or job.budget not in ("", budget)
                ):
                    continue
                places.setdefault(outcome.job.variant.name, []).append(outcome.job.directory)
            curves = output / self._picture("curves", budget)
            curves.unlink(missing_ok=True)
            self.without_curve[budget] = draw_curves(self.experiment, places, curves)
            bars = output / self._picture("bars", budget)
            bars.unlink(missing_ok=True)
            if self.metrics and (own := of_budget(self.results, budget)):
                draw_bars(self.experiment, own, self.metrics, bars)
        text = [f"# {self.experiment.title}\n"]
        text += [f"**{self.count}.**\n"] if self.missing else []
        text += [f"- {question}" for question in self.experiment.questions]
        write_text(output / "report.md", "\n".join([*text, "", self._page(output, "")]))

    def write_into(self, page: Path, output: Path) -> None:
        """Put tables between the marks of a page, with pictures and numbers beside it.

        Args:
            page: A Markdown file; it is named in the names of the others.
            output: Where the report was written.
        """
        prefix = f"{page.stem}_"
        for picture in self._pictures(output):
            copy_file(output / picture, page.with_name(prefix + picture).resolve())
        copy_file(output / "report.json", page.with_suffix(".json").resolve())
        replace_between_marks(page, MARKS, self._page(output, prefix))

    def _directed(self) -> list[Any]:
        return [metric for metric in self.metrics if metric.better]

    def _picture(self, kind: str, budget: str) -> str:
        return f"{kind}_{budget}.png" if budget else f"{kind}.png"

    def _pictures(self, output: Path) -> list[str]:
        names = [self._picture(kind, b) for b in self.budgets for kind in ("curves", "bars")]
        return [name for name in names if (output / name).exists()]

    def _page(self, output: Path, prefix: str) -> str:
        """Return tables and pictures as Markdown."""
        parts = [f"```bash\n{shlex.join(self.command)}\n```\n", what_can_be_told(len(self.seeds))]
        devices = sorted({result["device"] for result in self.results})
        parts.append(
            f"\nSeeds {', '.join(map(str, self.seeds))}; {' and '.join(devices)}; "
            f"{versions_of(self.results)}.\n"
        )
        failed = [f"- {title}: {error}" for title, error in self._failed(output).items()]
        parts += ["\n".join(failed) + "\n"] if failed else []
        for budget in self.budgets:
            own = of_budget(self.results, budget)
            parts += [f"## {budget}\n"] if budget else []
            parts.append(markdown(rows(self.experiment, own, self.seeds)))
            if differently := made_differently(own):
                parts.append(f"{differently}\n")
            for kind in ("curves", "bars"):
                name = self._picture(kind, budget)
                if (output / name).exists():
                    parts.append(f"![{_ALT[kind]}]({prefix}{name})\n")
            parts += [f"{line}\n" for line in self.without_curve.get(budget, [])]
            if claims := judged(self.experiment, own, self.seeds):
                parts.append(markdown(claim_rows(self.experiment, claims)))
            if len(self.seeds) > 1:
                for metric in self._directed():
                    found = compared(self.experiment, own, metric, self.seeds)
                    said = verdict(self.experiment, found, metric)
                    parts.append(f"<details>\n<summary>{escape(said)}</summary>\n")
                    parts.append(markdown(difference_rows(self.experiment, found, metric)))
                    parts.append("</details>\n")
        return "\n".join(parts)

    def _numbers(self, output: Path) -> dict[str, Any]:
        tables = {
            budget: {
                metric.name: [
                    asdict(d)
                    for d in compared(
                        self.experiment, of_budget(self.results, budget), metric, self.seeds
                    )
                ]
                for metric in self.metrics
            }
            for budget in self.budgets
        }
        return {
            "title": self.experiment.title,
            "runs": self.count,
            "missing": self.missing,
            "questions": list(self.experiment.questions),
            "command": list(self.command),
            "seeds": self.seeds,
            "metrics": [asdict(metric) for metric in self.metrics],
            "results": self.results,
            "differences": tables,
            "claims": {
                budget: [
                    asdict(finding) | {"verdict": finding.verdict}
                    for finding in judged(
                        self.experiment, of_budget(self.results, budget), self.seeds
                    )
                ]
                for budget in self.budgets
            },
            "made_differently": {
                budget: made_differently(of_budget(self.results, budget)) for budget in self.budgets
            },
            "failed": self._failed(output),
        }

    def _failed(self, output: Path) -> dict[str, str]:
        failed = [o for o in self.outcomes if o.result is None]
        return {o.job.title: without_places(o.error, output) for o in failed}


def without_infinities(part: Any) -> Any:
    """Return a part of a report with None for numbers that are not finite: JSON has none.

    Example:
        >>> without_infinities({"loss": [1.0, float("nan")]})
        {'loss': [1.0, None]}
    """
    if isinstance(part, dict):
        return {name: without_infinities(inside) for name, inside in part.items()}
    if isinstance(part, (list, tuple)):
        return [without_infinities(inside) for inside in part]
    return None if isinstance(part, float) and not math.isfinite(part) else part
