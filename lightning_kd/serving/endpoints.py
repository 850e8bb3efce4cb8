"""The addresses of a server, and what each of them answers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from lightning_kd.generation import Completions
from lightning_kd.serving.batching import Batcher, Job
from lightning_kd.serving.completions import CompletionRequest, reply
from lightning_kd.serving.fields import flag
from lightning_kd.serving.limits import Limits, RefusedError
from lightning_kd.serving.service import CompletionOrder, TeacherService
from lightning_kd.serving.texts import check_texts, token_ids
from lightning_kd.wire.messages import (
    CONTENT_TYPE,
    Question,
    check_ids,
    pack,
    row_tags,
    unpack,
)


@dataclass(frozen=True)
class Body:
    """The body of a reply."""

    content_type: str
    data: bytes

    @classmethod
    def of_json(cls, value: Any) -> "Body":
        """Return JSON; what is no number is refused, not written."""
        return cls("application/json", json.dumps(value, allow_nan=False).encode())


class Endpoints:
    """What a server answers, by path.

    =============================  ===============================================================
    ``GET /health``                whether questions are answered
    ``GET /v1/models``             the teacher's name and longest row, as vLLM has them
    ``GET /v1/teacher``            what a client of this library must know
    ``GET /v1/vocabulary``         the id of each token
    ``GET /v1/head``               the output head, once, as safetensors
    ``POST /v1/answers``           hidden states, k tokens or token log-probabilities of a micro-batch
    ``POST /v1/generate``          completions of prompts, seeded by row, with log-probabilities
    ``POST /v1/completions``       completions and ``prompt_logprobs``, as vLLM has them
    ``POST /tokenize``             the ids of a text, as vLLM has them
    =============================  ===============================================================

    Args:
        service: The teacher.
        batcher: Computes.
        limits: Of the server.
        name: The teacher's name.
    """

    def __init__(
        self, service: TeacherService, batcher: Batcher, limits: Limits, name: str
    ) -> None:
        self._service, self._batcher, self._limits, self._name = service, batcher, limits, name
        self.reads: Mapping[str, Callable[[bytes], Body]] = {
            "/health": self._health,
            "/v1/models": self._models,
            "/v1/teacher": self._teacher,
            "/v1/vocabulary": self._vocabulary,
            "/v1/head": self._head,
        }
        self.asks: Mapping[str, Callable[[bytes], Body]] = {
            "/v1/answers": self._answers,
            "/v1/generate": self._generate,
            "/v1/completions": self._completions,
            "/tokenize": self._tokenize,
        }

    def _health(self, _: bytes) -> Body:
        if not self._batcher.alive:
            raise RefusedError(503, "the server is ending")
        return Body.of_json({"status": "ok"})

    def _models(self, _: bytes) -> Body:
        about = {"id": self._name, "object": "model", "owned_by": "lightning-kd"}
        about["max_model_len"] = self._service.length  # type: ignore[assignment]
        return Body.of_json({"object": "list", "data": [about]})

    def _teacher(self, _: bytes) -> Body:
        most = min(self._limits.k, self._service.vocabulary_size)
        return Body.of_json(self._service.description() | {"most_k": most})

    def _vocabulary(self, _: bytes) -> Body:
        return Body.of_json(self._service.tokenizer.get_vocab())

    def _head(self, _: bytes) -> Body:
        if not self._service.head:
            raise RefusedError(404, "the teacher has no head that could be sent")
        about = {"fingerprint": self._service.fingerprint}
        return Body(CONTENT_TYPE, pack(self._service.head, about))

    def _answers(self, body: bytes) -> Body:
        try:
            question = Question.read(body)
            check_ids(question, self._service.vocabulary_size)
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        tensors = self._ask(question)
        about = {"fingerprint": self._service.fingerprint, "question": question.digest()}
        return Body(CONTENT_TYPE, pack(tensors, about))

    def _generate(self, body: bytes) -> Body:
        try:
            tensors, about = unpack(body)
            order = CompletionOrder.of_message(tensors, about)
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError(400, f"not an order of completions: {error}") from error
        made = self._complete(order)
        values = {f.name: getattr(made, f.name) for f in fields(made)}
        values["rows"] = row_tags(order.prompt_ids, order.prompt_mask, order.seeds, about)
        held = {name: value for name, value in values.items() if value is not None}
        return Body(CONTENT_TYPE, pack(held, {"fingerprint": self._service.fingerprint}))

    def _completions(self, body: bytes) -> Body:
        tokenizer = self._service.tokenizer
        request = CompletionRequest.read(_json(body), tokenizer, self._name, self._limits)
        answer: Mapping[str, Tensor] | None = None
        completions = None
        if request.prompt_log_probs is not None:
            question = request.question(self._service.pad_id)
            try:
                check_ids(question, self._service.vocabulary_size)
            except ValueError as error:
                raise RefusedError(400, str(error)) from error
            answer = self._ask(question)
            if "label_log_probs" not in answer:
                raise RefusedError(400, "the teacher does not know the prompt's own tokens")
        if request.max_tokens > 0:
            completions = self._complete(request.order(self._service.pad_id))
        return Body.of_json(reply(request, tokenizer, self._name, answer, completions))

    def _tokenize(self, body: bytes) -> Body:
        given = _json(body)
        text = given.get("prompt") if isinstance(given, dict) else None
        if not isinstance(text, str):
            raise RefusedError(400, 'send {"prompt": "a text"}')
        special = flag(dict(given), "add_special_tokens", True)
        check_texts([text], self._limits)
        tokens = token_ids(text, self._service.tokenizer, special)
        return Body.of_json(
            {"tokens": tokens, "count": len(tokens), "max_model_len": self._service.length}
        )

    def _ask(self, question: Question) -> Mapping[str, Tensor]:
        """Return the answer to a question that is within the limits."""
        offered = self._service.payloads
        if question.payload not in offered:
            raise RefusedError(
                400,
                f"{question.payload} is asked for; the teacher gives {', '.join(sorted(offered))}",
            )
        if question.payload == "top_k":
            most = min(self._limits.k, self._service.vocabulary_size)
            if question.k > most:
                raise RefusedError(400, f"k is {question.k}; this server answers {most} at most")
        self._check_size(question.input_ids, question.attention_mask, 0)
        group = None
        if not question.alone:
            group = (question.payload, question.k, question.temperatures)
        rows, length = question.input_ids.shape
        answer: Mapping[str, Tensor] = self._batcher.answer(Job(question, group, rows, length))
        return answer

    def _complete(self, order: CompletionOrder) -> Completions:
        """Return the completions of an order that is within the limits."""
        if not self._service.generates:
            raise RefusedError(
                400,
                "the teacher does not generate. Of a prompt alone, max_tokens: 0 with prompt_logprobs "
                "is answered; a ServedTeacher takes backend: lightning_kd",
            )
        new, ids = order.options.max_new_tokens, order.prompt_ids
        if new > self._limits.new_tokens:
            raise RefusedError(
                400,
                f"{new} new tokens are asked for; at most {self._limits.new_tokens} are written",
            )
        width = self._service.vocabulary_size
        if not ((ids >= 0) & (ids < width)).all():
            raise RefusedError(400, f"the prompts have ids beyond those of the teacher, {width}")
        self._check_size(ids, order.prompt_mask, new)
        rows, length = ids.shape
        made = self._batcher.answer(Job(order, None, rows, length))
        assert isinstance(made, Completions)  # of an order
        return made

    def _check_size(self, ids: Tensor, real: Tensor, new: int) -> None:
        """Refuse rows that are too long, and too many of them."""
        longest, most = int(real.sum(-1).max()) + new, self._service.length
        if most is not None and longest > most:
            raise RefusedError(
                400,
                f"a row has {longest} tokens, new ones included; the teacher reads {most} at most",
            )
        if len(ids) > self._limits.rows:
            raise RefusedError(
                413, f"the request has {len(ids)} rows; at most {self._limits.rows} are taken"
            )
        size = len(ids) * (ids.shape[1] + new)
        if size > self._limits.tokens:
            raise RefusedError(
                413,
                f"the request has {size} padded tokens; at most {self._limits.tokens} are taken",
            )


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is no JSON: {error}") from error
