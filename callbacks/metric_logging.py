"""Logging of metrics of an optimizer step."""

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor


def log_metrics(trainer: L.Trainer, values: Mapping[str, Tensor], step: int) -> None:
    """Log metrics at an optimizer step, counted from 0, and add them to ``callback_metrics``.

    They go directly to the loggers: ``module.log`` would take a few percent of a step for two dozen.
    """
    numbers = torch.stack([value.double() for value in values.values()]).cpu()
    for logger in trainer.loggers:
        logger.log_metrics(dict(zip(values, numbers.tolist(), strict=True)), step)
    trainer.callback_metrics.update(dict(zip(values, numbers, strict=True)))
