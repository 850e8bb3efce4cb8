"""Log-probabilities of given tokens, of whatever a teacher answers."""

from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.fused.answers import TeacherAnswer, TokenLogProbs
from lightning_kd.fused.autograd import evaluate_no_grad
from lightning_kd.fused.chunked_pass import ChunkedPass
from lightning_kd.fused.sparse_answers import TopKAndToken
from lightning_kd.fused.token_terms import TeacherTokenLogProb


def token_log_probs_of(
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
