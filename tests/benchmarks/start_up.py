"""How long commands take until they do something: ``python -m tests.benchmarks.start_up``.

Each in a process of its own, twice, the second time with what the first has left in caches. The first
step is that of ``configs/sft.yaml``, from the shell's prompt to the end of the optimizer step.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "lightning_kd"]
STEP = ["fit", "--config", str(ROOT / "configs/sft.yaml"), "--trainer.max_steps", "1"]
STARTS = {
    "import lightning_kd": [sys.executable, "-c", "import lightning_kd"],
    "--help": [*COMMAND, "--help"],
    "fit --help": [*COMMAND, "fit", "--help"],
    "first step": [*COMMAND, *STEP, "--trainer.callbacks+", "tests.benchmarks.start_up.Stamp"],
}


class Stamp(Callback):
    """Prints when the first optimizer step was done."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Print the time."""
        if trainer.global_step == 1:
            print(f"first step at {time.time()}", flush=True)


def seconds(command: list[str]) -> float:
    """Until the command ends, or has taken its first step."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        end = time.time()
    stamps = [line.split()[-1] for line in done.stdout.splitlines() if "first step at" in line]
    return (float(stamps[0]) if stamps else end) - start


def main() -> None:
    """Print the table."""
    table = Table("", "first time, s", "again, s")
    for name, command in STARTS.items():
        table.add_row(name, *(f"{seconds(command):.1f}" for _ in range(2)))
    Console().print(table)


if __name__ == "__main__":
    main()
