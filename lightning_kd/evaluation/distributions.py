"""Metrics of a student's next-token distribution, against its teacher's and against the text."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.divergences import ForwardKL, ReverseKL
from lightning_kd.evaluation.overlap import Overlap
from lightning_kd.fused import (
    AnswerKind,
    ChunkLogProbs,
    ChunkStartDistributions,
    CrossEntropy,
    DivergenceTerm,
    Entropy,
    FullDistribution,
    LogRatio,
    SampledTokens,
    TeacherAnswer,
    TeacherEntropy,
    TokenLogProbs,
    TokenTerm,
    Top1Agreement,
    TopKAndToken,
    chunk_log_ratio,
)


class DistributionMetrics(Metric):
    r"""Means over scored tokens of what compares two next-token distributions.

    All are at temperature 1 and on the labeled positions, whatever the method trains on, so that
    they mean the same in every run: ``forward_kl`` :math:`KL(p\|q)`, ``reverse_kl``
    :math:`KL(q\|p)`, ``top1_agreement`` (share of positions with the same most likely token),
    ``student_entropy``, ``teacher_entropy``, their difference ``entropy_gap`` (the student's minus the
    teacher's), and ``perplexity`` of the labels under the student.
    Without a teacher only the student's are there. Where logits are cut to a shared vocabulary,
    ``student_dropped_mass`` and ``teacher_dropped_mass`` are what each gives to the tokens beyond
    it; ``perplexity`` and ``bits_per_byte`` are over all tokens of the student, the others over the
    shared ones.

    A teacher that names k tokens and a tail has no KL over the vocabulary and no entropy. It has
    ``top_k_forward_kl`` and ``top_k_reverse_kl``, over the k tokens and one event for all others:
    lower bounds that grow with k, so their names keep them from being compared with the others.
    From log-probabilities of single tokens there is ``label_log_ratio``, the mean of
    :math:`\log q(y) - \log p(y)` at the labels: how much less likely the text is to the teacher.
    It is so from log-probabilities of chunks of text, too, of a teacher with other tokens.
    From tokens drawn at random there are ``sampled_forward_kl``, an unbiased estimate of the forward
    KL, and the teacher's entropy, which comes with them.

    With an :attr:`overlap` there are ``top_k_overlap``, the share of the student's k most likely tokens
    that are among the teacher's, and ``student_overlap_mass`` and ``teacher_overlap_mass``, the
    probability that each side gives to these shared tokens, as far as the teacher tells k tokens.

    With the bytes of the labels there is ``bits_per_byte``, what the student needs for a byte of text:
    :math:`-\sum \log q(y) / (\ln 2 \cdot \text{bytes})`. An EOS costs nats and has no bytes.

    Example:
        >>> from lightning_kd.fused import DistributionRows, LogitsChunk, MaterializedLogits
        >>> metrics, targets = DistributionMetrics(), torch.tensor([2])
        >>> zeros = torch.zeros(1, 4)
        >>> chunk = LogitsChunk(slice(0, 1), zeros, DistributionRows((zeros,)))
        >>> answer = FullDistribution((MaterializedLogits(zeros),))
        >>> terms = metrics.token_terms(targets, answer)
        >>> metrics.update(torch.stack([term.values(chunk) for term in terms]), targets, answer.kind)
        >>> {name: round(value.item(), 3) for name, value in metrics.compute().items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'perplexity': 4.0, 'student_entropy': 1.386, 'forward_kl': 0.0, 'reverse_kl': 0.0,
         'top1_agreement': 1.0, 'teacher_entropy': 1.386, 'entropy_gap': 0.0}
    """

    full_state_update = False
    student_names = ("cross_entropy", "student_entropy")
    dropped_names = ("student_dropped_mass", "teacher_dropped_mass")
    teacher_names: ClassVar[dict[AnswerKind, tuple[str, ...]]] = {
        "full_distribution": ("forward_kl", "reverse_kl", "top1_agreement", "teacher_entropy"),
        "top_k": ("top_k_forward_kl", "top_k_reverse_kl", "top1_agreement"),
        "top_k_and_token": (
            "top_k_forward_kl",
            "top_k_reverse_kl",
            "top1_agreement",
            "label_log_ratio",
        ),
        "sampled": ("sampled_forward_kl", "teacher_entropy"),
        "token_log_probs": ("label_log_ratio",),
        "chunk_log_probs": ("label_log_ratio",),
        "chunk_start_distributions": (),
    }
    """Metrics of each kind of answer, in the order of :meth:`token_terms`."""
    overlap: Overlap | None = None
    """What else is compared; it may change between updates, each of which counts for itself."""
    sums: Tensor
    counts: Tensor
    dropped: Tensor
    dropped_tokens: Tensor
    nats_and_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        of_teacher = [name for names in self.teacher_names.values() for name in names]
        self.names = list(dict.fromkeys([*self.student_names, *of_teacher, *Overlap.names]))
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("sums", zero.repeat(len(self.names)), dist_reduce_fx="sum")
        self.add_state("counts", zero.repeat(len(self.names)), dist_reduce_fx="sum")
        self.add_state("dropped", zero.repeat(2), dist_reduce_fx="sum")
        self.add_state("dropped_tokens", zero.repeat(2), dist_reduce_fx="sum")
        self.add_state("nats_and_bytes", zero.repeat(2), dist_reduce_fx="sum")
        # Sums of a whole evaluation: float32 would lose the last tokens of a large one.
        self.set_dtype(torch.float64)

    def check(self, teacher: TeacherAnswer) -> None:
        """Refuse a teacher's answer from which something that is asked for cannot be computed.

        Raises:
            ValueError: If there is such a thing.
        """
        if self.overlap is not None:
            self.overlap.check(teacher)

    def token_terms(self, targets: Tensor, teacher: TeacherAnswer | None) -> list[TokenTerm]:
        """Return the terms to evaluate: for the student alone, or with a teacher's answer."""
        of_student: list[TokenTerm] = [CrossEntropy(targets), Entropy()]
        if teacher is None:
            return of_student
        shared = [] if self.overlap is None else self.overlap.token_terms(teacher)
        return [*of_student, *self._teacher_terms(targets, teacher), *shared]

    def _teacher_terms(self, targets: Tensor, teacher: TeacherAnswer) -> list[TokenTerm]:
        if isinstance(teacher, TokenLogProbs):
            return [LogRatio(targets, teacher.values)]
        if isinstance(teacher, ChunkLogProbs):
            return [chunk_log_ratio(targets, teacher)]
        if isinstance(teacher, ChunkStartDistributions):
            return []
        if isinstance(teacher, SampledTokens):
            return [DivergenceTerm(ForwardKL()), TeacherEntropy()]
        both = [DivergenceTerm(ForwardKL()), DivergenceTerm(ReverseKL()), Top1Agreement()]
        if isinstance(teacher, FullDistribution):
            return [*both, TeacherEntropy()]
        if isinstance(teacher, TopKAndToken):
            return [*both, LogRatio(targets, teacher.label_log_probs)]
        return both

    def update(self, values: Tensor, targets: Tensor, kind: AnswerKind | None = None) -> None:
        """Add positions.

        Args:
            values: Of :meth:`token_terms`, ``(quantities, N)``.
            targets: ``(N,)``; positions with ``IGNORE_INDEX`` do not count.
            kind: Of the teacher's answer; None for the student alone.
        """
        labeled = targets != IGNORE_INDEX
        of_teacher = () if kind is None else self.teacher_names[kind]
        sums = values[:, labeled].sum(-1, dtype=torch.float64)
        names = (*self.student_names, *of_teacher)
        if len(values) > len(names):
            names = (*names, *Overlap.names)
        places = torch.tensor([self.names.index(name) for name in names], device=sums.device)
        # Out of place: an evaluation leaves tensors of inference mode, which a fit cannot change; and
        # bf16-true has made the zeros bfloat16, which cannot count beyond 256.
        self.sums = self.sums.double().index_add(0, places, sums)
        self.counts = self.counts.double().index_add(
            0, places, labeled.sum().expand_as(places).double()
        )

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
                place = torch.tensor([side], device=mass.device)
                total = mass[labeled].sum(dtype=torch.float64)
                self.dropped = self.dropped.double().index_add(0, place, total[None])
                tokens = labeled.sum()[None].double()
                self.dropped_tokens = self.dropped_tokens.double().index_add(0, place, tokens)

    def update_bytes(self, nats: Tensor, label_bytes: Tensor) -> None:
        """Add how many bytes labels stand for.

        Args:
            nats: Of each label, ``(N,)``.
            label_bytes: Of each label, ``(N,)``; one that is not known, below 0, leaves
                ``bits_per_byte`` out of the results.
        """
        counted = label_bytes.double().masked_fill(label_bytes < 0, float("nan"))
        sums = torch.stack([nats.sum(dtype=torch.float64), counted.sum()])
        self.nats_and_bytes = self.nats_and_bytes.double() + sums

    def compute(self) -> dict[str, Tensor]:
        """The means, by name, of what was measured anywhere."""
        result: dict[str, Tensor] = {}
        for name, total, count in zip(self.names, self.sums, self.counts, strict=True):
            if count > 0 and name == "cross_entropy":
                result["perplexity"] = (total / count).exp()
            elif count > 0:
                result[name] = total / count
        if "teacher_entropy" in result:
            result["entropy_gap"] = result["student_entropy"] - result["teacher_entropy"]
        nats, counted = self.nats_and_bytes
        if counted > 0:  # not where one is unknown, which makes the sum NaN
            result["bits_per_byte"] = nats / counted / math.log(2)
        for side, name in enumerate(self.dropped_names):
            if self.dropped_tokens[side] > 0:
                result[name] = self.dropped[side] / self.dropped_tokens[side]
        return result
