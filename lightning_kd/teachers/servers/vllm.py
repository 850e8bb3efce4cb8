"""vLLM's completions, with the log-probabilities of the prompt's tokens."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_kd.fused import TeacherAnswer
from lightning_kd.teachers.servers.backend import Ask, Backend, Description
from lightning_kd.teachers.servers.shared import (
    ids_of_text,
    model_of,
    rows_to_ask,
    sparse_answer,
)
from lightning_kd.wire import Question, Reply, Request, WireError

_ENTRY_BYTES = 160
"""Longest text of one token's log-probability, its decoded text included."""


class VLLMServer(Backend):
    """Speaks to a server of vLLM's completions: ``POST /v1/completions`` with ``prompt_logprobs``.

    Each position of the reply must list its own token, which it does with no other list than its own.

    Args:
        model: Name of the model; the first that the server lists if None.

    References:
        https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
    """

    payloads = frozenset({"top_k", "token_log_probs"})
    lists_rows = True
    tokens_beside = 1  # max_tokens

    def __init__(self, model: str | None = None) -> None:
        self._wanted, self._name = model, model or ""

    def describe(self, ask: Ask) -> Description:
        """Ask for the list of models."""
        self._name, length = model_of(ask(Request("GET", "/v1/models")), self._wanted)
        return Description(f"vllm:{self._name}", self.payloads, length=length)

    def token_ids(self, ask: Ask, text: str) -> list[int]:
        """Ask ``/tokenize``."""
        body = {"model": self._name, "prompt": text, "add_special_tokens": False}
        reply = ask(Request.of_json("/tokenize", body))
        return ids_of_text(reply, reply.json(), "tokens")

    def answer(self, ask: Ask, question: Question, device: torch.device) -> TeacherAnswer:
        """Ask ``/v1/completions`` about the rows in which something is asked about."""
        rows = rows_to_ask(question)
        tokens = sum(len(ids) for ids, _ in rows)
        body = {
            "model": self._name,
            "prompt": [ids for ids, _ in rows],
            "max_tokens": self.tokens_beside,
            "temperature": 0.0,
            "prompt_logprobs": question.k,
            "return_token_ids": True,
        }
        if not rows:
            return sparse_answer(Reply("", 200, b""), question, [], [], device)
        most = tokens * (question.k + 1) * _ENTRY_BYTES + 2**20
        reply = ask(Request.of_json("/v1/completions", body, most_bytes=most))
        tops, labels = [], []
        for (ids, places), choice in zip(rows, _choices(reply, len(rows)), strict=True):
            entries = _entries(reply, choice, ids)
            for place in places:
                top, label = _tokens(reply, entries[place + 1], ids[place + 1], place, question.k)
                tops.append(top)
                labels.append(label)
        return sparse_answer(reply, question, tops, labels, device)


def _choices(reply: Reply, rows: int) -> list[Mapping[str, Any]]:
    """Return the choice of each row, in the order of the rows."""
    value = reply.json()
    choices = value.get("choices") if isinstance(value, Mapping) else None
    if not isinstance(choices, list) or not all(isinstance(each, Mapping) for each in choices):
        raise reply.nonsense("completions with choices")
    found = {each.get("index"): each for each in choices}
    if sorted(found, key=repr) != sorted(range(rows), key=repr) or len(choices) != rows:
        raise WireError(
            f"{reply.url} has answered choices {sorted(found, key=repr)}, where those of {rows} rows "
            "were expected"
        )
    return [found[row] for row in range(rows)]


def _entries(reply: Reply, choice: Mapping[str, Any], ids: list[int]) -> list[Any]:
    """Return an entry for each token of a row."""
    entries, echoed = choice.get("prompt_logprobs"), choice.get("prompt_token_ids")
    if echoed is not None and echoed != ids:
        raise WireError(
            f"{reply.url} has read {str(echoed)[:80]}, where {str(ids)[:80]} was sent: its tokens are "
            "not those of the run"
        )
    if not isinstance(entries, list) or len(entries) != len(ids):
        came = f"{len(entries)} entries" if isinstance(entries, list) else repr(entries)
        raise WireError(
            f"{reply.url} has answered prompt_logprobs with {came}, where one for each of "
            f"{len(ids)} tokens was expected"
        )
    if entries[0] is not None:
        raise WireError(
            f"{reply.url} has answered prompt_logprobs that begin with {str(entries[0])[:80]}; null "
            "was expected, for nothing comes before the first token: the list is shifted"
        )
    return entries


def _tokens(
    reply: Reply, entry: Any, own: int, place: int, k: int
) -> tuple[list[tuple[int, float]], float]:
    """Return the k most likely tokens of an entry, and the log-probability of the token itself."""
    try:
        values = {int(token): float(about["logprob"]) for token, about in entry.items()}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise WireError(
            f"{reply.url} has answered {str(entry)[:120]} for a position, where log-probabilities by "
            "token id were expected"
        ) from error
    if own not in values:
        raise WireError(
            f"{reply.url} does not list the token {own} that follows position {place} of a row, but "
            f"{sorted(values)[:8]}: the list is shifted, or of another row"
        )
    label = values[own]
    ranked = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    if len(ranked) == k + 1:
        ranked = [item for item in ranked if item[0] != own]
    if len(ranked) != k:
        raise WireError(
            f"{reply.url} has answered {len(values)} tokens for a position, where {k} were asked for, "
            "or one more: start the server with a larger --max-logprobs, or lower k"
        )
    return ranked, label
