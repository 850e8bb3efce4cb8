"""Logging of metrics of an optimizer step."""

from collections.abc import Mapping, Sequence

import lightning as L
import torch
from torch import Tensor


def log_metrics(trainer: L.Trainer, values: Mapping[str, Tensor], step: int) -> None:
    """Log metrics at an optimizer step, counted from 0, and add them to ``callback_metrics``.

    They go directly to the loggers: ``module.log`` would take a few percent of a step for two dozen.
    """
    numbers = on_one_device(list(values.values())).cpu()
    for logger in trainer.loggers:
        logger.log_metrics(dict(zip(values, numbers.tolist(), strict=True)), step)
    trainer.callback_metrics.update(dict(zip(values, numbers, strict=True)))


def on_one_device(values: Sequence[Tensor]) -> Tensor:
    """Return scalars as one tensor, float64, on the GPU if any of them is: one copy brings it back.

    Example:
        >>> on_one_device([torch.tensor(1), torch.tensor(0.5)]).tolist()
        [1.0, 0.5]
    """
    devices = sorted({value.device for value in values}, key=lambda device: device.type == "cpu")
    return torch.stack([value.double().to(devices[0]) for value in values])
