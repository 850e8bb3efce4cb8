"""The reverse KL of student and teacher, as far as the teacher's answers tell."""

from torch import Tensor

from lightning_kd.divergences import ReverseKL
from lightning_kd.fused import (
    AnswerKind,
    DivergenceTerm,
    LogRatio,
    TeacherAnswer,
    TokenLogProbs,
    TokenTerm,
)

REVERSE_KL_NAMES: dict[AnswerKind, str] = {
    "full_distribution": "reverse_kl",
    "top_k": "top_k_reverse_kl",
    "token_log_probs": "label_log_ratio",
}
"""Name of :func:`reverse_kl_term` in logs, for each kind of the teacher's answers."""


def reverse_kl_term(
    answer: TeacherAnswer, targets: Tensor, *, temperature: float = 1.0
) -> TokenTerm:
    """Return the term of the reverse KL, or of the part of it that an answer gives.

    From k tokens and a tail it is the reverse KL over these events, a lower bound; from the
    log-probabilities of the targets their log-ratio, whose mean over the student's own samples is
    the reverse KL.
    """
    if isinstance(answer, TokenLogProbs):
        return LogRatio(targets, answer.values, temperature=temperature)
    return DivergenceTerm(
        ReverseKL(), student_temperature=temperature, teacher_temperature=temperature
    )
