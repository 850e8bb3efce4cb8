"""Where compiled code of a chunk's arithmetic is worth its making."""

from typing import Literal

import torch

Compile = Literal["auto", "always", "never"]
"""Whether the arithmetic of a chunk is compiled; ``auto`` does so where it pays, see :func:`pays`."""

PAYS_FROM = 5e10
"""Logits of a run from which compiled code pays on a CPU. It spares about 5 ns of each, and is made in
half a minute or so for each of three sets of terms: a loss, a loss with metrics, an evaluation."""


def pays(device: torch.device, planned_logits: float) -> bool:
    """Return whether compiled code is worth its making.

    Args:
        device: Of the logits; on CUDA it always is, on a CPU from :data:`PAYS_FROM` logits on.
        planned_logits: How many logits a run is going to evaluate; 0 if nobody knows.

    Example:
        >>> pays(torch.device("cpu"), planned_logits=1e6)
        False
    """
    return device.type == "cuda" or (device.type == "cpu" and planned_logits >= PAYS_FROM)
