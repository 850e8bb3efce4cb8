"""Evaluations that are not for every validation."""

from abc import abstractmethod
from typing import Any

import lightning as L

from lightning_kd.callbacks.evaluations import EvaluationCallback, Stage


class OccasionalEvaluation(EvaluationCallback):
    """Evaluate in the test, and in one of several validations.

    Args:
        every_n_validations: Validations from one evaluation to the next, the first included; 0 leaves
            it to the test. In between, what a monitor sees is the last value.

    Raises:
        ValueError: If it is negative.
    """

    def __init__(self, every_n_validations: int = 1) -> None:
        if every_n_validations < 0:
            raise ValueError(
                f"every_n_validations is {every_n_validations}; it must be 0 (only the test) or more"
            )
        self.every_n_validations = every_n_validations
        self._validations = 0

    @abstractmethod
    def evaluate(self, stage: Stage, module: L.LightningModule, *, is_trial: bool) -> None:
        """Evaluate and log.

        Args:
            stage: Prefix of the names.
            module: Has the student.
            is_trial: Whether this is the sanity check, for which little data is enough.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations so far, which a resumed run goes on from."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a number of validations."""
        self._validations = state_dict["validations"]

    def end(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Evaluate in the test, and if it is the turn of this validation."""
        if stage == "test":
            self.evaluate(stage, module, is_trial=False)
        elif self.every_n_validations > 0:
            is_trial = bool(trainer.sanity_checking)
            if is_trial or self._validations % self.every_n_validations == 0:
                self.evaluate(stage, module, is_trial=is_trial)
            self._validations += trainer.state.fn == "fit" and not is_trial
