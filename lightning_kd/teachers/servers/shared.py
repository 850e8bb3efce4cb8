"""What answers of every kind of server are held to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.devices import to_device
from lightning_kd.fused import TeacherAnswer, TokenLogProbs, TopKAndToken
from lightning_kd.wire import Question, Reply, WireError


def finite(reply: Reply, what: str, tensor: Tensor) -> None:
    """Refuse tensors that are not finite.

    Raises:
        WireError: If one is not.
    """
    if tensor.is_floating_point() and not tensor.isfinite().all():
        number = int((~tensor.isfinite()).sum())
        raise WireError(
            f"{reply.url} has answered {what} of which {number} of {tensor.numel()} values are NaN or "
            "infinite, where finite ones were expected"
        )


def ids_of_text(reply: Reply, value: Any, key: str) -> list[int]:
    """Return the ids in a reply.

    Raises:
        WireError: If there are none.
    """
    ids = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise reply.nonsense(f"a mapping with the token ids of a text as {key!r}")
    return ids


def rows_to_ask(question: Question) -> list[tuple[list[int], list[int]]]:
    """Return the ids of each row in which something is asked about, and the positions.

    Servers of prompts tell what they expect *at* a token from what comes before it, so that a row
    whose last position is asked about has one more token, of which nothing is read.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> real = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> mask = torch.tensor([[False, True, False], [True, True, False]])
        >>> targets = torch.tensor([7, 9, -100])
        >>> rows_to_ask(Question(ids, real, mask, targets, "top_k"))
        [([5, 6, 7], [1]), ([8, 9, 9], [0, 1])]
    """
    rows = []
    for ids, real, mask in zip(
        question.input_ids.tolist(),
        question.attention_mask.sum(-1).tolist(),
        question.mask,
        strict=True,
    ):
        places = mask.nonzero()[:, 0].tolist()
        own = ids[:real]
        if places and places[-1] == real - 1:
            own = [*own, own[-1]]
        if places:
            rows.append((own, places))
    return rows


def check_labels(question: Question, backend: str) -> None:
    """Validate that labels are the tokens that follow in the rows, for servers that tell of these.

    Raises:
        ValueError: If one is another.
    """
    following = question.input_ids.roll(-1, 1)
    # Nothing follows the last token.
    following[:, -1] = IGNORE_INDEX
    following[:, :-1][question.attention_mask[:, 1:] == 0] = IGNORE_INDEX
    targets = question.positions.scattered(question.targets)
    other = question.mask & (targets != IGNORE_INDEX) & (targets != following)
    if other.any():
        row, place = other.nonzero()[0].tolist()
        follows = int(following[row, place])
        raise ValueError(
            f"in row {row} of a batch the label at token {place + 1} is {int(targets[row, place])}, "
            f"where the row has {'nothing' if follows == IGNORE_INDEX else follows}; a server of "
            f"{backend} tells the log-probabilities of a row's own tokens alone. Give labels that are "
            f"the row's tokens or {IGNORE_INDEX}, or serve the teacher by lightning-kd serve"
        )


def sparse_answer(
    reply: Reply,
    question: Question,
    tops: Sequence[Sequence[tuple[int, float]]],
    labels: Sequence[float],
    device: torch.device,
) -> TeacherAnswer:
    """Return an answer from lists.

    Args:
        reply: What they came with, for messages.
        question: What was asked.
        tops: The k tokens of each position and their log-probabilities.
        labels: The log-probability of the token that follows each position.
        device: Of the answer.

    Raises:
        WireError: If they are no log-probabilities.
    """
    unlabeled = to_device(question.targets == IGNORE_INDEX, device)
    of_labels = to_device(torch.tensor(labels, dtype=torch.float32), device)
    of_labels = of_labels.masked_fill(unlabeled, 0.0)
    finite(reply, "log-probabilities", of_labels)
    if question.payload == "token_log_probs":
        return TokenLogProbs(of_labels)
    ids = [[token for token, _ in top] for top in tops]
    log_probs = [[value for _, value in top] for top in tops]
    shape = (len(tops), question.k)
    values = to_device(torch.tensor(log_probs, dtype=torch.float32).reshape(shape), device)
    finite(reply, "log-probabilities", values)
    return TopKAndToken(
        to_device(torch.tensor(ids, dtype=torch.long).reshape(shape), device),
        values,
        label_log_probs=of_labels,
    )


def model_of(reply: Reply, wanted: str | None) -> tuple[str, int | None]:
    """Return the name and the longest row of a model in the reply to ``/v1/models``.

    Raises:
        WireError: If it is not there.
    """
    value = reply.json()
    listed = value.get("data") if isinstance(value, Mapping) else None
    if not isinstance(listed, list) or not all(isinstance(each, Mapping) for each in listed):
        raise reply.nonsense("a list of models")
    names = [str(each.get("id")) for each in listed]
    if not names or (wanted is not None and wanted not in names):
        raise WireError(
            f"{reply.url} has the models {', '.join(names) or 'none'}, where "
            f"{wanted or 'one'} was expected"
        )
    name = names[0] if wanted is None else wanted
    length = listed[names.index(name)].get("max_model_len")
    return name, length if isinstance(length, int) else None
