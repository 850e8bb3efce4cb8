"""The reverse KL of student and teacher, as far as the teacher's answers tell."""

from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.divergences import ForwardKL, ReverseKL
from lightning_kd.fused import (
    AnswerKind,
    ChunkedPass,
    DivergenceTerm,
    LogRatio,
    SampledTokens,
    TeacherAnswer,
    TeacherTokenLogProb,
    TokenLogProbs,
    TokenTerm,
    TopKAndToken,
    evaluate_no_grad,
)

REVERSE_KL_NAMES: dict[AnswerKind, str] = {
    "full_distribution": "reverse_kl",
    "top_k": "top_k_reverse_kl",
    "top_k_and_token": "top_k_reverse_kl",
    "sampled": "sampled_forward_kl",
    "token_log_probs": "label_log_ratio",
}
"""Name of :func:`reverse_kl_term` in logs, for each kind of the teacher's answers."""


def reverse_kl_term(
    answer: TeacherAnswer, targets: Tensor, *, temperature: float = 1.0
) -> TokenTerm:
    """Return the term of the reverse KL, or of the part of it that an answer gives.

    From k tokens and a tail it is the reverse KL over these events, a lower bound; from the
    log-probabilities of the targets their log-ratio, whose mean over the student's own samples is
    the reverse KL. Drawn tokens tell nothing of it: from them it is an estimate of the forward KL.
    """
    if isinstance(answer, TokenLogProbs):
        return LogRatio(targets, answer.values, temperature=temperature)
    divergence = ForwardKL() if isinstance(answer, SampledTokens) else ReverseKL()
    return DivergenceTerm(
        divergence, student_temperature=temperature, teacher_temperature=temperature
    )


def teacher_log_probs_at(
    answer: TeacherAnswer, targets: Tensor, width: int, *, temperature: float = 1.0
) -> Tensor:
    """Return the teacher's log-probabilities of given tokens, ``(N,)``.

    Args:
        answer: One that tells them: every token, k and the one that follows, or that one alone.
        targets: The tokens, ``(N,)``; where there is ``IGNORE_INDEX``, the value is 0.
        width: Tokens of the vocabulary.
        temperature: Of the teacher.
    """
    if isinstance(answer, TokenLogProbs):
        return answer.values.masked_fill(targets == IGNORE_INDEX, 0.0)
    if isinstance(answer, TopKAndToken):
        return answer.label_log_probs_at(temperature, targets, width)
    at_tokens = TeacherTokenLogProb(targets, temperature=temperature)
    return evaluate_no_grad(ChunkedPass(None, answer, [at_tokens]))[0]
