import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.evaluation.sharded_heads import CASES

ROOT = Path(__file__).resolve().parents[2]


def test_two_sharded_processes_equal_one(tmp_path):
    """FSDP2, tied and untied, the head in the root unit and as one of its own."""
    script = ROOT / "tests" / "evaluation" / "sharded_heads.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, script, tmp_path / "differences.pt"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differences = torch.load(tmp_path / "differences.pt")
    assert set(differences) == set(CASES)
    assert max(differences.values()) < 1e-6, differences
