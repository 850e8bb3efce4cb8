"""What a cut to a shared vocabulary hides, without another pass over the tokens that are shared."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import softplus

from lightning_kd.divergences.log_space import weighted
from lightning_kd.fused import (
    ChunkedPass,
    FullDistribution,
    LazyLogits,
    LogNormalizer,
    TeacherLogNormalizer,
    TokenTerm,
    evaluate_no_grad,
)
from lightning_kd.modules.loss import Scores


class Hidden(NamedTuple):
    """What the cut hides at each position; None for a side that is no wider than the cut."""

    label_nats: Tensor | None
    """Minus the student's log-probability of each label over all its tokens, ``(N,)``."""
    of_student: Tensor | None
    """The probability that the student gives to the tokens beyond the cut, ``(N,)``."""
    of_teacher: Tensor | None
    """The same of the teacher; of several models the mean, with their weights."""


class DroppedMass:
    r"""The probability of the tokens beyond a cut, of student and teacher.

    With :math:`A` the log of the softmax denominator over the shared tokens, which the pass over them
    computes as well, and :math:`R` that over the others, the mass is :math:`\sigma(R - A)`, and a
    label's nats over all tokens are those over the shared ones plus :math:`\log(1 + e^{R - A})`. Only
    the logits of the others are computed for it.

    Args:
        uncut: Logits of both sides over all their tokens.
        width: Tokens that are compared.
    """

    def __init__(self, uncut: Scores, width: int) -> None:
        self._width = width
        self._student = uncut.student if uncut.student.shape[1] > width else None
        self._sources: dict[int, tuple[LazyLogits, float | Tensor]] = {}
        if isinstance(uncut.teacher, FullDistribution):  # no other answer is cut
            both = enumerate(zip(uncut.teacher.logits, uncut.teacher.shares, strict=True))
            self._sources = {
                number: (source, share)
                for number, (source, share) in both
                if source.shape[1] > width and (isinstance(share, Tensor) or share > 0)
            }
        own: list[TokenTerm] = [] if self._student is None else [LogNormalizer()]
        self.terms: Sequence[TokenTerm] = [*own, *map(TeacherLogNormalizer, self._sources)]
        """What the pass over the shared tokens has to compute."""

    def measure(self, normalizers: Tensor, nats: Tensor) -> Hidden:
        """Compute what is hidden.

        Args:
            normalizers: Values of :attr:`terms`, ``(terms, N)``.
            nats: Of each label over the shared tokens, ``(N,)``.
        """
        shared, label_nats, of_student, of_teacher = iter(normalizers), None, None, None
        if self._student is not None:
            gap = self._normalizer_beyond(self._student) - next(shared)
            label_nats, of_student = nats + softplus(gap), gap.sigmoid()
        for source, share in self._sources.values():
            gap = self._normalizer_beyond(source) - next(shared)
            mass = weighted(share, gap.sigmoid())
            of_teacher = mass if of_teacher is None else of_teacher + mass
        return Hidden(label_nats, of_student, of_teacher)

    def _normalizer_beyond(self, logits: LazyLogits) -> Tensor:
        beyond = logits.beyond(self._width)
        return evaluate_no_grad(ChunkedPass(beyond, None, [LogNormalizer()]))[0]
