"""Tables, pictures and pages from results and event files, against NumPy."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from lightning_kd.comparison.curves import SECONDS, curve, read_scalars
from lightning_kd.comparison.execution import Outcome
from lightning_kd.comparison.experiment import Claim, Experiment, Layer, Variant
from lightning_kd.comparison.metrics import Metric
from lightning_kd.comparison.plan import Job
from lightning_kd.comparison.report import Report, check_page

NAMES = ("A", "B", "start")
VALUES = {"A": [0.25, 0.5, 0.75], "B": [0.125, 0.25, 0.25], "start": [0.0, 0.0, 0.0]}
EXPERIMENT = Experiment(
    "tiny",
    "Tiny",
    [Variant(name, Layer(), name, shown=name != "start") for name in NAMES],
    questions=["Which?"],
    metrics=[Metric("test/x", "higher", title="share", percent=True)],
    curves=[Metric("val/x")],
    costs=["tokens", "seconds"],
)


def outcome(name, seed, folder=Path(), budget=""):
    (variant,) = [v for v in EXPERIMENT.variants if v.name == name]
    job = Job(variant, budget, seed, folder / name / str(seed), {}, {}, "test")
    result = {
        "run": name,
        "budget": budget,
        "seed": seed,
        "versions": {"torch": "1"},
        "metrics": {"test/x": VALUES[name][seed]},
        "cost": {"tokens": 1000.0 * (seed + 1), "seconds": 20.0 + seed},
        "device": "cpu",
    }
    return Outcome(job, result)


def report_of(experiment, outcomes, command=("x",)):
    return Report(experiment, outcomes, command, [each.job for each in outcomes])


def write_events(folder, values, seconds, first=0):
    with SummaryWriter(folder) as writer:
        for step, (value, second) in enumerate(zip(values, seconds, strict=True), first):
            writer.add_scalar("val/x", value, step)
            writer.add_scalar(SECONDS, second, step)


@pytest.fixture
def report(tmp_path):
    outcomes = [outcome(name, seed, tmp_path) for seed in range(3) for name in NAMES]
    for each in outcomes:
        write_events(each.job.directory, [0.0, 1.0], [1.0, 2.0])
    return report_of(EXPERIMENT, outcomes, ["lightning-kd", "compare", "--config", "a b.yaml"])


@pytest.mark.slow
def test_the_table_has_means_and_deviations_of_the_seeds(report, tmp_path):
    report.write(tmp_path)
    page = (tmp_path / "report.md").read_text()
    for name in ("A", "B"):
        mean, deviation = np.mean(VALUES[name]), np.std(VALUES[name], ddof=1)
        row = f"| {name} | {100 * mean:.1f} ± {100 * deviation:.1f} % | 2,000 | 21 s |"
        assert row in page
    assert "| start |" not in page
    assert "lightning-kd compare --config 'a b.yaml'" in page
    assert "- Which?" in page
    assert "3 seeds can give no p below 0.25" in page
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert len(numbers["results"]) == 6
    (difference,) = numbers["differences"][""]["test/x"]
    gaps = np.subtract(VALUES["A"], VALUES["B"])
    assert difference["summary"]["mean"] == pytest.approx(gaps.mean())
    assert difference["positive"] == 3
    for picture in ("curves.png", "bars.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert f"]({picture})" in page


def test_the_terminal_shows_the_table_and_what_is_significant(report):
    console = Console(record=True, width=100)
    report.show(console)
    said = console.export_text()
    assert re.search(r"A +│ 50.0 ± 25.0 %", said)
    assert "share: no difference is significant at 0.05" in said


def test_one_seed_has_no_error_bars_and_says_so(tmp_path):
    report = report_of(EXPERIMENT, [outcome("A", 0, tmp_path)])
    report.write(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| A | 25.0 % | 1,000 | 20 s |" in page
    assert "One seed: there are no error bars" in page
    assert "difference |" not in page


def test_tables_and_pictures_go_between_the_marks_of_a_page(report, tmp_path):
    report.write(tmp_path)
    page = tmp_path / "docs" / "tiny.md"
    page.parent.mkdir()
    with pytest.raises(ValueError, match="there is no page"):
        check_page(page, EXPERIMENT)
    page.write_text("# By hand\n")
    with pytest.raises(ValueError, match="has no <!-- results -->"):
        check_page(page, EXPERIMENT)
    page.write_text("# By hand\n<!-- results -->\nold\n<!-- end of results -->\nlast words\n")
    check_page(page, EXPERIMENT)
    report.write_into(page, tmp_path)
    text = page.read_text()
    assert text.startswith("# By hand\n")
    assert text.endswith("last words\n")
    assert "old" not in text
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (page.parent / name).is_file()
    assert json.loads(page.with_suffix(".json").read_text())["title"] == "Tiny"


def test_numbers_beside_a_page_that_are_of_something_else_are_not_overwritten(tmp_path):
    page = tmp_path / "tiny.md"
    page.write_text("<!-- results -->\n<!-- end of results -->\n")
    numbers = page.with_suffix(".json")
    for text in ('{"mine": 1}', "[]", "no JSON", '{"title": "Other", "command": []}'):
        numbers.write_text(text)
        with pytest.raises(ValueError, match="would be overwritten, and is no report of 'Tiny'"):
            check_page(page, EXPERIMENT)
    numbers.write_text('{"title": "Tiny", "command": []}')
    check_page(page, EXPERIMENT)


@pytest.mark.parametrize("costs", [None, ["steps"]])
@pytest.mark.parametrize("limit", [None, "00:00:01:00"])
def test_a_budget_of_time_has_a_column_of_it(limit, costs, tmp_path):
    """Seconds of training leave out validation, which is in the budget."""
    named = {} if costs is None else {"costs": costs}
    experiment = Experiment(
        "tiny",
        "Tiny",
        EXPERIMENT.variants,
        budgets={"equal": Layer()},
        metrics=EXPERIMENT.metrics,
        **named,
    )
    each = outcome("A", 0, tmp_path, "equal")
    each.result["cost"]["wall_seconds"] = 61.0
    job = replace(each.job, fit={"trainer": {"max_time": limit}})
    Report(experiment, [replace(each, job=job)], ["x"], [job]).write(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert ("wall time" in page) == ("| 61 s |" in page) == (bool(limit) and costs is None)


def test_brackets_and_bars_are_shown_as_they_are(tmp_path):
    variant = replace(EXPERIMENT.variants[0], label="[bold]A[/bold] | [ours]")
    experiment = replace(
        EXPERIMENT, variants=[variant], metrics=[Metric("test/x", title="share [red]")]
    )
    report = report_of(experiment, [outcome("A", 0, tmp_path)])
    console = Console(record=True, width=200)
    report.show(console)
    said = console.export_text()
    assert "[bold]A[/bold] | [ours]" in said
    assert "share [red]" in said
    report.write(tmp_path)
    assert "| [bold]A[/bold] \\| [ours] | 0.25 |" in (tmp_path / "report.md").read_text()


def test_budgets_have_a_table_and_pictures_each(tmp_path):
    budgets = {"steps": Layer(), "time": Layer()}
    experiment = Experiment(
        "tiny", "Tiny", EXPERIMENT.variants, budgets=budgets, metrics=EXPERIMENT.metrics
    )
    outcomes = [outcome("A", seed, tmp_path, budget) for seed in (0, 1) for budget in budgets]
    outcomes += [outcome("B", seed, tmp_path) for seed in (0, 1)]
    report_of(experiment, outcomes).write(tmp_path)
    page = (tmp_path / "report.md").read_text()
    for budget in budgets:
        assert f"## {budget}" in page
        assert (tmp_path / f"bars_{budget}.png").is_file()
    assert page.count("| B | 18.8 ± 8.8 % |") == 2


def test_a_curve_is_the_mean_over_seeds_with_the_seconds_of_each_step(tmp_path):
    draw = np.random.default_rng(0)
    values, seconds = draw.normal(size=(3, 4)), np.cumsum(draw.uniform(size=(3, 4)), axis=1)
    for seed in range(3):
        write_events(tmp_path / str(seed), values[seed], seconds[seed])
    made = curve([read_scalars(tmp_path / str(seed)) for seed in range(3)], "val/x")
    assert made.steps == [1, 2, 3, 4]
    assert made.mean == pytest.approx(values.mean(axis=0), rel=1e-5)
    assert made.deviation == pytest.approx(values.std(axis=0, ddof=1), rel=1e-5)
    assert made.seconds == pytest.approx(seconds.mean(axis=0), rel=1e-5)
    assert curve([read_scalars(tmp_path / "0")], "val/other") is None


def test_steps_that_were_made_again_have_the_later_value(tmp_path):
    write_events(tmp_path, [1.0, 2.0, 3.0], [1, 2, 3])
    later = tmp_path / "later"
    write_events(later, [20.0, 30.0], [2, 3], first=1)
    (file,) = later.iterdir()
    file.rename(tmp_path / f"{file.name}.again")
    assert read_scalars(tmp_path)["val/x"] == {0: 1.0, 1: 20.0, 2: 30.0}


def test_steps_behind_the_start_of_a_later_file_are_dropped(tmp_path):
    """Of a run that was killed behind its checkpoint, and is slower in the time that is left."""
    for number, steps in enumerate([range(6), range(2, 4)]):
        place = tmp_path / f"{number}"
        with SummaryWriter(place) as writer:
            for step in steps:
                writer.add_scalar("train/loss", number, step)
                if step % 2:
                    writer.add_scalar("val/x", number, step)
                if step == 5:
                    writer.add_scalar("val/at_the_end", number, step)
        (file,) = place.iterdir()
        # The files of a copy may have any times.
        os.utime(file, (1000 - number, 1000 - number))
        file.rename(tmp_path / f"{file.name}.{number}")
        place.rmdir()
    assert read_scalars(tmp_path) == {
        "train/loss": {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0},
        "val/x": {1: 0.0, 3: 1.0},
    }


def test_curves_and_bars_leave_out_what_is_not_finite(tmp_path):
    outcomes = [outcome("A", seed, tmp_path) for seed in range(2)]
    for each, values in zip(outcomes, ([1.0, np.inf, 2.0], [1.0, -np.inf, 3.0]), strict=True):
        write_events(each.job.directory, values, [1, 2, 3])
        each.result["metrics"]["test/x"] = values[1]
    made = curve([read_scalars(each.job.directory) for each in outcomes], "val/x")
    assert [made.mean[0], made.mean[2]] == [1.0, 2.5]
    assert np.isnan(made.mean[1])
    report_of(EXPERIMENT, outcomes).write(tmp_path)
    for picture in ("curves.png", "bars.png"):
        assert (tmp_path / picture).exists()


def test_a_picture_that_is_not_drawn_any_more_is_removed(tmp_path):
    (tmp_path / "bars.png").write_text("of an earlier report")
    each = outcome("A", 0, tmp_path)
    each.result["metrics"] = {}
    report_of(replace(EXPERIMENT, metrics=[]), [each]).write(tmp_path)
    assert not (tmp_path / "bars.png").exists()
    assert "bars.png" not in (tmp_path / "report.md").read_text()


CLAIMED = {
    "sure": [0.11, 0.22, 0.32],
    "worse": [-0.3, -0.2, -0.09],
    "unsure": [0.2, -0.1, 0.5],
    "base": [0.0, 0.1, 0.2],
}


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_claim_holds_does_not_or_is_not_decided(better, tmp_path):
    sign = 1 if better == "higher" else -1
    names = [name for name in CLAIMED if name != "base"]
    experiment = replace(
        EXPERIMENT,
        variants=[Variant(name, Layer(), f"run {name}") for name in CLAIMED],
        metrics=[Metric("test/x", better, title="quality")],
        claims=[Claim(name, "base", "test/x", "a paper") for name in names],
    )
    outcomes = []
    for name, values in CLAIMED.items():
        for seed, value in enumerate(values):
            made = outcome("A", seed, tmp_path)
            (variant,) = [v for v in experiment.variants if v.name == name]
            job = replace(made.job, variant=variant, directory=tmp_path / name / f"{seed}")
            result = made.result | {"run": name, "metrics": {"test/x": sign * value}}
            outcomes.append(Outcome(job, result))
    report = report_of(experiment, outcomes)
    report.write(tmp_path)
    page, numbers = (
        (tmp_path / "report.md").read_text(),
        json.loads((tmp_path / "report.json").read_text()),
    )
    expected = {
        "sure": "holds",
        "worse": "does not hold: the opposite does",
        "unsure": "not decided",
    }
    ps = {name: stats.ttest_rel(CLAIMED[name], CLAIMED["base"]).pvalue for name in names}
    # Holm: the least of three p times three, the next times two, and never below an earlier one.
    least, middle, largest = sorted(ps, key=ps.__getitem__)
    corrected = {least: 3 * ps[least]}
    corrected[middle] = max(corrected[least], 2 * ps[middle])
    corrected[largest] = max(corrected[middle], ps[largest])
    for name, found in zip(names, numbers["claims"][""], strict=True):
        assert found["claim"]["run"] == name
        assert found["verdict"] == expected[name]
        assert found["gain"]["mean"] == pytest.approx(
            np.mean(np.subtract(CLAIMED[name], CLAIMED["base"]))
        )
        assert found["p"] == pytest.approx(ps[name])
        assert found["corrected"] == pytest.approx(corrected[name])
        row = f"| run {name} beats run base in quality | a paper | "
        assert row in page
        assert f"**{expected[name]}** |" in page.split(row)[1].splitlines()[0]
    assert "2 of 3" in page
    console = Console(record=True, width=200)
    report.show(console)
    assert "run sure beats run base in quality: holds" in console.export_text()
