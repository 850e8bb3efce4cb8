"""Where a run of a comparison is made to fail or wait."""

import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback


class Failing(Callback):
    """Fails at the first step, while a file is not there."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if not Path("mended").exists():
            raise RuntimeError("a defect in the middle of training")


class Waiting(Callback):
    """Says that step 6 has come, and waits there as long as a file is there."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 6:
            Path("step_6").touch()
            while Path("wait").exists():
                time.sleep(0.05)
