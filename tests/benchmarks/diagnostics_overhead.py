"""What the diagnostics cost: ``python -m tests.benchmarks.diagnostics_overhead``.

One training run, on one machine, with the time inside the callback's hooks measured against the time
of whole steps. The worst case looks at every step; by default only logged steps are looked at.
"""

import tempfile
import time
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from lightning_kd.callbacks import LossNormalizationDiagnostics
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SupervisedKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama

STEPS = 20


class Timed(LossNormalizationDiagnostics):
    """The callback, with a clock around its hooks."""

    def __init__(self) -> None:
        super().__init__(histograms_every=100)
        self.inside = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        started = time.perf_counter()
        super().on_train_batch_start(*arguments)
        self.inside += time.perf_counter() - started

    def on_train_batch_end(self, *arguments: Any) -> None:
        started = time.perf_counter()
        super().on_train_batch_end(*arguments)
        self.inside += time.perf_counter() - started


class Clock(L.Callback):
    """Time from the first step's end to the last's: warm-up left out."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            self.started = time.perf_counter()
            self.timed.inside = 0.0
        self.total = time.perf_counter() - getattr(self, "started", time.perf_counter())

    def __init__(self, timed: Timed) -> None:
        self.timed = timed


def share(every: int, size: dict[str, int]) -> tuple[float, float]:
    """Seconds per step, and the share of them inside the callback."""
    module = SupervisedKD(
        student=StudentSpec.of(tiny_llama(0, **size)),
        teacher=LocalTeacher.of(tiny_llama(1, **size)),
    )
    timed = Timed()
    rows = [(8, 20 + 7 * k) for k in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        fit = trainer(
            max_steps=STEPS,
            log_every_n_steps=every,
            callbacks=[timed, Clock(timed)],
            logger=TensorBoardLogger(folder, default_hp_metric=False),
        )
        fit.fit(module, datamodule=BatchList([ragged_batch(rows)] * STEPS))
    (clock,) = [c for c in fit.callbacks if isinstance(c, Clock)]
    return clock.total / (STEPS - 1), timed.inside / clock.total


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    table = Table("model", "looked at", "step", "inside the callback")
    models = {
        "0.6 M parameters": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
        "4 M parameters": {"hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 4},
    }
    for name, size in models.items():
        for every in (1, 10):
            seconds, inside = share(every, size | {"max_position_embeddings": 128})
            every_name = "every step" if every == 1 else f"every {every} steps"
            table.add_row(name, every_name, f"{seconds * 1e3:.0f} ms", f"{inside:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
