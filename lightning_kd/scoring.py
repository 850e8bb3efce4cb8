"""Which positions of a batch enter a loss."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.devices import KnownPlaces, note_copy, note_values, origin_of, to_device


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
    known_places: Tensor | None = None
    """:attr:`places`, where somebody has found them already."""
    key: Hashable = None
    """Equal keys are those of equal positions; None where nothing is known of them."""

    @classmethod
    def from_labels(cls, labels: Tensor) -> "ScoredPositions":
        """Score what ``labels`` (unshifted, ``(B, T)``) do not ignore."""
        following = _following(labels)
        places = _LABELED.of(labels)
        key = ("labeled", origin_of(labels))
        return cls(following != IGNORE_INDEX, following.flatten()[places], places, key)

    @classmethod
    def everywhere(cls, labels: Tensor, attention_mask: Tensor) -> "ScoredPositions":
        """Score every real token, the last one and the prompt included, labeled or not."""
        places = _REAL.of(attention_mask)
        key = ("real", origin_of(attention_mask), origin_of(labels))
        return cls(attention_mask.bool(), _following(labels).flatten()[places], places, key)

    @cached_property
    def places(self) -> Tensor:
        """The index of each scored position in a flattened ``(B, T)``, ``(N,)``."""
        if self.known_places is not None:
            return self.known_places
        return self.mask.flatten().nonzero()[:, 0]

    @cached_property
    def rows(self) -> Tensor:
        """The row of each scored position, ``(N,)``."""
        return self.places // self.mask.shape[1]

    def on(self, device: torch.device) -> "ScoredPositions":
        """Return the positions on another device."""
        mask, targets, places = (
            to_device(each, device) for each in (self.mask, self.targets, self.places)
        )
        return ScoredPositions(mask, targets, places, self.key)

    @cached_property
    def tokens_per_row(self) -> Tensor:
        """Number of labeled positions in each row, ``(B,)``: what the loss is divided by."""
        return self.scattered((self.targets != IGNORE_INDEX).long()).sum(-1)

    def scattered(self, values: Tensor) -> Tensor:
        """Put values of the scored positions in their places, 0 elsewhere: ``(N,) -> (B, T)``."""
        zeros = values.new_zeros(self.mask.numel())
        return zeros.index_copy(0, self.places, values).view(self.mask.shape)

    def pick(self, values: Tensor) -> Tensor:
        """Return the values at the scored positions: ``(B, T, ...) -> (N, ...)``.

        Raises:
            ValueError: If there is not one for each token.

        Example:
            >>> scored = ScoredPositions.from_labels(torch.tensor([[-100, 7, 8]]))
            >>> scored.pick(torch.tensor([[0.0, 0.5, 0.25]]))
            tensor([0.0000, 0.5000])
        """
        if values.shape[:2] != self.mask.shape:
            raise ValueError(
                f"values of shape {tuple(values.shape)} came for tokens {tuple(self.mask.shape)}; "
                "give one for each token of each row"
            )
        # Not by the mask: how many there are is known, and a device would be asked again.
        return values.flatten(0, 1).index_select(0, self.places)

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
        return self.pick(F.pad(values[:, 1:], (0, 1)))

    def select(self, logits: Tensor) -> Tensor:
        """The scored rows of ``logits``: ``(B, T, V) -> (N, V)``, float32 or wider.

        The upcast comes before any softmax: rounding a log-softmax to bfloat16 costs more than
        the divergences that are measured.
        """
        chosen = self.pick(logits)
        return chosen if chosen.dtype == torch.float64 else chosen.float()


def highest_in_rows(values: Tensor, positions: ScoredPositions, share: float) -> Tensor:
    """Return which positions have the highest values of their row: a share of each, rounded up.

    Of equal values, the earlier ones.

    Args:
        values: At each position, ``(N,)``.
        positions: Of the values.
        share: Above 0 and at most 1.

    Returns:
        True at these, ``(N,)``.

    Example:
        >>> scored = ScoredPositions.from_labels(torch.tensor([[-100, 7, 8, 9], [-100, 6, -100, -100]]))
        >>> highest_in_rows(torch.tensor([0.1, 0.5, 0.5, 0.3]), scored, 0.5)
        tensor([False,  True,  True,  True])
    """
    rows = positions.rows
    sizes = positions.scattered(torch.ones_like(rows)).sum(-1)
    # In float64 0.1 of 30 is a little above 3, and in float32 0.07 of 100 may be anything. What is
    # taken off is a part of it: of the smallest share, one position is kept.
    kept = (sizes.double() * share * (1 - 1e-12)).ceil()
    ranking = values.argsort(descending=True, stable=True)
    ranking = ranking[rows[ranking].argsort(stable=True)]
    begins = sizes.cumsum(0) - sizes
    rank = torch.empty_like(rows)
    rank[ranking] = torch.arange(len(rows), device=rows.device) - begins[rows[ranking]]
    return rank < kept[rows]


def find_places(batch: object, moved: object) -> None:
    """Find on the host where positions of a batch are scored, for its copy on a device.

    What is no batch, or is on a device already, is left alone.

    Args:
        batch: As a loader gave it.
        moved: The same on a device; may be the same tensors.
    """
    if not (isinstance(batch, Mapping) and isinstance(moved, Mapping)):
        return
    for name, here in batch.items():
        if not isinstance(here, Tensor):
            find_places(here, moved[name])  # the second stream
            continue
        known = {"labels": _LABELED, "attention_mask": _REAL}.get(name)
        if known is not None and here.ndim == 2 and here.device.type == "cpu":
            known.of(here)
        note_copy(here, moved[name])
        if here.ndim == 1 and here.device.type == "cpu":
            note_values(here, moved[name])


def _following(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


_LABELED = KnownPlaces(lambda labels: _following(labels) != IGNORE_INDEX)
_REAL = KnownPlaces(lambda attention_mask: attention_mask.bool())
