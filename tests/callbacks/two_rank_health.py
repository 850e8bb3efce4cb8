"""What two ranks log of the health of an on-policy run with several teachers.

A script, launched as a user starts ddp: ``python two_rank_health.py OUT``.
"""

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import Logger

from lightning_kd.callbacks import HealthOptions, OnPolicyGeneration
from lightning_kd.data import Example
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD, DistillationModule
from lightning_kd.teachers import LocalTeacher, RoutedTeacher
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

STEPS = 6
TIMES = ("rollout/tokens_per_second", "rollout/time_share")


class Memory(Logger):
    """What was logged, by step and name."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.steps.setdefault(step or 0, {}).update(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def timeless(self) -> dict[int, dict[str, float]]:
        """All but speeds."""
        return {s: {k: v for k, v in m.items() if k not in TIMES} for s, m in self.steps.items()}


class Routed(Letters):
    """Letters of which every third row is for the second teacher."""

    def example(self, row: int, pass_: int) -> Example:
        name = "b" if row % 3 == 0 else "a"
        return replace(super().example(row, pass_), extra={"teacher": name})


def routed() -> RoutedTeacher:
    return RoutedTeacher({"a": LocalTeacher.of(tiny_llama(1)), "b": LocalTeacher.of(tiny_llama(2))})


def gkd() -> GKD:
    return GKD(student=StudentSpec.of(tiny_llama(0)), teacher=routed())


def run(
    module: DistillationModule,
    steps: int = STEPS,
    *,
    batch_size: int = 8,
    world: int = 1,
    options: Any = (),
    callbacks: Any = (),
    ckpt: Any = None,
    **settings: Any,
) -> Memory:
    """Fit, and return what was logged."""
    memory = Memory()
    chosen = {"generation": SamplingOptions(max_new_tokens=24), "table_every": 0}
    chosen |= {"health": HealthOptions(windows=4)}
    generation = OnPolicyGeneration(**(chosen | dict(options)))
    lightning = trainer(
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[generation, *callbacks],
        logger=memory,
        **settings,
    )
    data = Routed(batch_size=batch_size // world, rows=24)
    lightning.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return memory


def main() -> None:
    """Save what the first rank logs, and what the second would."""
    warnings.simplefilter("ignore")
    folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", "0"))
    module = gkd()
    memory = run(module, world=2)
    seen = {k: float(v) for k, v in module.trainer.callback_metrics.items() if k not in TIMES}
    torch.save([memory.timeless(), seen], folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
