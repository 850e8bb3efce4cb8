"""Lightning's loops over epochs of unequal length, and exact resuming."""

from lightning_kd.loops.callback_states import for_evaluation
from lightning_kd.loops.checks import check_validates
from lightning_kd.loops.fit import EpochLoader, FitTrainer, estimated_steps
from lightning_kd.loops.requeue import SavesAfterStep, handler_before, requeues
from lightning_kd.loops.resume import prepare_trainer
from lightning_kd.loops.rewinding import at_last_step, has_trained

__all__ = [
    "EpochLoader",
    "FitTrainer",
    "SavesAfterStep",
    "at_last_step",
    "check_validates",
    "estimated_steps",
    "for_evaluation",
    "handler_before",
    "has_trained",
    "prepare_trainer",
    "requeues",
]
