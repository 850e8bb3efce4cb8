"""Which windows are the student's, and which of these are not generated anew."""

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_kd.callbacks.rollouts.replay import ReplayBuffer
from lightning_kd.loops import is_measured
from lightning_kd.modules import DistillationModule
from lightning_kd.schedules import AdaptiveShare, Constant, Schedule


class StudentWindows:
    """The student's share of windows where it follows validations, and its buffer, if it has one.

    Args:
        lmbda: Share of windows that the student generates.
        replay: Buffer of its completions; None for none.
    """

    def __init__(self, lmbda: Schedule, replay: ReplayBuffer | None) -> None:
        self.lmbda, self.replay = lmbda, replay
        self._adaptive = lmbda if isinstance(lmbda, AdaptiveShare) else None

    def forget_run(self) -> None:
        """Begin a run."""
        for part in self._parts.values():
            part.forget_run()

    def check(self, module: DistillationModule) -> None:
        """Refuse to replay what the student has written for a method that needs its present samples.

        Raises:
            ValueError: If it does, or the student generates nothing.
        """
        if self.replay is None:
            return
        if module.needs_own_samples:
            raise ValueError(
                f"{type(module).__name__} learns from samples of the student as it is, and replay "
                "gives it those of an earlier one; leave on_policy.replay out, or use a method "
                "without policy gradient, such as GKD"
            )
        if isinstance(self.lmbda, Constant) and self.lmbda.value == 0:
            raise ValueError(
                "on_policy.replay is a buffer of what the student generates, and with lmbda: 0 it "
                "generates nothing; set lmbda above 0, or leave replay out"
            )

    def check_validation(self, trainer: L.Trainer) -> None:
        """Refuse a share that follows validations in a run that has none.

        Raises:
            ValueError: If there is none.
        """
        if self._adaptive is not None and not trainer.enable_validation:
            raise ValueError(
                f"lmbda is an AdaptiveShare of {self._adaptive.monitor}, and this run has no "
                "validation; give validation data and a val_check_interval, or another schedule"
            )

    def hear_of_validation(self, trainer: L.Trainer) -> None:
        """Let the share follow what a validation has measured; one that has not leaves it as it is.

        Raises:
            ValueError: If the first one of a run has not measured what the share follows.
        """
        share, found = self._adaptive, trainer.callback_metrics
        if share is None or trainer.state.fn is not TrainerFn.FITTING:
            return
        if share.monitor not in found and not share.has_heard:
            names = ", ".join(sorted(name for name in found if name.startswith("val/")))
            raise ValueError(
                f"lmbda.monitor is {share.monitor!r}, and validation has measured "
                f"{names or 'nothing'}; choose one of these"
            )
        measured = share.monitor in found and is_measured(trainer, share.monitor)
        if measured and not trainer.sanity_checking:
            share.update(float(found[share.monitor]))

    def logged(self, step: int, on_policy: bool) -> dict[str, float]:
        """Return what is logged of a window that ends with an optimizer step.

        Args:
            step: The step.
            on_policy: Whether the window was the student's.
        """
        values = {} if self._adaptive is None else {"lmbda": self._adaptive(step)}
        if self.replay is not None:
            replayed = on_policy and self.replay.replaying
            values |= {"replayed": float(replayed), "replay_buffer": float(len(self.replay.rows))}
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the same on all ranks, for a checkpoint."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    @property
    def _parts(self) -> dict[str, AdaptiveShare | ReplayBuffer]:
        """What has a state."""
        both = {"lmbda": self._adaptive, "replay": self.replay}
        return {name: part for name, part in both.items() if part is not None}
