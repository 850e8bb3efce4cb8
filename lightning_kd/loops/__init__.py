"""Lightning's loops over epochs of unequal length, and exact resuming."""

from lightning_kd.loops.callback_states import for_evaluation
from lightning_kd.loops.checks import check_validates
from lightning_kd.loops.fit import EpochLoader, FitTrainer, estimated_steps
from lightning_kd.loops.measurements import is_measured
from lightning_kd.loops.monitors import watchers
from lightning_kd.loops.requeue import SavesAfterStep, requeues
from lightning_kd.loops.resume import prepare_trainer
from lightning_kd.loops.rewinding import at_last_step, has_trained
from lightning_kd.loops.termination import TerminationSignals

__all__ = [
    "EpochLoader",
    "FitTrainer",
    "SavesAfterStep",
    "TerminationSignals",
    "at_last_step",
    "check_validates",
    "estimated_steps",
    "for_evaluation",
    "has_trained",
    "is_measured",
    "prepare_trainer",
    "requeues",
    "watchers",
]
