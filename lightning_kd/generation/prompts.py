"""What an engine completes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts of ``B`` rows, and the tokens that are special after them.

    Raises:
        ValueError: If ``ids`` and ``mask`` are no rows of the same shape, or a row has no token or is
            not padded on the left. The host waits once for the device to see it.
    """

    ids: Tensor
    """Tokens, padded on the left, ``(B, P)``."""
    mask: Tensor
    """1 on real tokens, ``(B, P)``."""
    eos_ids: frozenset[int]
    """Tokens that end a completion."""
    pad_id: int
    """Fills up rows that have ended."""
    width: int | None = None
    """Tokens from here on are never generated: those that a teacher does not know."""

    def __post_init__(self) -> None:
        """Check shapes and padding."""
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape or 0 in self.ids.shape:
            raise ValueError(
                f"prompts of shape {tuple(self.ids.shape)} came with a mask of shape "
                f"{tuple(self.mask.shape)}; both must be (rows, tokens), with at least one of each"
            )
        real = self.mask.bool()
        on_the_left = real[:, -1] & (real[:, 1:] >= real[:, :-1]).all(-1)
        if not bool(on_the_left.all()):
            row = on_the_left.tolist().index(False)
            mask = real[row].int().tolist()
            why = "has no token" if 1 not in mask else f"has the mask {mask}"
            raise ValueError(
                f"row {row} of the prompts {why}; a prompt has at least one token, and its padding "
                "stands in front (padding_side: left of the tokenizer). To complete from nothing, give "
                "the BOS token"
            )


def check_seeds(seeds: Sequence[int], rows: int) -> None:
    """Refuse seeds of which there is not one for each row.

    Example:
        >>> check_seeds([7, 8], 3)
        Traceback (most recent call last):
        ValueError: 2 seeds came for 3 prompts; give one for each, as range(3)
    """
    if len(seeds) != rows:
        raise ValueError(
            f"{len(seeds)} seeds came for {rows} prompts; give one for each, as range({rows})"
        )
