"""How far a target has moved from the student to the teacher."""

from typing import Any

import torch
from torch import Tensor

from lightning_kd.divergences import Divergence
from lightning_kd.divergences.interpolated import InterpolatedDivergence
from lightning_kd.resuming import Resumable
from lightning_kd.schedules import Linear

_EPSILON = 1e-15
"""Of the relative change of a loss, in the reference."""


class Interpolation(Resumable):
    r"""A target that moves from the student to the teacher in a straight line over the run.

    The target at a position is :math:`p_t = \mathrm{softmax}((1 - t)\, z + t\, u)` with the student's
    logits :math:`z`, which get no gradient there, and the teacher's :math:`u`. The share :math:`t` is
    ``start`` at the first optimizer step and ``end`` from ``steps`` on. :class:`TAID` moves faster
    where the student follows.

    Args:
        start: Share of the teacher at the first step, in [0, 1].
        end: Share from ``steps`` on, at least ``start`` and at most 1.
        steps: Optimizer steps in between, 1 or more.

    Raises:
        ValueError: If a share is outside [0, 1] or the end below the start.

    Example:
        >>> Interpolation(0.4, 1.0, steps=10).share(5, torch.device("cpu"))
        tensor(0.7000, dtype=torch.float64)
    """

    def __init__(self, start: float = 0.4, end: float = 1.0, *, steps: int) -> None:
        self.line = Linear(start, end, steps=steps)
        if end < start:
            raise ValueError(
                f"interpolation.start is {start} and interpolation.end {end}; the target moves towards "
                "the teacher, so give an end that is not below the start"
            )
        self.end = end

    def begin(self) -> None:
        """Begin a run; the straight line remembers nothing of another."""

    def share(self, step: int, device: torch.device) -> Tensor:
        """Return the teacher's share at an optimizer step, counted from 0: ``()``, float64."""
        return torch.full((), self.line(step), dtype=torch.float64, device=device)

    def between(self, divergence: Divergence, step: int, device: torch.device) -> Divergence:
        """Return the divergence from the target of an optimizer step."""
        return InterpolatedDivergence(divergence, self.share(step, device))

    def update(self, step: int, loss: Tensor, tokens: Tensor) -> None:
        """Hear what an optimizer step has come to, once it is taken; the straight line stays.

        Args:
            step: The step, counted from 0.
            loss: Mean divergence from its target, over all ranks and micro-batches, ``()``.
            tokens: Number of tokens that were scored, ``()``.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the shares to come, beside the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""


class TAID(Interpolation):
    r"""A target that moves towards the teacher the faster, the faster the student follows.

    After each optimizer step with the loss :math:`J_n`, the divergence from the target,

    .. math:: \delta_n = \frac{J_{n-1} - J_n}{J_{n-1}}, \qquad
        m_n = \beta\, m_{n-1} + (1 - \beta)\, \delta_n, \qquad
        t_{n+1} = \min\bigl(t_{end},\; \max\bigl(t^{line}_{n+1},\;
        t_n + \alpha\, \sigma(m_n)\, (1 - t_n)\bigr)\bigr)

    with the straight line of :class:`Interpolation` as the least. So :math:`t` never falls. The loss is
    that of the whole step, over all ranks and micro-batches (the reference updates with each
    micro-batch's own, so that processes would drift apart). A step that scores nothing, whose loss is
    not finite, or that is skipped, changes nothing. From a loss of 0, such as that from the student
    itself (``start`` 0), no relative change is taken: the mean begins with the next one.
    :math:`t`, :math:`J_n` and :math:`m_n` are in checkpoints.

    Args:
        start: Share of the teacher at the first step, in [0, 1]: 0.4 in the paper, 0.2 for large gaps.
        end: Largest share.
        steps: Optimizer steps in which the straight line gets there, 1 or more.
        rate: :math:`\alpha`, above 0.
        momentum: :math:`\beta`, in [0, 1).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Shing et al., *TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
        Transfer in Language Models*, ICLR 2025, Algorithm 1. https://arxiv.org/abs/2501.16937
    """

    def __init__(
        self,
        start: float = 0.4,
        end: float = 1.0,
        *,
        steps: int,
        rate: float = 5e-4,
        momentum: float = 0.99,
    ) -> None:
        super().__init__(start, end, steps=steps)
        if not rate > 0:
            raise ValueError(
                f"interpolation.rate is {rate}; it must be above 0, and without it the share follows "
                "the straight line: choose Interpolation"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"interpolation.momentum is {momentum}; it must lie in [0, 1)")
        self.start, self.rate, self.momentum = start, rate, momentum
        self.begin()

    def begin(self) -> None:
        """Begin a run at the start, with no loss seen."""
        # Share, last loss, and mean of its relative changes.
        self._state = torch.tensor([self.start, torch.nan, 0.0], dtype=torch.float64)

    def share(self, step: int, device: torch.device) -> Tensor:
        """Return the larger of the straight line and what the losses so far have come to."""
        self._state = self._state.to(device)
        return self._state[0].clamp_min(self.line(step))

    def update(self, step: int, loss: Tensor, tokens: Tensor) -> None:
        """Move on by what the loss has fallen; nothing is copied off its device."""
        share = self.share(step, loss.device)
        _, before, mean = self._state
        change = (before - loss) / (before + _EPSILON)
        mean_now = self.momentum * mean + (1 - self.momentum) * change
        moved = share + self.rate * mean_now.sigmoid() * (1 - share)
        # NaN where no loss is to be compared with; in float32 that from the student itself may be
        # rounding alone.
        first = ~(before > 0)
        after = torch.stack(
            [
                torch.where(first, share, moved.clamp_max(self.end)),
                torch.where(share > 0, loss.double(), torch.nan),
                torch.where(first, mean, mean_now),
            ]
        )
        self._state = torch.where((tokens > 0) & loss.isfinite(), after, self._state)

    def state_dict(self) -> dict[str, Any]:
        """Return share, last loss and mean change."""
        return {"taid": self._state.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with them."""
        self._state = torch.tensor(state["taid"], dtype=torch.float64)
