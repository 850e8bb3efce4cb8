"""Lengths of the completions of the last windows, over all ranks."""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from lightning_kd.generation import Completions
from lightning_kd.modules import DistillationModule

_FEWEST = 3
"""Windows that a line is laid through: through two it always fits."""


@dataclass(frozen=True)
class WindowLengths:
    """What a window's completions are like, over all ranks."""

    window: int
    """Number of the window."""
    step: int
    """Optimizer steps before it."""
    length: float
    """Mean number of tokens, EOS included."""
    text: float
    """Mean number of tokens without EOS."""
    truncated: float
    """Share of completions without EOS."""
    empty: float
    """Share of completions without a token before EOS."""


def is_empty(generated: Completions) -> torch.Tensor:
    """Return True where a completion has no token before its EOS, ``(B,)``."""
    return generated.mask.sum(-1) <= generated.ended.long()


class LengthHistory:
    """Lengths of the last windows that the student has generated.

    Args:
        windows: Number of windows that are remembered.
    """

    def __init__(self, windows: int) -> None:
        self.last: deque[WindowLengths] = deque(maxlen=windows)

    @property
    def is_full(self) -> bool:
        """Whether there are as many windows as are remembered."""
        return len(self.last) == self.last.maxlen

    def add(
        self, module: DistillationModule, generated: Completions, window: int, step: int
    ) -> None:
        """Add a window; all ranks call this together.

        Args:
            module: The module that is trained.
            generated: This rank's completions.
            window: Number of the window. One that is generated again takes its own place.
            step: Optimizer steps before it.
        """
        ended = generated.ended.sum()
        own = [generated.mask.sum(), ended, is_empty(generated).sum()]
        # Whole numbers, so that their sum does not depend on the order of ranks.
        sums = torch.stack([*own, torch.full_like(ended, len(generated.ended))]).double()
        tokens, ends, empty, rows = module.sum_over_ranks(sums).tolist()
        while self.last and self.last[-1].window >= window:
            self.last.pop()
        self.last.append(
            WindowLengths(
                window,
                step,
                length=tokens / rows,
                text=(tokens - ends) / rows,
                truncated=1 - ends / rows,
                empty=empty / rows,
            )
        )

    def trend(self) -> float | None:
        r"""Return the slope of the mean length, in tokens per 100 optimizer steps.

        It is that of the least-squares line through the windows' :math:`(s_i, l_i)`, steps and mean
        lengths, :math:`100\,\sum_i (s_i - \bar s)(l_i - \bar l) / \sum_i (s_i - \bar s)^2`; None
        with fewer than three windows.
        """
        if len(self.last) < _FEWEST:
            return None
        steps = [float(each.step) for each in self.last]
        return 100 * statistics.linear_regression(steps, [each.length for each in self.last]).slope

    def state_dict(self) -> list[tuple[Any, ...]]:
        """Return the windows, for a checkpoint."""
        return [astuple(each) for each in self.last]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Continue from a checkpoint, with its last windows."""
        self.last.clear()
        self.last.extend(WindowLengths(*each) for each in state)
