"""The reverse KL of student and teacher, as far as the teacher's answers tell."""

from torch import Tensor

from lightning_kd.divergences import ForwardKL, ReverseKL
from lightning_kd.fused import (
    AnswerKind,
    ChunkLogProbs,
    ChunkStartDistributions,
    DivergenceTerm,
    LogRatio,
    SampledTokens,
    SortedDistance,
    TeacherAnswer,
    TokenLogProbs,
    TokenTerm,
    chunk_log_ratio,
)

REVERSE_KL_NAMES: dict[AnswerKind, str] = {
    "full_distribution": "reverse_kl",
    "top_k": "top_k_reverse_kl",
    "top_k_and_token": "top_k_reverse_kl",
    "sampled": "sampled_forward_kl",
    "token_log_probs": "label_log_ratio",
    "chunk_log_probs": "label_log_ratio",
    "chunk_start_distributions": "sorted_distance",
}
"""Name of :func:`reverse_kl_term` in logs, for each kind of the teacher's answers."""


def reverse_kl_term(
    answer: TeacherAnswer, targets: Tensor, *, temperature: float = 1.0
) -> TokenTerm:
    """Return the term of the reverse KL, or of the part of it that an answer gives.

    From k tokens and a tail it is the reverse KL over these events, a lower bound; from the
    log-probabilities of the targets their log-ratio, whose mean over the student's own samples is
    the reverse KL. So it is of chunks of text, where the teacher's part stands at the last token of
    each. Drawn tokens tell nothing of it: from them it is an estimate of the forward KL; and of
    distributions over other tokens it is no more than the distance of the sorted probabilities.
    """
    if isinstance(answer, ChunkLogProbs):
        return chunk_log_ratio(targets, answer)
    if isinstance(answer, ChunkStartDistributions):
        return SortedDistance(answer.begins)
    if isinstance(answer, TokenLogProbs):
        return LogRatio(targets, answer.values, temperature=temperature)
    divergence = ForwardKL() if isinstance(answer, SampledTokens) else ReverseKL()
    return DivergenceTerm(
        divergence, student_temperature=temperature, teacher_temperature=temperature
    )
