"""How close a student is to its teacher, and to the text."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kd.divergences import ForwardKL, ReverseKL
from lightning_kd.evaluation import (
    Agreement,
    CrossEntropy,
    Entropy,
    Matching,
    Quantity,
    TeacherEntropy,
)
from lightning_kd.types import IGNORE_INDEX


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
        >>> from lightning_kd.evaluation import Block, of_one_model
        >>> metrics, targets = DistributionMetrics(), torch.tensor([2])
        >>> block = Block(slice(0, 1), torch.zeros(1, 4), (torch.zeros(1, 4),), of_one_model)
        >>> watched = metrics.quantities(targets, taught=True)
        >>> metrics.update(torch.stack([quantity.values(block) for quantity in watched]), targets)
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
    taught_tokens: Tensor
    dropped: Tensor
    dropped_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        names = len(self.student_names) + len(self.teacher_names)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("sums", zero.repeat(names), dist_reduce_fx="sum")
        self.add_state("tokens", zero.clone(), dist_reduce_fx="sum")
        self.add_state("taught_tokens", zero.clone(), dist_reduce_fx="sum")
        self.add_state("dropped", zero.repeat(2), dist_reduce_fx="sum")
        self.add_state("dropped_tokens", zero.repeat(2), dist_reduce_fx="sum")
        # Sums of a whole evaluation: float32 would lose the last tokens of a large one.
        self.set_dtype(torch.float64)

    def quantities(self, targets: Tensor, *, taught: bool) -> list[Quantity]:
        """What to evaluate at each position: for the student alone, or with a teacher."""
        of_student: list[Quantity] = [CrossEntropy(targets), Entropy()]
        if not taught:
            return of_student
        both = [Matching(ForwardKL()), Matching(ReverseKL())]
        return [*of_student, *both, Agreement(), TeacherEntropy()]

    def update(self, values: Tensor, targets: Tensor) -> None:
        """Add positions.

        Args:
            values: Of :meth:`quantities`, ``(quantities, N)``.
            targets: ``(N,)``; positions with ``IGNORE_INDEX`` do not count.
        """
        labeled = targets != IGNORE_INDEX
        self.tokens += labeled.sum()
        if len(values) > len(self.student_names):
            self.taught_tokens += labeled.sum()
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
        tokens, taught = self.tokens.clamp(min=1), self.taught_tokens.clamp(min=1)
        of_student = self.sums[: len(self.student_names)] / tokens
        result = {"perplexity": of_student[0].exp(), "student_entropy": of_student[1]}
        if self.taught_tokens > 0:
            of_teacher = self.sums[len(self.student_names) :] / taught
            result |= dict(zip(self.teacher_names, of_teacher.unbind(), strict=True))
        for side, name in enumerate(self.dropped_names):
            if self.dropped_tokens[side] > 0:
                result[name] = self.dropped[side] / self.dropped_tokens[side]
        return result


class ExactMatch(Metric):
    """Share of completions that equal their reference, white space at the ends aside.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["975", "12 "], ["975", "13"])
        >>> metric.compute().item()
        0.5
    """

    full_state_update = False
    matches: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("matches", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, completions: list[str], references: list[str]) -> None:
        """Add completions and what they should have been."""
        pairs = zip(completions, references, strict=True)
        self.matches += sum(a.strip() == b.strip() for a, b in pairs)
        self.total += len(references)

    def compute(self) -> Tensor:
        """Matches over completions; 0 without any."""
        return self.matches / self.total.clamp(min=1)
