"""What a run asks its servers before the first step."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_kd.fused import (
    ChunkedPass,
    FullDistribution,
    TeacherAnswer,
    TeacherTokenLogProb,
    TokenLogProbs,
    TopKAndToken,
    evaluate_no_grad,
)
from lightning_kd.models.vocabulary import VocabularyPolicy
from lightning_kd.teachers.servers.backend import Ask, Backend, Description
from lightning_kd.teachers.servers.causality import check_causality
from lightning_kd.teachers.servers.tokens import same_tokens
from lightning_kd.wire import Question, Servers, WireError
from lightning_kd.wire.messages import Payload


def handshake(
    backend: Backend,
    servers: Servers,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: VocabularyPolicy,
    payload: Payload,
    k: int,
    temperatures: Sequence[float],
    device: torch.device,
) -> Description:
    """Ask each server whether it is up, has the same teacher and tokens, and gives sound answers.

    Args:
        backend: Speaks to them.
        servers: Their addresses.
        tokenizer: The run's.
        policy: Whether one side may have further tokens.
        payload: What answers will hold.
        k: Tokens of ``top_k``.
        temperatures: Temperatures of the tail.
        device: Of answers.

    Returns:
        What they say of themselves.

    Raises:
        WireError: If one does not answer, or not so.
    """
    found: dict[str, Description] = {}
    for url in servers.urls:
        ask = partial(servers.ask_until, [url])
        backend.check_health(ask)
        description = backend.describe(ask)
        _check_offer(url, description, payload, k)
        ids = same_tokens(url, backend, ask, tokenizer, description, policy)
        if description.length is not None:
            ids = ids[: description.length - backend.tokens_beside]
        if len(ids) > 2:
            if backend.lists_rows:
                others = sorted(set(tokenizer.get_vocab().values()) - {*tokenizer.all_special_ids})
                check_causality(url, backend, ask, ids, others, k, device)
            _same_answers(url, backend, ask, ids, payload, k, tuple(temperatures), device)
        found[url] = description
    first, *others = found
    for other in others:
        if found[other].fingerprint != found[first].fingerprint:
            raise WireError(
                f"{first} serves {found[first].fingerprint!r} and {other} serves "
                f"{found[other].fingerprint!r}: all urls must be of one teacher"
            )
    return found[first]


def _check_offer(url: str, description: Description, payload: Payload, k: int) -> None:
    if payload not in description.payloads:
        raise WireError(
            f"payload is {payload!r}, but {url} gives "
            f"{', '.join(sorted(description.payloads)) or 'none'}; choose one of these"
        )
    most = description.most_k
    if payload == "top_k" and most is not None and k > most:
        raise WireError(f"k is {k}, but {url} answers {most} tokens at most; lower k")


def _same_answers(
    url: str,
    backend: Backend,
    ask: Ask,
    ids: Sequence[int],
    payload: Payload,
    k: int,
    temperatures: tuple[float, ...],
    device: torch.device,
) -> None:
    """Compare a row alone, the same again, and the row below a longer one."""

    def scored(*rows: Sequence[int]) -> Tensor:
        longest = max(map(len, rows))
        padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
        real = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        mask = real.bool()
        mask[:, :-1] &= real[:, 1:].bool()
        mask[:, -1] = False
        targets = padded[:, 1:][mask[:, :-1]]
        question = Question(padded, real, mask, targets, payload, k, temperatures)
        answer = backend.answer(ask, question, device)
        return label_log_probs(answer, targets.to(device))

    row = ids[: max(2, len(ids) // 2)]
    alone, again = scored(row), scored(row)
    if backend.repeats_exactly and not torch.equal(alone, again):
        raise WireError(
            f"{url} has answered the same question twice with other bits (up to "
            f"{float((alone - again).abs().max()):.3g} nats): its kernels are not deterministic"
        )
    in_batch = scored(ids, row)[len(ids) - 1 :]
    difference = float((alone - in_batch).abs().max())
    tolerance = backend.describe(ask).tolerance
    if not difference <= tolerance:
        raise WireError(
            f"{url} gives a row other log-probabilities alone than in a batch: they differ by "
            f"{difference:.3g} nats, where {tolerance} can be rounding. Its padding is not masked, or "
            "its rows are mixed up"
        )


def label_log_probs(answer: TeacherAnswer, targets: Tensor) -> Tensor:
    """Return the log-probability of each target, ``(N,)``."""
    if isinstance(answer, TokenLogProbs):
        return answer.values
    if isinstance(answer, TopKAndToken):
        return answer.label_log_probs
    assert isinstance(answer, FullDistribution)  # there are no other payloads
    return evaluate_no_grad(ChunkedPass(None, answer, [TeacherTokenLogProb(targets)]))[0]
