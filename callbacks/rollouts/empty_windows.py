"""Windows of rollouts of which nothing is trained on."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_kd.batch import IGNORE_INDEX, Batch
from lightning_kd.generation import Truncation
from lightning_kd.modules import DistillationModule

_MOST = 3
"""Empty windows in a row that are put up with: without a gradient the next one is no different."""


class EmptyWindows:
    """Counts windows in a row in which no completion ended, where only those are trained on.

    Args:
        truncation: What happens to completions without an end.
    """

    def __init__(self, truncation: Truncation) -> None:
        self.truncation = truncation
        self._in_a_row = 0

    def add(self, module: DistillationModule, rollouts: Sequence[Batch], longest: int) -> None:
        """Look at a window; all ranks together.

        Args:
            module: The module that is trained.
            rollouts: This rank's micro-batches of the window.
            longest: Longest completion.

        Raises:
            ValueError: If there have been too many empty windows in a row.
        """
        if self.truncation == "keep":
            return
        scored = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in rollouts)
        everywhere = module.sum_over_ranks(torch.as_tensor(scored, device=module.device).double())
        self._in_a_row = 0 if everywhere > 0 else self._in_a_row + 1
        what = (
            f"no completion ended within max_new_tokens {longest}, and truncated: {self.truncation} "
            "trains on nothing else"
        )
        if self._in_a_row >= _MOST:
            raise ValueError(
                f"in {_MOST} windows in a row {what}, so that the student does not learn. Raise "
                "max_new_tokens, set truncated: keep, or start from a student that has learned to end"
            )
        if self._in_a_row == 1:
            rank_zero_warn(f"In this window {what}: 0 tokens were scored")
