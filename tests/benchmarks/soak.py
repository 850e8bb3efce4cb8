"""Does a long run stay in its memory? ``python -m tests.benchmarks.soak``.

GKD on the arithmetic task, half of the windows written by the student; the resident memory of the
process every 200 steps, and how far it is above that after the first 200.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from lightning_kd import GKD, ArithmeticData, LocalTeacher, StudentSpec
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from tests.support.toys import tiny_llama

EVERY = 200


class Resident(Callback):
    """Megabytes of the process, every so many steps."""

    def __init__(self) -> None:
        self.megabytes: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % EVERY == 0:
            status = Path("/proc/self/status").read_text(encoding="ascii")
            (line,) = [x for x in status.splitlines() if x.startswith("VmRSS")]
            self.megabytes[trainer.global_step] = int(line.split()[1]) / 1e3


def main() -> None:
    """Run, and print a table."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    resident = Resident()
    writing = OnPolicyGeneration(lmbda=0.5, generation=SamplingOptions(max_new_tokens=8))
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            default_root_dir=folder,
            val_check_interval=500,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[writing, resident],
        )
        module = GKD(
            student=StudentSpec.of(tiny_llama(0, vocab_size=14, hidden_size=64)),
            teacher=LocalTeacher.of(tiny_llama(1, vocab_size=14, hidden_size=64)),
        )
        trainer.fit(module, datamodule=ArithmeticData(batch_size=32))
    table = Table("step", "resident MB", f"of step {EVERY}")
    first = resident.megabytes[EVERY]
    for step, megabytes in resident.megabytes.items():
        table.add_row(str(step), f"{megabytes:.1f}", f"{megabytes / first:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
