"""Our results on the pages of methods: ``python -m tests.benchmarks.method_results``.

Each page of ``docs/methods`` has the rows of its method between two marks, with the runs that they are
compared with, and the claims that name them, from ``docs/results/*.json``. Labels of runs are those of
the experiments.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.comparison.documents import replace_between_marks
from lightning_kd.comparison.metrics import Metric
from lightning_kd.comparison.statistics import summarize
from lightning_kd.comparison.tables import by_run, markdown, of_budget, shown

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "methods"


@dataclass(frozen=True)
class Rows:
    """Runs of an experiment on the page of a method."""

    experiment: str
    compared_with: tuple[str, ...]
    own: tuple[str, ...]
    """Runs of the method, whose claims are shown."""
    metrics: tuple[str, ...]
    budget: str = ""


def of_stories(compared_with: Sequence[str], *own: str) -> Rows:
    """Rows of the experiment that has nearly every method, after as many steps."""
    metrics = ("bits_per_byte", "own_reverse_kl", "own_teacher_nats_per_token")
    metrics = (*metrics, "exposure_bias", "distinct_3")
    return Rows("stories", tuple(compared_with), own, metrics, "equal_steps")


def of_data(compared_with: str, own: str) -> Rows:
    """Rows of the experiment with parts of the data."""
    parts = ("1_percent", "10_percent", "all")
    others, ours = (tuple(f"{run}-{part}" for part in parts) for run in (compared_with, own))
    return Rows("data", others, ours, ("bits_per_byte", "own_reverse_kl"))


SHOWN: Mapping[str, Sequence[Rows]] = {
    "sft": [of_stories(["start", "ForwardKL"], "SFT"), of_data("ForwardKL", "SFT")],
    "supervised_kd": [
        of_stories(["SFT"], "ForwardKL", "ReverseKL", "JSD"),
        of_data("SFT", "ForwardKL"),
    ],
    "sequence_kd": [of_stories(["SFT", "ForwardKL"], "SequenceKD")],
    "baby_llama": [
        Rows(
            "babyllama",
            ("Llama", "GPT2", "SFT", "OneTeacher"),
            ("BabyLlama", "BabyLlama_rows"),
            ("bits_per_byte", "blimp"),
        )
    ],
    "gkd": [
        of_stories(
            ["ForwardKL", "ReverseKL", "JSD"], "GKD_half", "GKD", "GKD_forward", "GKD_reverse"
        ),
        of_data("ForwardKL", "GKD"),
    ],
    "on_policy_distillation": [
        of_stories(["SequenceKD", "GKD_reverse"], "OnPolicyDistillation"),
    ],
    "minillm": [of_stories(["SFT", "ForwardKL", "SequenceKD", "GKD_reverse"], "MiniLLM")],
    "chunk_likelihood_kd": [
        Rows("other_tokenizer", ("SFT", "ULD"), ("ChunkLikelihoodKD", "Mixed"), ("bits_per_byte",))
    ],
    "uld": [Rows("other_tokenizer", ("SFT", "ChunkLikelihoodKD"), ("ULD",), ("bits_per_byte",))],
}
"""By the page."""


def results(experiment: str) -> dict[str, Any]:
    """Read what an experiment has measured."""
    made: dict[str, Any] = json.loads((ROOT / "docs/results" / f"{experiment}.json").read_text())
    return made


def label(experiment: str, run: str) -> str:
    """Return what the page of the experiment calls a run."""
    said = yaml.safe_load((ROOT / "configs/experiments" / f"{experiment}.yaml").read_text())
    name, _, part = run.partition("-")
    return " ".join(filter(None, [said["runs"][name].get("label", name), part]))


def table_of_runs(rows: Rows) -> str:
    """Return mean and deviation of each metric, a row for each run, those of the method in bold."""
    made = results(rows.experiment)
    metrics = {each["name"].removeprefix("test/"): Metric(**each) for each in made["metrics"]}
    measured = of_budget(made["results"], rows.budget)
    arrows = {"lower": " ↓", "higher": " ↑"}
    chosen = [metrics[name] for name in rows.metrics]
    lines = [["run", *(metric.title + arrows[metric.better] for metric in chosen)]]
    for run in (*rows.compared_with, *rows.own):
        values = [by_run(measured, "metrics", metric.name)[run].values() for metric in chosen]
        cells = [
            shown(summarize([*of_seeds]), m) for of_seeds, m in zip(values, chosen, strict=True)
        ]
        name = label(rows.experiment, run)
        lines.append([f"**{name}**" if run in rows.own else name, *cells])
    return markdown(lines)


def table_of_claims(rows: Rows) -> str:
    """Return what became of the claims that name the method, by budget."""
    made = results(rows.experiment)
    budgets = made["claims"]
    metrics = {each["name"]: Metric(**each) for each in made["metrics"]}
    heads = [budget.replace("_", " ") or "what came" for budget in budgets]
    lines = [["claim", "by", *heads]]
    for each in zip(*budgets.values(), strict=True):
        claim = each[0]["claim"]
        if claim["run"] in rows.own or claim["beats"] in rows.own:
            one, other = (label(rows.experiment, claim[side]) for side in ("run", "beats"))
            metric = metrics[claim["metric"]]
            came = [_verdict(found, metric) for found in each]
            lines.append([f"{one} beats {other} in {metric.title}", claim["source"], *came])
    return markdown(lines)


def block(page: str) -> str:
    """Return all that stands between the marks of a page."""
    parts = []
    for rows in SHOWN[page]:
        made = results(rows.experiment)
        how = f", {rows.budget.replace('_', ' ')}" if rows.budget else ""
        parts.append(
            f"[{made['title']}](../results/{rows.experiment}.md){how},\n"
            f"mean and standard deviation over {len(made['seeds'])} seeds, own runs in bold:\n\n"
            f"{table_of_runs(rows)}\n{table_of_claims(rows)}"
        )
    return "\n".join(parts)


def _verdict(found: Mapping[str, Any], metric: Metric) -> str:
    mean, seeds = found["gain"]["mean"], found["gain"]["seeds"]
    by = f"{100 * mean:.2f} points" if metric.percent else f"{mean:.3g}"
    return f"{found['verdict']} (by {by}, {found['agreeing']} of {seeds} seeds)"


def between_marks(page: str) -> str:
    """Return what a page has between its marks."""
    mark = f"results of {page}"
    text = (PAGES / f"{page}.md").read_text()
    (found,) = re.findall(f"<!-- {mark} -->\n\n(.*?)\n<!-- end of {mark} -->", text, re.S)
    return found


def main() -> None:
    """Write the results into all pages."""
    for page in SHOWN:
        replace_between_marks(PAGES / f"{page}.md", f"results of {page}", block(page))


if __name__ == "__main__":
    main()
