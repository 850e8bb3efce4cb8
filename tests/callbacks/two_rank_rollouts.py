"""On-policy windows and rollouts of two ranks, one of which also uses global random generators.

A script, launched as a user starts ddp: ``python two_rank_rollouts.py OUT``.
"""

import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.callbacks import HealthOptions, OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

STEPS = 200


class Recorder(Callback):
    """Record whether each step is on policy; draw global random numbers on the first rank."""

    def __init__(self, draws: bool) -> None:
        self.draws = draws
        self.on_policy: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.on_policy.append("completion_mask" in batch)
        if self.draws and trainer.global_rank == 0:
            random.random()
            np.random.rand()
            torch.rand(3)


def run(path: Path, steps: int = STEPS, draws: bool = True, world: int = 2, **fit: Any) -> Any:
    """Return whether each step is on policy; append completions to ``path``."""
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))
    generation = OnPolicyGeneration(
        lmbda=0.5,
        generation=SamplingOptions(max_new_tokens=4),  # cuts most completions
        health=HealthOptions(truncation_limit=1.0),
        table_every=0,
        path=str(path),
    )
    recorder = Recorder(draws)
    lightning = trainer(
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[generation, recorder],
    )
    lightning.fit(module, datamodule=Letters(batch_size=4 // world), **fit)
    return recorder.on_policy


def main() -> None:
    """Save the record of each rank."""
    warnings.simplefilter("ignore")
    folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", "0"))
    on_policy = run(folder / "rollouts.jsonl")
    torch.save(on_policy, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
