"""What a report says where runs have failed, are not there yet, or came to no number."""

import json
import math

import pytest
from rich.console import Console
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from lightning_kd.comparison.execution import Outcome
from lightning_kd.comparison.experiment import Claim, Experiment, Layer, Variant
from lightning_kd.comparison.metrics import Metric
from lightning_kd.comparison.plan import Job
from lightning_kd.comparison.report import Report
from lightning_kd.comparison.tables import rich_table

SURE = {"A": [0.7, 0.82, 0.97], "B": [1.0, 1.1, 1.15]}


def reported(values, folder, more=(), better="lower", **said):
    """Return a report of runs with a value for each seed; None where the run failed."""
    experiment = Experiment(
        "tiny",
        "Tiny",
        [Variant(name, Layer(), name) for name in values],
        metrics=[Metric("test/x", better)],
        costs=["tokens"],
        **said,
    )
    jobs, outcomes = [], []
    for variant in experiment.variants:
        for seed, value in enumerate(values[variant.name]):
            jobs.append(Job(variant, "", seed, folder / variant.name / str(seed), {}, {}, "test"))
            result = {
                "run": variant.name,
                "budget": "",
                "seed": seed,
                "versions": {"torch": "1"},
                "metrics": {"test/x": value},
                "cost": {"tokens": 10.0},
                "device": "cpu",
                **dict(more),
            }
            done = Outcome(jobs[-1], result)
            outcomes.append(done if value is not None else Outcome(jobs[-1], None, "fit failed"))
    return Report(experiment, outcomes, ["x"], jobs)


def written(report, folder):
    """Return page, numbers and what the terminal shows."""
    report.write(folder)
    console = Console(record=True, width=200)
    report.show(console)
    numbers = (folder / "report.json").read_text()
    return (folder / "report.md").read_text(), numbers, console.export_text()


def claims(*names):
    return [Claim(name, "B", "test/x", "a paper") for name in names]


def test_claims_about_runs_that_failed_stay_and_do_not_help_the_others(tmp_path):
    """The corrected p of A is 0.04 without them, and 0.13 with them: as if all were there."""
    values = SURE | {"C": [0.9, None, 2.0], "D": [0.5, math.nan, 0.4]}
    report = reported(values, tmp_path, claims=claims("A", "C", "D"))
    page, numbers, shown = written(report, tmp_path)
    p = stats.ttest_rel(SURE["A"], SURE["B"]).pvalue
    assert p < 0.05 < 3 * p
    sure, missing, not_finite = json.loads(numbers)["claims"][""]
    assert sure["corrected"] == pytest.approx(3 * p)
    assert sure["verdict"] == "not decided"
    assert missing["p"] is missing["corrected"] is None
    assert missing["verdict"] == "cannot be told: C, seed 1 is missing"
    assert not_finite["verdict"] == "cannot be told: D, seed 1 is nan"
    for found in (sure, missing, not_finite):
        line = f"{found['claim']['run']} beats B in test/x"
        assert f"{line}: {found['verdict']}" in shown
        assert f"**{found['verdict']}** |" in page.split(f"| {line} |")[1].splitlines()[0]
    # The same of all pairs.
    (pairs,) = json.loads(numbers)["differences"][""].values()
    assert len(pairs) == 6
    assert pairs[0]["corrected"] == pytest.approx(6 * p)
    assert "| A - C | -0.615 ± 0.59 (C, seed 1 is missing) | 0 of 2 | - | - |" in page
    assert "no difference is significant" in shown


def test_a_claim_whose_runs_have_all_failed_is_listed(tmp_path):
    report = reported(SURE | {"C": [None] * 3}, tmp_path, claims=claims("C"))
    page, _, _ = written(report, tmp_path)
    assert (
        "| C beats B in test/x | a paper | - | 0 of 0 | - | - | **cannot be told: C, seed 0" in page
    )


def test_equal_differences_of_two_seeds_decide_nothing(tmp_path):
    values = {"A": [0.3, 0.4], "B": [0.5, 0.6]}
    report = reported(values, tmp_path, claims=claims("A"))
    (found,) = json.loads(written(report, tmp_path)[1])["claims"][""]
    assert found["p"] is None
    assert found["verdict"] == "not decided"
    assert found["agreeing"] == 2


