"""Lightning's loops over epochs of unequal length, and what makes a resumed run go on exactly."""

from lightning_kd.loops.checks import check_epochs, check_validates
from lightning_kd.loops.fit import EpochLoader, FitTrainer, estimated_steps
from lightning_kd.loops.resume import prepare_trainer

__all__ = [
    "EpochLoader",
    "FitTrainer",
    "check_epochs",
    "check_validates",
    "estimated_steps",
    "prepare_trainer",
]
