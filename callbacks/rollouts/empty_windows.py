"""Detection of windows of rollouts without any trained token."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_kd.batch import Rollout
from lightning_kd.generation import Truncation
from lightning_kd.modules import DistillationModule
from lightning_kd.scoring import ScoredPositions

_MAX_EMPTY = 3
"""Consecutive empty windows that are an error: without a gradient the next is no different."""


class EmptyWindows:
    """Counter of consecutive windows in which no completion ended, if only those are trained on.

    Args:
        truncation: Treatment of completions without an EOS.
    """

    def __init__(self, truncation: Truncation) -> None:
        self.truncation = truncation
        self._consecutive = 0

    def add(self, module: DistillationModule, rollouts: Sequence[Rollout], longest: int) -> None:
        """Count a window; all ranks call this together.

        Args:
            module: The module that is trained.
            rollouts: This rank's micro-batches of the window.
            longest: Longest completion.

        Raises:
            ValueError: If there have been too many consecutive empty windows.
        """
        if self.truncation == "keep":
            return
        positions = [ScoredPositions.from_labels(batch["labels"]) for batch in rollouts]
        scored = sum(each.tokens_per_row.sum() for each in positions)
        everywhere = module.sum_over_ranks(torch.as_tensor(scored, device=module.device).double())
        self._consecutive = 0 if everywhere > 0 else self._consecutive + 1
        reason = (
            f"no completion ended within max_new_tokens {longest}, and truncated: {self.truncation} "
            "trains on nothing else"
        )
        if self._consecutive >= _MAX_EMPTY:
            raise ValueError(
                f"in {_MAX_EMPTY} consecutive windows {reason}, so the student does not learn. Raise "
                "max_new_tokens, set truncated: keep, or start from a student that generates EOS"
            )
        if self._consecutive == 1:
            rank_zero_warn(f"In this window {reason}: 0 tokens were scored")
