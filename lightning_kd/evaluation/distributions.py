"""How close a student's next-token distribution is to its teacher's, and to the text."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.divergences import ForwardKL, ReverseKL
from lightning_kd.fused import (
    CrossEntropy,
    DivergenceTerm,
    Entropy,
    TeacherEntropy,
    TokenTerm,
    Top1Agreement,
)


class DistributionMetrics(Metric):
    r"""Means over scored tokens of what compares two next-token distributions.

    All are at temperature 1 and on the labeled positions, whatever the method trains on, so that
    they mean the same in every run: ``forward_kl`` :math:`KL(p\|q)`, ``reverse_kl``
    :math:`KL(q\|p)`, ``top1_agreement`` (share of positions with the same most likely token),
    ``student_entropy``, ``teacher_entropy``, and ``perplexity`` of the labels under the student.
    Without a teacher only the student's are there. Where logits are cut to a shared vocabulary,
    ``student_dropped_mass`` and ``teacher_dropped_mass`` are what each gives to the tokens beyond
    it.

    Example:
        >>> from lightning_kd.fused import LogitsChunk, single_model_log_probs
        >>> metrics, targets = DistributionMetrics(), torch.tensor([2])
        >>> zeros = torch.zeros(1, 4)
        >>> chunk = LogitsChunk(slice(0, 1), zeros, (zeros,), single_model_log_probs)
        >>> terms = metrics.token_terms(targets, has_teacher=True)
        >>> metrics.update(torch.stack([term.values(chunk) for term in terms]), targets)
        >>> {name: round(value.item(), 3) for name, value in metrics.compute().items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'perplexity': 4.0, 'student_entropy': 1.386, 'forward_kl': 0.0, 'reverse_kl': 0.0,
         'top1_agreement': 1.0, 'teacher_entropy': 1.386}
    """

    full_state_update = False
    student_names = ("cross_entropy", "student_entropy")
    dropped_names = ("student_dropped_mass", "teacher_dropped_mass")
    teacher_names = ("forward_kl", "reverse_kl", "top1_agreement", "teacher_entropy")
    sums: Tensor
    tokens: Tensor
    teacher_tokens: Tensor
    dropped: Tensor
    dropped_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        names = len(self.student_names) + len(self.teacher_names)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("sums", zero.repeat(names), dist_reduce_fx="sum")
        self.add_state("tokens", zero.clone(), dist_reduce_fx="sum")
        self.add_state("teacher_tokens", zero.clone(), dist_reduce_fx="sum")
        self.add_state("dropped", zero.repeat(2), dist_reduce_fx="sum")
        self.add_state("dropped_tokens", zero.repeat(2), dist_reduce_fx="sum")
        # Sums of a whole evaluation: float32 would lose the last tokens of a large one.
        self.set_dtype(torch.float64)

    def token_terms(self, targets: Tensor, *, has_teacher: bool) -> list[TokenTerm]:
        """What to evaluate at each position: for the student alone, or with a teacher."""
        of_student: list[TokenTerm] = [CrossEntropy(targets), Entropy()]
        if not has_teacher:
            return of_student
        both = [DivergenceTerm(ForwardKL()), DivergenceTerm(ReverseKL())]
        return [*of_student, *both, Top1Agreement(), TeacherEntropy()]

    def update(self, values: Tensor, targets: Tensor) -> None:
        """Add positions.

        Args:
            values: Of :meth:`token_terms`, ``(quantities, N)``.
            targets: ``(N,)``; positions with ``IGNORE_INDEX`` do not count.
        """
        labeled = targets != IGNORE_INDEX
        self.tokens += labeled.sum()
        if len(values) > len(self.student_names):
            self.teacher_tokens += labeled.sum()
        self.sums[: len(values)] += values[:, labeled].sum(-1, dtype=torch.float64)

    def update_dropped(
        self, of_student: Tensor | None, of_teacher: Tensor | None, targets: Tensor
    ) -> None:
        """Add what lies beyond the shared vocabulary; None where a side is no wider.

        Args:
            of_student: The student's mass at each position, ``(N,)``.
            of_teacher: The teacher's.
            targets: ``(N,)``; positions with ``IGNORE_INDEX`` do not count.
        """
        labeled = targets != IGNORE_INDEX
        for side, mass in enumerate((of_student, of_teacher)):
            if mass is not None:
                self.dropped[side] += mass[labeled].sum(dtype=torch.float64)
                self.dropped_tokens[side] += labeled.sum()

    def compute(self) -> dict[str, Tensor]:
        """The means, by name."""
        tokens, has_teacher = self.tokens.clamp(min=1), self.teacher_tokens.clamp(min=1)
        of_student = self.sums[: len(self.student_names)] / tokens
        result = {"perplexity": of_student[0].exp(), "student_entropy": of_student[1]}
        if self.teacher_tokens > 0:
            of_teacher = self.sums[len(self.student_names) :] / has_teacher
            result |= dict(zip(self.teacher_names, of_teacher.unbind(), strict=True))
        for side, name in enumerate(self.dropped_names):
            if self.dropped_tokens[side] > 0:
                result[name] = self.dropped[side] / self.dropped_tokens[side]
        return result
