"""Where a run of a comparison is made to fail or wait."""

import os
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback


class Failing(Callback):
    """Fails at the first step, while a file is not there."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if not Path("mended").exists():
            raise RuntimeError("a defect in the middle of training")


class Meeting(Callback):
    """Waits at step 6 until so many runs have come there, and as long as a file is there."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 6:
            met = Path("met")
            met.mkdir(exist_ok=True)
            (met / f"{os.getpid()}").touch()
            limit = time.monotonic() + 60
            while len([*met.iterdir()]) < self.runs:
                if time.monotonic() > limit:
                    raise TimeoutError(f"{self.runs} runs do not train at the same time")
                time.sleep(0.05)
            while Path("wait").exists():
                time.sleep(0.05)


class Waiting(Callback):
    """Says that step 6 has come, and waits there as long as a file is there."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 6:
            Path("step_6").touch()
            while Path("wait").exists():
                time.sleep(0.05)
