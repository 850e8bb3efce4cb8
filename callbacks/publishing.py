"""Logging of metrics of an optimizer step."""

from collections.abc import Mapping

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
