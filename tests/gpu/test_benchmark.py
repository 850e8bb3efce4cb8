"""``make gpu`` where there is no GPU, and what it writes where there is one."""

import pytest
import torch

from tests.benchmarks import gpu
from tests.support.scripts import ROOT


def test_without_a_gpu_it_says_so_and_nothing_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 0
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.processes
def test_a_part_that_fails_or_is_too_slow_is_a_line_of_the_table(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert gpu.apart("nothing", 240)[-1] == gpu.Row("nothing", "not to its end", "exit code 2")
    assert gpu.apart("fused", 0) == [gpu.Row("fused", "not to its end", "too long")]


def test_the_table_takes_the_place_of_the_one_before(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu -->\nold\n<!-- end of gpu -->\nafter\n")
    text = gpu.as_markdown([gpu.Row("a", "1 s", "2.0 of b")], "A device", "3 passed")
    gpu.write(page, text)
    assert "| a | 1 s | 2.0 of b |" in page.read_text()
    assert "A device" in page.read_text()
    assert "old" not in page.read_text()
    assert page.read_text().startswith("before\n<!-- gpu -->")
    assert page.read_text().endswith("<!-- end of gpu -->\nafter\n")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no <!-- gpu -->"):
        gpu.write(page, text)


def test_the_docs_page_has_a_place_for_it():
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert all(mark in page for mark in gpu.MARKS)
