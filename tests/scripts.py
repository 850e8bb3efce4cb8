"""Scripts of the tests that need processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def run_script(script: str, out: Path, launcher: Sequence[str] = ()) -> None:
    """Run a script under ``tests/``, which is told where to write."""
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "tests" / script, out],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def written_by(script: str, out: Path, launcher: Sequence[str] = ()) -> Any:
    """What a script writes to the file that it is given."""
    run_script(script, out, launcher)
    return torch.load(out, weights_only=True)
