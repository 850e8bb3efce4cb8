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
    """Counter of consecutive windows that leave nothing to train on.

    That is so where no completion ended and only those that did are trained on, or where all
    completions are empty.

    Args:
        truncation: Treatment of completions without an EOS.
    """

    def __init__(self, truncation: Truncation) -> None:
        self.truncation = truncation
        self.consecutive = 0
        """Number of empty windows that have come one after the other."""

    def add(self, module: DistillationModule, rollouts: Sequence[Rollout], longest: int) -> None:
        """Count a window; all ranks call this together.

        Args:
            module: The module that is trained.
            rollouts: This rank's micro-batches of the window.
            longest: Longest completion.

        Raises:
            ValueError: If there have been too many consecutive empty windows.
        """
        positions = [ScoredPositions.from_labels(batch["labels"]) for batch in rollouts]
        scored = sum(each.tokens_per_row.sum() for each in positions)
        everywhere = module.sum_over_ranks(torch.as_tensor(scored, device=module.device).double())
        self.consecutive = 0 if everywhere > 0 else self.consecutive + 1
        if self.truncation == "keep":
            reason = "no completion had a token to train on"
            remedy = "Look at what the engine generates"
        else:
            reason = (
                f"no completion ended within max_new_tokens {longest}, and truncated: "
                f"{self.truncation} trains on nothing else"
            )
            remedy = (
                "Raise max_new_tokens, set truncated: keep, or start from a student that generates "
                "EOS"
            )
        if self.consecutive >= _MAX_EMPTY:
            raise ValueError(
                f"in {_MAX_EMPTY} consecutive windows {reason}, so the student does not learn. {remedy}"
            )
        if self.consecutive == 1:
            rank_zero_warn(f"In this window {reason}: 0 tokens were scored")
