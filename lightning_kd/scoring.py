"""Which positions of a batch enter a loss."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX


@dataclass(frozen=True)
class ScoredPositions:
    """The positions of a batch whose logits enter the loss, flattened in row order.

    Example:
        >>> labels = torch.tensor([[-100, -100, 7, 8], [-100, 9, -100, -100]])
        >>> scored = ScoredPositions.from_labels(labels)
        >>> scored.targets, scored.rows, scored.tokens_per_row
        (tensor([7, 8, 9]), tensor([0, 0, 1]), tensor([2, 1]))
    """

    mask: Tensor
    """True where the logits are scored, ``(B, T)``."""
    targets: Tensor
    """The token each scored position predicts, ``(N,)``; ``IGNORE_INDEX`` where it has no label."""

    @classmethod
    def from_labels(cls, labels: Tensor) -> "ScoredPositions":
        """Score what ``labels`` (unshifted, ``(B, T)``) do not ignore."""
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        mask = following != IGNORE_INDEX
        return cls(mask, following[mask])

    @classmethod
    def everywhere(cls, labels: Tensor, attention_mask: Tensor) -> "ScoredPositions":
        """Score every real token, the last one and the prompt included, labeled or not."""
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        mask = attention_mask.bool()
        return cls(mask, following[mask])

    @cached_property
    def rows(self) -> Tensor:
        """The row of each scored position, ``(N,)``."""
        return self.mask.nonzero()[:, 0]

    @cached_property
    def tokens_per_row(self) -> Tensor:
        """Number of labeled positions in each row, ``(B,)``: what the loss is divided by."""
        return self.scattered((self.targets != IGNORE_INDEX).long()).sum(-1)

    def scattered(self, values: Tensor) -> Tensor:
        """Put values of the scored positions in their places, 0 elsewhere: ``(N,) -> (B, T)``."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def at_tokens(self, values: Tensor) -> Tensor:
        """Put values in the places of the predicted tokens, one to the right: ``(N,) -> (B, T)``.

        Example:
            >>> scored = ScoredPositions.from_labels(torch.tensor([[-100, 7, 8]]))
            >>> scored.at_tokens(torch.tensor([0.5, 0.25]))
            tensor([[0.0000, 0.5000, 0.2500]])
        """
        return F.pad(self.scattered(values)[:, :-1], (1, 0))

    def subset(self, chosen: Tensor) -> "ScoredPositions":
        """Return some of the positions: ``(N,)``, True for those.

        Example:
            >>> scored = ScoredPositions.from_labels(torch.tensor([[-100, 7, 8]]))
            >>> scored.subset(torch.tensor([False, True])).targets
            tensor([8])
        """
        return ScoredPositions(self.scattered(chosen), self.targets[chosen])

    def of_tokens(self, values: Tensor) -> Tensor:
        """Return the values at the predicted tokens: ``(B, T) -> (N,)``.

        Example:
            >>> scored = ScoredPositions.from_labels(torch.tensor([[-100, 7, 8]]))
            >>> scored.of_tokens(torch.tensor([[0.0, 0.5, 0.25]]))
            tensor([0.5000, 0.2500])
        """
        return F.pad(values[:, 1:], (0, 1))[self.mask]

    def select(self, logits: Tensor) -> Tensor:
        """The scored rows of ``logits``: ``(B, T, V) -> (N, V)``, float32 or wider.

        The upcast comes before any softmax: rounding a log-softmax to bfloat16 costs more than
        the divergences that are measured.
        """
        chosen = logits[self.mask]
        return chosen if chosen.dtype == torch.float64 else chosen.float()
