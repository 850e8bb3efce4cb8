"""A teacher's answer as the tensors of a message."""

from torch import Tensor

from lightning_kd.fused import (
    ChunkedPass,
    FullDistribution,
    TeacherAnswer,
    TeacherTokenLogProb,
    TokenLogProbs,
    TopK,
    TopKAndToken,
    evaluate_no_grad,
)
from lightning_kd.fused.summaries import top_k_of
from lightning_kd.serving.limits import RefusedError
from lightning_kd.teachers.head_states import log_probs_at, states_of
from lightning_kd.wire import Question


def payload_of(
    answer: TeacherAnswer, question: Question, targets: Tensor, width: int
) -> dict[str, Tensor]:
    """Return what a question asks for, each tensor with one row for each position.

    Args:
        answer: Of the teacher.
        question: The question.
        targets: Those of the question, on the device of the answer.
        width: Tokens of the vocabulary.

    Raises:
        ValueError: If the answer does not hold it.
    """
    if question.payload == "hidden":
        assert isinstance(answer, FullDistribution)  # or hidden states are not offered
        return {f"states.{number}": state for number, state in enumerate(states_of(answer))}
    if question.payload == "token_log_probs":
        if isinstance(answer, FullDistribution):
            terms = [TeacherTokenLogProb(targets)]
            values = evaluate_no_grad(ChunkedPass(None, answer, terms))[0]
        else:
            assert isinstance(answer, TokenLogProbs)
            values = answer.values
        return {"values": values, "targets": targets}
    if isinstance(answer, FullDistribution):
        answer = top_k_of(answer, targets, question.k, temperatures=question.temperatures)
    assert isinstance(answer, TopK)
    try:
        answer = answer.most_likely(question.k, width)
    except ValueError as error:
        raise RefusedError(400, str(error)) from error
    tensors = {"token_ids": answer.token_ids, "log_probs": answer.log_probs}
    if isinstance(answer, TopKAndToken):
        tensors["label_log_probs"] = answer.label_log_probs
    return tensors | {f"tail.{t!r}": tail for t, tail in answer.tail_log_probs.items()}


def spot_check(answer: TeacherAnswer, question: Question, start: int) -> dict[str, Tensor]:
    """Return log-probabilities that hidden states must give at some positions of every row.

    So states that are shifted, of another row or of another model are found out where they are read.

    Args:
        answer: About the positions of several questions.
        question: One of these.
        start: The number of its first position.
    """
    if question.payload != "hidden" or not isinstance(answer, FullDistribution):
        return {}
    device, spots = answer.logits[0].device, question.spots()
    tokens = question.targets[spots].clamp_min(0)
    return {"spots": log_probs_at(answer, (start + spots).to(device), tokens.to(device))}
