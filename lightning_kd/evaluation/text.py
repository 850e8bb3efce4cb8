"""Metrics of generated text."""

import torch
from torch import Tensor
from torchmetrics import Metric


class ExactMatch(Metric):
    """Share of completions that equal their reference, white space at the ends aside.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["975", "12 "], ["975", "13"])
        >>> metric.compute().item()
        0.5
    """

    full_state_update = False
    matches: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("matches", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, completions: list[str], references: list[str]) -> None:
        """Add completions and what they should have been."""
        pairs = zip(completions, references, strict=True)
        self.matches += sum(a.strip() == b.strip() for a, b in pairs)
        self.total += len(references)

    def compute(self) -> Tensor:
        """Matches over completions; 0 without any."""
        return self.matches / self.total.clamp(min=1)
