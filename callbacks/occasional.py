"""Evaluations that are not for every validation."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L

from lightning_kd.batch import Batch
from lightning_kd.callbacks.evaluations import EvaluationCallback, Stage
from lightning_kd.loops import watchers


class OccasionalEvaluation(EvaluationCallback):
    """Evaluate in the test, and in one of several validations of a fit.

    A run that only validates evaluates always. What watches one of the numbers decides in those
    validations alone that have measured it.

    Args:
        every_n_validations: Validations from one evaluation to the next, the first included; 0 leaves
            it to the test.

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
        self._found: Mapping[str, float] | None = None

    @property
    def needs_validation(self) -> bool:
        """Whether it is not for the test alone."""
        return self.every_n_validations > 0

    @abstractmethod
    def evaluate(self, module: L.LightningModule, *, is_trial: bool) -> Mapping[str, float]:
        """Evaluate, on all processes together, and return the numbers by their names.

        Args:
            module: Has the student.
            is_trial: Whether this is the sanity check, for which little data is enough.
        """

    @abstractmethod
    def measures(self, name: str) -> bool:
        """Return whether a name, without ``val/``, is one of its numbers."""

    def check(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Refuse validations that would evaluate nothing where something is expected of them.

        Raises:
            ValueError: If the evaluation is for the test alone, and the run only validates, or
                something watches its numbers in validation.
        """
        if stage == "test" or self.every_n_validations > 0:
            return
        own = f"{type(self).__name__}.every_n_validations is 0, which leaves it to the test"
        if trainer.state.fn == "validate":
            raise ValueError(
                f"{own}, so validate has nothing of it; set it to 1 or more, or use lightning-kd test"
            )
        for what, monitor in watchers(trainer):
            if monitor.startswith("val/") and self.measures(monitor.removeprefix("val/")):
                raise ValueError(
                    f"{own}, and {what} monitors {monitor}; set it to 1 or more, or choose another "
                    "monitor"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations so far, which a resumed run goes on from."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a number of validations."""
        self._validations = state_dict["validations"]

    def begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Forget the numbers of an evaluation before."""
        self._found = None

    def add(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Evaluate behind the first batch, if it is the turn of this validation.

        Not at the end: a callback that averages weights takes them out there again, before or after
        this one.
        """
        self._evaluate_once(trainer, module)

    def end(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Log the numbers."""
        self._evaluate_once(trainer, module)  # a process without a batch takes part here
        if self._found is not None:
            self.log_values(trainer, module, stage, self._found)
        self._validations += trainer.state.fn == "fit" and not trainer.sanity_checking

    def _evaluate_once(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._found is None and self._is_due(trainer):
            self._found = self.evaluate(module, is_trial=bool(trainer.sanity_checking))

    def _is_due(self, trainer: L.Trainer) -> bool:
        if trainer.state.fn != "fit":
            return True
        turn = self._validations % (self.every_n_validations or 1) == 0
        return self.every_n_validations > 0 and (turn or bool(trainer.sanity_checking))
