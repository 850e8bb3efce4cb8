"""Disks that are full, and directories in which nothing may be written."""

import os
from pathlib import Path

import pytest

from lightning_kd.comparison.places import cannot, locked
from lightning_kd.comparison.report import check_page
from tests.comparison.test_incomplete import SURE, reported


def full_disk(name, monkeypatch):
    """Leave no room for files of a name, and none for copies."""
    write = Path.write_text

    def full(path):
        path.write_bytes(b"{")
        raise OSError(28, "No space left on device", str(path))

    def write_text(path, *given, **options):
        return full(path) if name in path.name else write(path, *given, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr("shutil.copyfile", lambda source, place: full(place))


def test_a_report_for_which_there_is_no_room_leaves_nothing_and_is_said(tmp_path, monkeypatch):
    full_disk("report.json", monkeypatch)
    report = reported(SURE, tmp_path)
    with pytest.raises(ValueError, match=r"the report: .*No space left"), cannot("the report"):
        report.write(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if "report.json" in name]


def test_numbers_beside_a_page_stay_those_of_before_where_there_is_no_room(tmp_path, monkeypatch):
    report, page = reported(SURE, tmp_path), tmp_path / "page.md"
    page.write_text("<!-- results -->\n<!-- end of results -->\n")
    report.write(tmp_path)
    report.write_into(page, tmp_path)
    before = page.with_suffix(".json").read_text()
    full_disk("nothing", monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        report.write_into(page, tmp_path)
    assert page.with_suffix(".json").read_text() == before
    check_page(page, report.experiment)


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match=r"--output .*x cannot be written"), locked(tmp_path / "x"):
        pass
