"""Means over tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMeans(Metric):
    """Means of several quantities over tokens, whatever batches and processes they come from.

    Args:
        names: Of the quantities.

    Example:
        >>> metric = TokenMeans(("a", "b"))
        >>> metric.update({"a": torch.tensor([1.0, 2.0])})
        >>> metric.update({"a": torch.tensor([6.0])})
        >>> metric.compute()
        {'a': tensor(3., dtype=torch.float64)}
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, values: dict[str, Tensor]) -> None:
        """Add the values of some tokens, ``(N,)`` for each name."""
        for name, of_tokens in values.items():
            place = self.names.index(name)
            here = torch.arange(len(self.names), device=of_tokens.device) == place
            self.sums = self.sums + here * of_tokens.sum(dtype=torch.float64)
            self.counts = self.counts + here * len(of_tokens)

    def compute(self) -> dict[str, Tensor]:
        """The means, by name, of what has any tokens."""
        triples = zip(self.names, self.sums, self.counts, strict=True)
        return {name: total / count for name, total, count in triples if count > 0}
