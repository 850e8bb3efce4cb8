"""Scripts of the tests that need processes of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = Path(f"{sys.prefix}-deepspeed") / "bin" / "python"
"""An environment of its own: where DeepSpeed can be imported, it writes to everybody's output."""

needs_deepspeed = pytest.mark.skipif(
    not DEEPSPEED.parents[1].joinpath("installed").exists(),
    reason="no DeepSpeed beside this environment; make deepspeed builds it",
)


def run_script(
    script: str,
    out: Path,
    *arguments: str,
    launcher: Sequence[str] = (),
    python: Path | None = None,
) -> None:
    """Run a script under ``tests/``, which is told where to write."""
    done = subprocess.run(
        [python or sys.executable, *launcher, ROOT / "tests" / script, out, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    # DeepSpeed's third stage sometimes aborts on a CPU, after everything has been written.
    aborted = python is not None and done.returncode == -signal.SIGABRT and out.exists()
    assert done.returncode == 0 or aborted, done.stderr[-3000:]


def written_by(script: str, out: Path, *arguments: str, **options: Any) -> Any:
    """What a script writes to the file that it is given."""
    run_script(script, out, *arguments, **options)
    return torch.load(out, weights_only=True)
