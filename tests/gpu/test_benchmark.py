"""``make gpu`` where there is no GPU, and what it writes where there is one."""

import sys
import time
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu
from tests.support.scripts import ROOT

pytestmark = pytest.mark.slow


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


GRANDCHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.processes
def test_what_a_part_has_started_ends_with_it():
    """A process that is left would keep its memory of the GPU, which the next part measures."""
    written, code = gpu.within([sys.executable, "-c", GRANDCHILD], 3)
    assert code is None
    state = Path(f"/proc/{int(written)}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


def test_tests_that_hang_are_no_success(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A device")
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(gpu, "PARTS", {})
    given = []
    monkeypatch.setattr(gpu, "within", lambda *which: given.append(which) or ("... 3 of 9", None))
    assert gpu.main() == 1
    assert given[0][1] == gpu.TESTING
    assert "`tests/gpu`: not to their end in 300 s" in capsys.readouterr().out


def test_what_is_compared_with_products_that_failed_is_shown_alone(monkeypatch):
    def times(names, shape, rounds):
        if names == ["products"]:
            raise RuntimeError("CUDA out of memory")
        return dict.fromkeys(names, (0.5, None))

    monkeypatch.setattr(gpu, "times", times)
    monkeypatch.setattr(gpu, "peak", lambda name, shape: 2000.0)
    rows = {row.what: row for row in gpu.fused()}
    assert rows["forward_kl: products"].value == "failed"
    others = [row for row in rows.values() if "products" not in row.what]
    assert len(others) > 3
    assert {(row.value, row.ratio) for row in others} == {("500.0 ms, 2.0 GB", "")}


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


TOY = gpu.Sizes(
    device="cpu",
    dtype="float32",
    shape=(16, 32, 2, 2),
    vocabulary=32,
    prompt=4,
    new=12,
    rows=(4,),
    window=12,
    slots=4,
    mean=4,
    student=(16, 32, 1, 2),
    teacher=(32, 32, 1, 2),
    most=2,
)


def test_every_way_of_generation_is_a_line_of_the_table():
    rows = list(gpu.generation(TOY))
    assert [row.what for row in rows] == [
        "4 rows: generate",
        "4 rows: CachedSampler, dynamic cache",
        "4 rows: CachedSampler, static cache",
        "4 rows: ContinuousBatchingSampler",
        "4 rows: TransformersContinuousBatching",
        "4 rows: generate, static cache",
    ]
    assert all(row.value.endswith("tokens/s") for row in rows)
    assert rows[0].ratio == "1.00 of generate"


def test_rows_of_unequal_length_are_generated_in_every_way():
    rows = list(gpu.unequal(TOY))
    assert len(rows) == 6
    assert all(row.value.endswith("tokens/s") for row in rows)


class Broken(gpu.Generate):
    def generate(self, *_, **__):
        raise RuntimeError("out of memory\nand more")


def test_a_way_that_fails_is_a_line_and_the_others_go_on():
    model = gpu.llama(TOY, TOY.shape)
    ways = {"generate": (Broken(), 4), "CachedSampler": (gpu.CachedSampler(), 4)}
    rows = list(gpu.rates(ways, model, gpu._prompts(TOY, 4, 1), 8, "4 rows"))
    assert rows[0] == gpu.Row("4 rows: generate", "failed", "out of memory")
    assert rows[1].value.endswith("tokens/s")


def test_models_are_doubled_until_a_step_fails_or_there_is_no_time(monkeypatch):
    rows = list(gpu.scale(TOY, seconds=1000))
    assert [row.what.rpartition(" ")[2] for row in rows] == ["replicated", "offloaded"]
    assert all(", 2 layers" in row.value for row in rows)
    assert "no time for 2 layers" in next(gpu.scale(TOY, seconds=0)).ratio

    def too_large(sizes, layers, placement):
        if layers > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return f"{layers} layers"

    monkeypatch.setattr(gpu, "_one_step", too_large)
    row = next(gpu.scale(TOY, seconds=1000))
    assert (row.value, row.ratio) == ("1 layers", "2 layers: CUDA out of memory")


def test_the_parts_leave_time_for_the_tests():
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 520
