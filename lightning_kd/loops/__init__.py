"""Lightning's loops over epochs of unequal length, and exact resuming."""

from lightning_kd.loops.callback_states import for_evaluation
from lightning_kd.loops.checks import check_validates
from lightning_kd.loops.fit import EpochLoader, FitTrainer, estimated_steps
from lightning_kd.loops.requeue import SavesAfterStep, handler_before, requeues
from lightning_kd.loops.resume import prepare_trainer

__all__ = [
    "EpochLoader",
    "FitTrainer",
    "SavesAfterStep",
    "check_validates",
    "estimated_steps",
    "for_evaluation",
    "handler_before",
    "prepare_trainer",
    "requeues",
]
