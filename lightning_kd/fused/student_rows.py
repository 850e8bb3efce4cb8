"""A student's logits in a chunk, and what several terms make of them."""

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK_BYTES = 8 * 2**20
"""Logits of which a normalizer is computed at a time: its temporaries are as large."""


class StudentRows:
    """Logits of the student at the rows of a chunk, and what several terms make of them.

    Args:
        logits: ``(n, V)``; ``(n, 0)`` if only the teacher is evaluated.
    """

    may_be_overwritten: bool = False
    """Whether the logits are of no use after the next gradient, which may take their place."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._log_probs: dict[float, Tensor] = {}
        self._events: dict[float, Tensor] = {}

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """The log-probabilities of all tokens, ``(n, V)``, computed once for each temperature."""
        if temperature not in self._log_probs:
            logits = self.logits if temperature == 1 else self.logits / temperature
            self._log_probs[temperature] = logits.log_softmax(-1)
        return self._log_probs[temperature]

    def events(self, temperature: float, compute: Callable[[], Tensor]) -> Tensor:
        """The log-probabilities of the teacher's events, computed once for each temperature."""
        if temperature not in self._events:
            self._events[temperature] = compute()
        return self._events[temperature]

    def log_normalizers(self, temperature: float, left_out: Tensor | None = None) -> Tensor:
        r"""Return :math:`\log \sum_v e^{z_v / \tau}`, ``(n, 1)``, differentiable.

        A block of rows at a time, so that no copy of all logits is made.

        Args:
            temperature: :math:`\tau`.
            left_out: Tokens that are not in the sum, ``(n, k)``.
        """
        rows = max(1, _BLOCK_BYTES // max(1, self.logits.shape[1] * self.logits.itemsize))
        sums = []
        for start in range(0, max(1, len(self.logits)), rows):
            block = self.logits[start : start + rows]
            if temperature != 1:
                block = block / temperature
            if left_out is None:
                sums.append(block.logsumexp(-1, keepdim=True))
                continue
            block = block.scatter(-1, left_out[start : start + rows], -torch.inf)
            # Of tokens that are all excluded the gradient would be NaN.
            nothing = block.detach().amax(-1, keepdim=True) == -torch.inf
            kept = block.masked_fill_(nothing, 0.0).logsumexp(-1, keepdim=True)
            sums.append(kept.masked_fill(nothing, -torch.inf))
        return torch.cat(sums)

    def exponentials(
        self, temperature: float, left_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`e^{z_v / \tau - c}`, their sums and the logarithms of the normalizers.

        They take the place of the logits, if these may be overwritten, and are the only tensor of
        their width. Without a gradient.

        Args:
            temperature: :math:`\tau`.
            left_out: Tokens that have 0, ``(n, k)``.

        Returns:
            ``(n, V)``, ``(n, 1)`` and ``(n, 1)``.
        """
        out = self.logits if self.may_be_overwritten else self.logits.clone()
        if temperature != 1:
            out.div_(temperature)
        if left_out is not None:
            out.scatter_(-1, left_out, -torch.inf)
        # Of tokens that are all excluded the largest is minus infinity, and the difference NaN.
        largest = out.amax(-1, keepdim=True).clamp_min(torch.finfo(out.dtype).min)
        sums = out.sub_(largest).exp_().sum(-1, keepdim=True)
        return out, sums, largest + sums.log()
