"""A teacher's answer as the tensors of a message."""

import torch
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
from lightning_kd.teachers.head_states import states_of
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
    """Return log-probabilities that hidden states must give at the first and the last position.

    So a list of states that is shifted, or of another model, is found out where it is read.

    Args:
        answer: About the positions of several questions.
        question: One of these.
        start: The number of its first position.
    """
    if question.payload != "hidden" or not isinstance(answer, FullDistribution):
        return {}
    return {"spots": log_probs_at_ends(answer, question.targets, start)}


def log_probs_at_ends(answer: FullDistribution, targets: Tensor, start: int = 0) -> Tensor:
    """Return the log-probability of the target of the first and of the last position, ``(2,)``."""
    if len(targets) == 0:
        return torch.zeros(0)
    found = []
    for place in (0, len(targets) - 1):
        row = slice(start + place, start + place + 1)
        log_probs = answer.computed(row).log_probs(1.0)
        found.append(log_probs[0, max(0, int(targets[place]))])
    return torch.stack(found).cpu()
