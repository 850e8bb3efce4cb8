"""A distance between distributions over different tokens."""

import torch.nn.functional as F
from torch import Tensor

from lightning_kd.fused.logits_chunk import LogitsChunk, TokenTerm


class SortedDistance(TokenTerm):
    r"""The L1 distance of sorted probabilities, :math:`\sum_k |q_{(k)} - p_{(k)}|`.

    Both sides are sorted from the most likely token on, and the narrower one is filled up with zeros.
    It lies in [0, 2] and does not see which token has which probability: 0 does not mean that the
    distributions are equal.

    Args:
        scored: True where both sides have read the same text, ``(N,)``; elsewhere the value is 0.
    """

    needs_teacher = True

    def __init__(self, scored: Tensor) -> None:
        self.scored = scored

    def values(self, chunk: LogitsChunk) -> Tensor:
        """The sum over the wider vocabulary."""
        student, teacher = (
            side.exp().sort(-1, descending=True).values
            for side in (chunk.student(), chunk.teacher())
        )
        surplus = student.shape[1] - teacher.shape[1]
        student, teacher = (
            F.pad(student, (0, max(-surplus, 0))),
            F.pad(teacher, (0, max(surplus, 0))),
        )
        total = (student - teacher).abs().sum(-1)
        return total.masked_fill(~self.scored[chunk.rows], 0.0)
