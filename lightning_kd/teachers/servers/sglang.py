"""SGLang's own interface, with the log-probabilities of the input's tokens."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_kd.fused import TeacherAnswer
from lightning_kd.teachers.servers.backend import Ask, Backend, Description
from lightning_kd.teachers.servers.shared import model_of, rows_to_ask, sparse_answer
from lightning_kd.wire import Question, Reply, Request, WireError

_ENTRY_BYTES = 160
"""Longest text of one token's log-probability."""


class SGLangServer(Backend):
    """Speaks to a server of SGLang: ``POST /generate`` with ``top_logprobs_num``.

    The reply repeats the ids of the input, which must be those that were sent.

    Args:
        model: Name of the model; the first that the server lists if None.

    References:
        https://docs.sglang.ai/basic_usage/sampling_params.html
    """

    payloads = frozenset({"top_k", "token_log_probs"})
    adds_special_tokens = True
    lists_rows = True
    tokens_beside = 1  # rows must be shorter than what the model reads
    probe = (128, 32)  # the ids of a text cost a pass of the model

    def __init__(self, model: str | None = None) -> None:
        self._wanted = model

    def describe(self, ask: Ask) -> Description:
        """Ask for the list of models."""
        name, length = model_of(ask(Request("GET", "/v1/models")), self._wanted)
        return Description(f"sglang:{name}", self.payloads, length=length)

    def token_ids(self, ask: Ask, text: str) -> list[int]:
        """Send the text, and read the ids that the reply repeats."""
        reply = ask(Request.of_json("/generate", {"text": text, **_options(1)}))
        echoed = _list(reply, _meta(reply, reply.json()), "input_token_logprobs")
        return [_entry(reply, each)[1] for each in echoed]

    def answer(self, ask: Ask, question: Question, device: torch.device) -> TeacherAnswer:
        """Ask ``/generate`` about the rows in which something is asked about."""
        rows = rows_to_ask(question)
        if not rows:
            return sparse_answer(Reply("", 200, b""), question, [], [], device)
        tokens = sum(len(ids) for ids, _ in rows)
        body = {"input_ids": [ids for ids, _ in rows], **_options(question.k)}
        most = tokens * (question.k + 1) * _ENTRY_BYTES + 2**20
        reply = ask(Request.of_json("/generate", body, most_bytes=most))
        value = reply.json()
        if not isinstance(value, list) or len(value) != len(rows):
            raise reply.nonsense(f"a list of {len(rows)} rows")
        tops, labels = [], []
        for (ids, places), each in zip(rows, value, strict=True):
            meta = _meta(reply, each)
            own = [_entry(reply, e) for e in _list(reply, meta, "input_token_logprobs")]
            if [token for _, token in own] != ids:
                raise WireError(
                    f"{reply.url} has answered about the tokens {str([t for _, t in own])[:80]}, where "
                    f"{str(ids)[:80]} was sent: the list is shifted, or of another row"
                )
            listed = _list(reply, meta, "input_top_logprobs")
            if len(listed) != len(ids):
                raise WireError(
                    f"{reply.url} has answered input_top_logprobs with {len(listed)} entries, where "
                    f"one for each of {len(ids)} tokens was expected"
                )
            for place in places:
                label = own[place + 1][0]
                if label is None:
                    raise reply.nonsense(f"a log-probability at token {place + 1}")
                tops.append(_top(reply, listed[place + 1], ids[place + 1], label, question.k))
                labels.append(label)
        return sparse_answer(reply, question, tops, labels, device)


def _options(k: int) -> dict[str, Any]:
    return {
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
    }


def _meta(reply: Reply, value: Any) -> Mapping[str, Any]:
    meta = value.get("meta_info") if isinstance(value, Mapping) else None
    if not isinstance(meta, Mapping):
        raise reply.nonsense("rows with meta_info")
    return meta


def _list(reply: Reply, meta: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(found := meta.get(name), list):
        raise reply.nonsense(f"meta_info with {name}")
    return found


def _entry(reply: Reply, entry: Any) -> tuple[float | None, int]:
    """Return the log-probability and the id of ``[logprob, id, text]``."""
    try:
        value, token = entry[0], int(entry[1])
        return None if value is None else float(value), token
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise WireError(
            f"{reply.url} has answered {str(entry)[:120]} for a token, where [log-probability, id, "
            "text] was expected"
        ) from error


def _top(reply: Reply, entry: Any, own: int, label: float, k: int) -> list[tuple[int, float]]:
    """Return the k most likely tokens of an entry."""
    if not isinstance(entry, list) or len(entry) != k:
        raise WireError(
            f"{reply.url} has answered {str(entry)[:120]} for a position, where {k} tokens were "
            "asked for"
        )
    top = []
    for each in entry:
        value, token = _entry(reply, each)
        if value is None:
            raise reply.nonsense("a log-probability for each token")
        top.append((token, value))
    among = dict(top).get(own)
    least = min(value for _, value in top)
    if abs(among - label) > 1e-3 if among is not None else label > least + 1e-3:
        raise WireError(
            f"{reply.url} gives the token {own} log-probability {label:.4f}, which its {k} most likely "
            "tokens there contradict: the lists are shifted against each other"
        )
    return top
