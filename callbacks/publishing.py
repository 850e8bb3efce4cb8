"""Numbers of callbacks on their way to the loggers, and objects from all ranks."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor


def publish(trainer: L.Trainer, values: Mapping[str, Tensor], step: int) -> None:
    """Log numbers at an optimizer step (counted from 0), and show them in ``callback_metrics``.

    Straight to the loggers: through ``module.log``, two dozen numbers take a few percent of a step.
    """
    numbers = torch.stack([value.double() for value in values.values()]).cpu()
    for logger in trainer.loggers:
        logger.log_metrics(dict(zip(values, numbers.tolist(), strict=True)), step)
    trainer.callback_metrics.update(dict(zip(values, numbers, strict=True)))


def of_all_ranks(trainer: L.Trainer, own: Any) -> list[Any]:
    """An object of every rank, on every rank; a collective."""
    ranks = [own]
    if trainer.world_size > 1:
        ranks = [None] * trainer.world_size
        torch.distributed.all_gather_object(ranks, own)
    return ranks
