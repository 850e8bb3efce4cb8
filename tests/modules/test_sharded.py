"""Student and teacher in shards (FSDP2): the same losses, gradients and weights as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.modules.partition_grid import CUTS, run, without_float32_islands
from tests.modules.sharded_grid import CASES, RUNS, UNSHARDED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "grid.pt"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "modules" / "sharded_grid.py", out],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture
def _float64_norms(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", LlamaRMSNorm.forward)
    without_float32_islands()


@pytest.mark.usefixtures("_float64_norms")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_sharded_processes_equal_one(case, two_processes):
    """Ranks stop writing at different lengths; a window is cut short; the clip is active."""
    whole = run(case, CUTS[0])
    found = [two_processes[case, cut, placement] for cut, placement, _ in RUNS]
    found += [two_processes[case, (2, 1, 4), "unsharded"]] if case in UNSHARDED else []
    for other in found:
        assert other["losses"] == pytest.approx(whole["losses"], rel=1e-10)
        for a, b in zip(other["gradients"], whole["gradients"], strict=True):
            assert (a - b).norm() / b.norm() < 1e-10
        assert (other["weights"] - whole["weights"]).norm() / whole["weights"].norm() < 1e-12
