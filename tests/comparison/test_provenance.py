"""Where numbers come from, and what of a user's machine a report does not tell."""

import json
from pathlib import Path

import pytest

from lightning_kd.comparison.execution import Outcome
from lightning_kd.comparison.provenance import shown_command, without_places
from lightning_kd.comparison.report import Report
from tests.comparison.test_incomplete import reported, written


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--set data=/home/alice/data", "--set data=..."),
        ("--set=data=/data", "--set data=..."),
        ("--set data=[a,/srv/b]", "--set data=..."),
        ("--set data=file:/home/alice/x", "--set data=..."),
        ("--set data=../shared/data", "--set data=../shared/data"),
        ("--set size=700 --jobs 2", "--set size=700 --jobs 2"),
        ("--output /scratch/x --jobs 2", "--jobs 2"),
        ("--jobs 2 --output=/scratch/x", "--jobs 2"),
        ("--output runs/x", "--output runs/x"),
        ("--write /home/alice/page.md", ""),
        ("--write docs/page.md", "--write docs/page.md"),
        ("--config /home/alice/my.yaml --seeds 0 1", "--config .../my.yaml --seeds 0 1"),
        ("--configs /a/x.yaml b/y.yaml", "--configs .../x.yaml b/y.yaml"),
    ],
)
def test_a_command_is_shown_without_directories_of_its_user(words, shown):
    assert shown_command(words.split()) == shown.split()


def test_errors_name_logs_from_the_output_directory_on():
    said = "no file /home/alice/data/x.jsonl in ../runs/a (runs/a/SFT/0/log.txt)"
    shown = "no file ~/data/x.jsonl in ../runs/a (SFT/0/log.txt)"
    assert without_places(said, Path("runs/a")) == shown


def test_a_report_tells_nothing_of_its_users_directories(tmp_path):
    whole = reported({"A": [1.0, 2.0]}, tmp_path)
    jobs = [each.job for each in whole.outcomes]
    failed = Outcome(jobs[1], None, f"fit failed ({jobs[1].directory}/log.txt)")
    words = ["lightning-kd", "compare", "--set", "data=/home/alice/data", "--output", str(tmp_path)]
    report = Report(whole.experiment, [whole.outcomes[0], failed], words, jobs)
    page, numbers, _ = written(report, tmp_path)
    for text in (page, numbers):
        assert "/home/alice" not in text
        assert f"{tmp_path}" not in text
        assert "fit failed (A/1/log.txt)" in text
    assert json.loads(numbers)["command"] == ["lightning-kd", "compare", "--set", "data=..."]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"device": "cpu, 2 threads"}, "device cpu and cpu, 2 threads"),
        ({"versions": {"torch": "2"}}, "torch 1 and 2"),
        ({"sources": "0123456789abcdef"}, "sources 01234567 and unknown"),
        ({"sources": f"{'01' * 8}, {'23' * 8}"}, "sources 01010101, 23232323 and unknown"),
        ({"jobs": 2}, "jobs 2 and unknown"),
        ({"threads": 4}, "threads 4 and unknown"),
        ({}, ""),
    ],
)
def test_a_table_of_runs_that_were_made_differently_says_so(more, said, tmp_path):
    report = reported({"A": [1.0, 2.0], "B": [2.0, 3.0]}, tmp_path)
    report.outcomes[2].result.update(more)
    page, numbers, shown = written(report, tmp_path)
    line = f"The runs of this table were made differently: {said}." if said else ""
    assert json.loads(numbers)["made_differently"] == {"": line}
    if said:
        assert f"\n\n{line}\n" in page
        assert f"\n{line}\n" in shown
    assert ("made differently" in page + shown) == bool(said)
