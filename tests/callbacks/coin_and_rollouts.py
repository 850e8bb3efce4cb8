"""What two ranks toss and write while one of them also draws from global generators.

A script of its own, launched as a user would start ddp: ``python coin_and_rollouts.py OUT``.
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

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import Letters, trainer
from tests.support.toys import tiny_llama

STEPS = 200


class Watch(Callback):
    """Notes who wrote each step, and is a nuisance on the first rank."""

    def __init__(self, nuisance: bool) -> None:
        self.nuisance = nuisance
        self.own: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.own.append("completion_mask" in batch)
        if self.nuisance and trainer.global_rank == 0:
            random.random()
            np.random.rand()
            torch.rand(3)


def run(path: Path, steps: int = STEPS, nuisance: bool = True, world: int = 2, **fit: Any) -> Any:
    """Who wrote each step; the completions are appended to ``path``."""
    module = GKD(student=StudentSpec.of(tiny_llama(0)), teacher=LocalTeacher.of(tiny_llama(1)))
    generation = OnPolicyGeneration(
        lmbda=0.5, generation=SamplingOptions(max_new_tokens=4), table_every=0, path=str(path)
    )
    watch = Watch(nuisance)
    lightning = trainer(
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[generation, watch],
    )
    lightning.fit(module, datamodule=Letters(batch_size=4 // world), **fit)
    return watch.own


def main() -> None:
    """Both ranks write down what they saw."""
    warnings.simplefilter("ignore")
    folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", "0"))
    own = run(folder / "rollouts.jsonl")
    torch.save(own, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
