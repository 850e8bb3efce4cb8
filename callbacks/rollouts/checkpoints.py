"""Checkpoints in the middle of a window: what they keep of each rank."""

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_kd.collectives import gather_objects


def gather_ranks(of_rank: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what every rank keeps, on the CPU; all ranks call this together."""
    return gather_objects(move_data_to_device(of_rank, torch.device("cpu")))


def select_rank(trainer: L.Trainer, ranks: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Return what this rank has kept, on its device.

    Args:
        trainer: The trainer of the resumed run.
        ranks: What every rank has kept.
        steps: Optimizer steps of a window, in all of its passes.

    Raises:
        ValueError: If the window was generated for another number of processes.
    """
    if len(ranks) != trainer.world_size:
        raise ValueError(
            f"the checkpoint is from the middle of a window of rollouts on {len(ranks)} processes, "
            f"this run has {trainer.world_size}: resume with that many, or from a checkpoint at the "
            f"end of a window (every_n_train_steps a multiple of {steps})"
        )
    kept: dict[str, Any] = move_data_to_device(
        ranks[trainer.global_rank], trainer.strategy.root_device
    )
    return kept
