"""Where and how a run trains: device, precision, processes, rollouts."""

from dataclasses import dataclass

import lightning as L
import torch

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.generation import Engine
from lightning_kd.preflight.facts import RolloutFacts
from lightning_kd.schedules import Constant
from lightning_kd.strategies import adapter_of


@dataclass(frozen=True)
class Setting:
    """What a trainer decides about memory.

    Attributes:
        device: Device of a process.
        precision: As Lightning names it.
        processes: Processes of the run that share the device's memory.
        shards: Processes that share one copy of the student.
        rollouts: Completions that are generated; None without.
        engine: What generates them.
        beams: Beams of a row.
    """

    device: torch.device
    precision: str = "32-true"
    processes: int = 1
    shards: int = 1
    rollouts: RolloutFacts | None = None
    engine: Engine | None = None
    beams: int = 1

    @classmethod
    def of(cls, trainer: L.Trainer | None, batch_size: int) -> "Setting":
        """Return the setting of a trainer; without one, that of one process in float32.

        Args:
            trainer: The trainer.
            batch_size: Rows of a micro-batch.
        """
        if trainer is None:
            found = torch.accelerator.current_accelerator() or torch.device("cpu")
            return cls(torch.device(found.type, 0) if found.type != "cpu" else found)
        device = trainer.strategy.root_device
        rollouts, engine, beams = None, None, 1
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, OnPolicyGeneration):
                window = callback.steps_per_window * trainer.accumulate_grad_batches * batch_size
                rollouts = describe_rollouts(callback, window)
                engine, beams = callback.engine, callback.generation.num_beams
        return cls(
            device,
            str(trainer.precision),
            trainer.num_devices if device.type == "cpu" else 1,
            trainer.world_size if adapter_of(trainer).shards_weights else 1,
            rollouts,
            engine,
            beams,
        )


def describe_rollouts(callback: OnPolicyGeneration, window: int) -> RolloutFacts:
    """Return what is known of generated completions.

    Args:
        callback: What generates them.
        window: Rows of a window on one process.
    """
    share = callback.lmbda.value if isinstance(callback.lmbda, Constant) else None
    by_student, others = share != 0, share != 1
    taught = others and callback.off_policy == "teacher"
    together = callback.mixture_alpha > 0 or callback.engine.asks_teacher
    return RolloutFacts(
        max_new_tokens=callback.generation.max_new_tokens,
        rows=min(window, callback.rows_at_once or window),
        trains_on_data=others and callback.off_policy == "dataset",
        by_student=by_student,
        by_teacher=taught or (by_student and together),
    )