def test_claims_of_one_seed_are_listed_and_cannot_be_told(tmp_path):
    report = reported({"A": [0.1], "B": [0.2]}, tmp_path, claims=claims("A"))
    page, _, shown = written(report, tmp_path)
    assert "A beats B in test/x: cannot be told: one seed" in shown
    row = "| A beats B in test/x | a paper | 0.1 | 1 of 1 | - | - | **cannot be told: one seed** |"
    assert row in page


def test_a_report_of_a_part_says_how_many_runs_are_there(tmp_path):
    report = reported({"A": [1.0, 2.0, 4.0], "B": [1.0, None, 3.0]}, tmp_path)
    page, numbers, shown = written(report, tmp_path)
    assert page.startswith("# Tiny\n\n**5 of 6 runs are there.**\n")
    assert shown.startswith("5 of 6 runs are there\n")
    assert json.loads(numbers)["runs"] == "5 of 6 runs are there"
    assert json.loads(numbers)["missing"] == ["B, seed 1"]
    page, numbers, shown = written(reported({"A": [1.0, 2.0]}, tmp_path), tmp_path)
    assert "runs are there" not in page + shown
    assert json.loads(numbers)["missing"] == []


def test_runs_that_were_not_begun_are_missing(tmp_path):
    whole = reported(SURE, tmp_path)
    jobs = [each.job for each in whole.outcomes]
    page, _, _ = written(Report(whole.experiment, whole.outcomes[:4], ["x"], jobs), tmp_path)
    assert "**4 of 6 runs are there.**" in page
    assert "| B | 1 (1 seed) | 10 (1 seed) |" in page


def test_a_mean_over_fewer_seeds_says_so(tmp_path):
    page, _, _ = written(
        reported({"A": [1.0, 2.0, 4.0], "B": [1.0, None, 3.0]}, tmp_path), tmp_path
    )
    assert "| A | 2.333 ± 1.5 | 10 |" in page
    assert "| B | 2 ± 1.4 (2 seeds) | 10 (2 seeds) |" in page


def test_the_table_below_failures_is_a_table(tmp_path):
    """Markdown takes lines directly below a list for a part of it."""
    page, _, _ = written(reported({"A": [1.0, None]}, tmp_path), tmp_path)
    assert "\n\n- A, seed 1: fit failed\n\n|  | test/x" in page


@pytest.mark.parametrize(
    "values",
    [
        {"A": [math.inf, 1.0], "B": [1.0, math.inf]},
        {"A": [math.inf, 1.0, 2.0], "B": [1.0, 1.0, 1.0]},
        {"A": [math.nan, 1.0, 2.0], "B": [-math.inf, 1.0, 1.0]},
    ],
)
def test_numbers_that_are_not_finite_make_a_report_that_is_json(values, tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    page, numbers, _ = written(reported(values, tmp_path, claims=claims("A")), tmp_path)
    made = json.loads(numbers, parse_constant=refuse)
    assert made["results"][0]["metrics"] == {"test/x": None}
    assert made["claims"][""][0]["verdict"].startswith("cannot be told: ")
    assert f"| A | {values['A'][0]} | 10 |" in page


@pytest.mark.parametrize(
    ("better", "said"),
    [("lower", "A better than B (lower)"), ("higher", "B better than A (higher)")],
)
def test_a_difference_says_which_run_is_better(better, said, tmp_path):
    report = reported({"A": SURE["A"], "B": SURE["B"]}, tmp_path, better=better)
    page, _, shown = written(report, tmp_path)
    assert f"test/x, significant at 0.05: {said}" in shown
    assert f"<summary>test/x, significant at 0.05: {said}</summary>" in page


def test_a_curve_that_no_run_has_logged_is_named(tmp_path):
    curves = [Metric("val/nothing"), Metric("val/x")]
    report = reported({"A": [1.0, 2.0]}, tmp_path, curves=curves)
    for seed in (0, 1):
        with SummaryWriter(tmp_path / "A" / f"{seed}") as writer:
            writer.add_scalar("val/x", 1.0, 0)
    page, *_ = written(report, tmp_path)
    line = "no run logged val/nothing, which has no curve; logged are val/x"
    assert line in page
    assert report.without_curve == {"": [line]}


def test_headings_break_behind_the_stage_and_nowhere_in_a_word():
    console = Console(record=True, width=40)
    heads = ["", "test/cross_entropy ↓", "steps", "generated"]
    console.print(rich_table([heads, ["a run", "1.0", "2", "3"]], ""), crop=False)
    said = console.export_text()
    assert all(word in said for word in ("test/", "cross_entropy", "steps", "generated"))
