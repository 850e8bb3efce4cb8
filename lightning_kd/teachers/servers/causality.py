"""Whether a server's lists belong to the positions at which they stand."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_kd.fused import TopKAndToken
from lightning_kd.teachers.servers.backend import Ask, Backend
from lightning_kd.wire import Question, WireError

_AROUND, _CHOICES = 4, 6
"""Tokens before and behind the one that is exchanged, and tokens that it is exchanged for."""

_SAME = 1 / 8
"""Share of the largest difference between two rows up to which a difference is rounding."""


def check_causality(
    url: str,
    backend: Backend,
    ask: Ask,
    ids: Sequence[int],
    others: Iterable[int],
    k: int,
    device: torch.device,
) -> None:
    """Find out lists that are shifted, whatever k is, from rows that differ in one token.

    What is expected at a token follows from the tokens before it. So rows that differ in the token at
    one place alone have the same k most likely tokens up to that place, and others from the next one
    on; a list that is shifted begins to differ earlier or later. The log-probabilities of the rows'
    own tokens begin to differ at the place itself.

    Args:
        url: The server's.
        backend: Speaks to it.
        ask: Sends a request to it.
        ids: Of a text, three or more; rows are no longer.
        others: Further ids, for texts with too few different ones.
        k: Tokens that are asked for.
        device: Of answers.

    Raises:
        WireError: If a list is shifted, or does not depend on the row.
    """
    around = min(_AROUND, (len(ids) - 1) // 2)
    before, behind = list(ids[:around]), list(ids[-around:])
    choices = list(dict.fromkeys([*ids, *others]))[:_CHOICES]
    rows = torch.tensor([[*before, token, *behind] for token in choices])
    mask = torch.ones_like(rows).bool()
    mask[:, -1] = False
    question = Question(rows, torch.ones_like(rows), mask, rows[:, 1:].flatten(), "top_k", k)
    answer = backend.answer(ask, question, device)
    assert isinstance(answer, TopKAndToken)  # of the payload that was asked for
    shape = (len(rows), rows.shape[1] - 1)
    lists = answer.token_ids.cpu().reshape(*shape, k), answer.log_probs.cpu().reshape(*shape, k)
    differ = [_difference_of_lists(lists[0][:, n], lists[1][:, n]) for n in range(shape[1])]
    _check_onset(url, differ, len(before), "most likely tokens", rows)
    labels = answer.label_log_probs.cpu().reshape(shape)
    differ = (labels - labels[:1]).abs().amax(0).tolist()
    _check_onset(url, differ, len(before) - 1, "log-probabilities of the rows' own tokens", rows)


def _difference_of_lists(ids: Tensor, log_probs: Tensor) -> float:
    """Return by how much the first row's list differs from others, in nats and at least.

    A token that one list has alone is in the other at most as likely as the least likely one there.
    """
    largest = 0.0
    first = dict(zip(ids[0].tolist(), log_probs[0].tolist(), strict=True))
    for tokens, values in zip(ids[1:].tolist(), log_probs[1:].tolist(), strict=True):
        other = dict(zip(tokens, values, strict=True))
        for one, two in ((first, other), (other, first)):
            least = min(two.values())
            for token, value in one.items():
                gap = abs(value - two[token]) if token in two else value - least
                largest = max(largest, gap)
    return largest


def _check_onset(url: str, differ: list[float], expected: int, what: str, rows: Tensor) -> None:
    """Compare the place from which rows differ with the one from which they must.

    Args:
        url: The server's.
        differ: Largest difference between rows at each position.
        expected: The first position at which they must differ.
        what: Is compared.
        rows: The rows, for the message.
    """
    largest = max(differ)
    begins = next((n for n, value in enumerate(differ) if value > _SAME * largest), len(differ))
    if begins == expected:
        return
    place = int((rows != rows[0]).any(0).nonzero()[0, 0])
    if begins == len(differ):
        found, shift = "the same everywhere", "they do not depend on what comes before"
    else:
        off = begins - expected
        found = f"the same up to token {begins} and differ from token {begins + 1} on"
        side = "later" if off > 0 else "earlier"
        shift = (
            f"the list is shifted: entries stand {abs(off)} {side} than the tokens they belong to"
        )
    raise WireError(
        f"{url} has answered {what} that do not belong to their positions: in rows that differ at "
        f"token {place} alone they are {found}, where they must begin to differ at token "
        f"{expected + 1}; {shift}"
    )
