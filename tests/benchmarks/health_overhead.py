"""What the overlap of most likely tokens costs a step: ``python -m tests.benchmarks.health_overhead``.

Steps of GKD on rows of one length, in one run, in turn: one that is not logged, one that is logged
without the overlap, and logged ones with it. The median of each kind in seconds of the processor,
which hardly depend on what else the machine does, and what it takes beyond the one that is logged
without it. Generation, which takes most of an on-policy step, is left out.
"""

import argparse
import time
import warnings
from statistics import median
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from lightning_kd.evaluation import Overlap
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import BatchList, trainer
from tests.support.toys import ragged_batch, tiny_llama

KINDS = {"not logged": None, "logged": 0, "with the 16 most likely": 16, "with the 64": 64}


class InTurn(L.Callback):
    """A kind of step after the other, and the processor's seconds for each."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.kind = list(KINDS)[trainer.global_step % len(KINDS)]
        k = KINDS[self.kind]
        trainer.log_every_n_steps = 10**9 if k is None else 1
        pl_module.train_distribution.overlap = Overlap(k) if k else None
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > len(KINDS):  # the first of each warms up
            self.seconds[self.kind].append(time.process_time() - self.started)


def measured(vocabulary: int, rounds: int) -> dict[str, float]:
    """The processor's seconds for each kind of step."""
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    size |= {"vocab_size": vocabulary}
    module = GKD(
        student=StudentSpec.of(tiny_llama(0, **size)),
        teacher=LocalTeacher.of(tiny_llama(1, **size)),
    )
    turns, steps = InTurn(), (rounds + 1) * len(KINDS)
    fit = trainer(max_steps=steps, callbacks=[turns])
    batch = ragged_batch([(16, 64)] * 8, vocabulary=vocabulary)
    fit.fit(module, datamodule=BatchList([batch] * steps))
    return {kind: median(seconds) for kind, seconds in turns.seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    table = Table("vocabulary", "step", "processor seconds", "beyond a logged one")
    for vocabulary in (512, 32_000):
        seconds = measured(vocabulary, rounds)
        for kind, value in seconds.items():
            beyond = f"{value / seconds['logged'] - 1:+.0%}"
            table.add_row(f"{vocabulary:,}", kind, f"{value:.3f}", beyond)
    Console().print(table)


if __name__ == "__main__":
    main()
