"""The server of this library: hidden states and the head, k tokens, token log-probabilities."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.devices import to_device
from lightning_kd.fused import (
    FullDistribution,
    TeacherAnswer,
    TokenLogProbs,
    TopKAndToken,
)
from lightning_kd.generation import Completions, GenerationOptions
from lightning_kd.teachers.head_states import answer_from, log_probs_at
from lightning_kd.teachers.servers.backend import Ask, Backend, Description
from lightning_kd.teachers.servers.completions import check_completions_of
from lightning_kd.teachers.servers.shared import finite, ids_of_text
from lightning_kd.wire import Question, Reply, Request, WireError, pack, unpack
from lightning_kd.wire.messages import CONTENT_TYPE, PROTOCOL, Payload, row_tags

_HEADER = 2**20
"""Bytes of a message beside its tensors."""

_SPOT = 1e-2
"""Difference of a log-probability that two devices may make of the same states."""


class OwnServer(Backend):
    """Speaks to ``lightning-kd serve``, exactly."""

    payloads = frozenset(get_args(Payload))
    any_temperature = True
    repeats_exactly = True

    def __init__(self) -> None:
        self._about: Mapping[str, Any] = {}
        self._head: dict[torch.device, dict[str, Tensor]] = {}

    def describe(self, ask: Ask) -> Description:
        """Ask for the description; the head is asked for once, with the first hidden states."""
        reply = ask(Request("GET", "/v1/teacher"))
        about = reply.json()
        try:
            protocol, states = about["protocol"], about["states"]
            if protocol != PROTOCOL:
                raise WireError(
                    f"{reply.url} speaks protocol {protocol!r}, this side {PROTOCOL}: install one "
                    "version of lightning-kd on both"
                )
            wide = all(kind in {"torch.float32", "torch.float64"} for _, kind in _widths(states))
            description = Description(
                fingerprint=str(about["fingerprint"]),
                payloads=frozenset(about["payloads"]),
                vocabulary_size=int(about["vocabulary_size"]),
                length=None if about["length"] is None else int(about["length"]),
                most_k=int(about["most_k"]),
                generates=bool(about["generation"]),
                vocabulary=str(about["vocabulary"]),
                tolerance=1e-3 if wide else 0.25,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, WireError):
                raise
            raise reply.nonsense("the description that lightning-kd serve gives") from error
        if about != self._about:
            self._about, self._head = about, {}
        return description

    def token_ids(self, ask: Ask, text: str) -> list[int]:
        """Ask ``/tokenize``."""
        body = {"prompt": text, "add_special_tokens": False}
        reply = ask(Request.of_json("/tokenize", body))
        return ids_of_text(reply, reply.json(), "tokens")

    def vocabulary(self, ask: Ask) -> Mapping[str, int]:
        """Ask ``/v1/vocabulary``."""
        reply = ask(Request("GET", "/v1/vocabulary", most_bytes=2**27))
        ids = reply.json()
        if not isinstance(ids, dict) or not all(isinstance(i, int) for i in ids.values()):
            raise reply.nonsense("a mapping of tokens to their ids")
        return ids

    def answer(self, ask: Ask, question: Question, device: torch.device) -> TeacherAnswer:
        """Ask ``/v1/answers``."""
        count = len(question.targets)
        if question.payload == "hidden":
            each = sum(width * 8 for width, _ in _widths(self._about["states"]))
        else:
            each = 12 * question.k + 8 * len(question.temperatures) + 16
        request = Request(
            "POST",
            "/v1/answers",
            question.message(),
            CONTENT_TYPE,
            most_bytes=count * each + _HEADER,
        )
        reply = ask(request)
        tensors = self._tensors(reply, "an answer of lightning-kd serve", question.digest())
        _check_lengths(reply, tensors, count)
        moved = {name: to_device(tensor, device) for name, tensor in tensors.items()}
        try:
            if question.payload == "hidden":
                return self._distribution(ask, reply, question, moved)
            return _sparse(reply, question, moved)
        except KeyError as error:
            raise reply.nonsense(f"an answer with {error}") from error

    def complete(
        self,
        ask: Ask,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        options: GenerationOptions,
        seeds: list[int],
        width: int | None,
    ) -> Completions:
        """Ask ``/v1/generate``.

        Raises:
            ValueError: If what came are no completions of these prompts.
        """
        values = vars(options)
        tensors = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
        about = {"options": values, "seeds": seeds, "width": width}
        tags, rows = row_tags(prompt_ids, prompt_mask, seeds, about), len(prompt_ids)
        reply = ask(
            Request(
                "POST",
                "/v1/generate",
                pack(tensors, about),
                CONTENT_TYPE,
                most_bytes=rows * options.max_new_tokens * 32 + _HEADER,
            )
        )
        made = self._tensors(reply, "completions of lightning-kd serve", None)
        if not torch.equal(made.get("rows", tags[:0]), tags):
            raise WireError(
                f"{reply.url} has answered completions of other prompts than were sent, or in another "
                "order"
            )
        try:
            moved = {name: to_device(tensor, prompt_ids.device) for name, tensor in made.items()}
            completions = Completions(
                moved["ids"],
                moved["mask"],
                moved.get("log_probs"),
                moved.get("sampling_log_probs"),
                moved["ended"],
            )
        except KeyError as error:
            raise reply.nonsense(f"completions with {error}") from error
        ends = self._about.get("end_ids")
        check_completions_of(reply.url, completions, options, rows=rows, end_ids=ends, width=width)
        return completions

    def _tensors(self, reply: Reply, expected: str, question: str | None) -> dict[str, Tensor]:
        """Return the tensors of a reply of the same teacher, to the same question."""
        try:
            tensors, about = unpack(reply.body)
        except ValueError as error:
            raise reply.nonsense(f"{expected}, as safetensors,") from error
        if (came := about.get("fingerprint")) != self._about["fingerprint"]:
            raise WireError(
                f"{reply.url} has answered for the teacher {came!r}, where "
                f"{self._about['fingerprint']!r} was served when the run began"
            )
        if question is not None and about.get("question") != question:
            raise WireError(
                f"{reply.url} has answered another question than the one that was asked"
            )
        return tensors

    def _distribution(
        self, ask: Ask, reply: Reply, question: Question, tensors: Mapping[str, Tensor]
    ) -> FullDistribution:
        widths = _widths(self._about["states"])
        states = [tensors[f"states.{number}"] for number in range(len(widths))]
        for state, (width, kind) in zip(states, widths, strict=True):
            if state.ndim != 2 or state.shape[1] != width or str(state.dtype) != kind:
                raise WireError(
                    f"{reply.url} has answered states {tuple(state.shape)} of {state.dtype}, where "
                    f"({len(question.targets)}, {width}) of {kind} were expected"
                )
            finite(reply, "hidden states", state)
        device = question.input_ids.device if not states else states[0].device
        answer = answer_from(states, self._head_on(ask, device), self._about["states"]["layout"])
        _check_spots(reply, answer, question, tensors["spots"])
        return answer

    def _head_on(self, ask: Ask, device: torch.device) -> dict[str, Tensor]:
        """Return the head on a device; it is asked for once."""
        if device not in self._head:
            widths = sum(width for width, _ in _widths(self._about["states"]))
            most = (widths + 1) * self._about["vocabulary_size"] * 8 + _HEADER
            reply = ask(Request("GET", "/v1/head", most_bytes=most))
            held = self._tensors(reply, "an output head, as safetensors,", None)
            for name, tensor in held.items():
                finite(reply, f"the head's {name}", tensor)
            self._head[device] = {name: to_device(tensor, device) for name, tensor in held.items()}
        return self._head[device]


def _widths(states: Mapping[str, Any]) -> list[tuple[int, str]]:
    return [(int(width), str(kind)) for width, kind in states.get("widths", [])]


def _check_lengths(reply: Reply, tensors: Mapping[str, Tensor], count: int) -> None:
    """Refuse an answer about other positions than were asked about."""
    for name, tensor in tensors.items():
        if name != "spots" and (tensor.ndim == 0 or len(tensor) != count):
            raise WireError(
                f"{reply.url} has answered {name} {tuple(tensor.shape)}, where {count} positions "
                "were asked about"
            )


def _check_spots(reply: Reply, answer: FullDistribution, question: Question, told: Tensor) -> None:
    """Compare what the states give at some positions of every row with what the server has."""
    spots = question.spots()
    device, tokens = answer.logits[0].device, question.targets[spots].clamp_min(0)
    found = log_probs_at(answer, spots.to(device), tokens.to(device))
    if told.shape != found.shape:
        raise WireError(
            f"{reply.url} has answered {len(told)} values to compare, where {len(spots)} were expected"
        )
    other = ((found - told).abs() > _SPOT * (1 + told.abs())).nonzero()[:, 0]
    if len(other):
        place = int(spots[other[0]])
        raise WireError(
            f"{reply.url} has answered hidden states that do not belong to their positions: at "
            f"{len(other)} of {len(spots)} that were compared, first at position {place}, where "
            f"the token that follows has log-probability {_shown(found[other])} by the states, and "
            f"{_shown(told[other])} by the server's model"
        )


def _sparse(reply: Reply, question: Question, tensors: Mapping[str, Tensor]) -> TeacherAnswer:
    known = (question.targets != IGNORE_INDEX).to(tensors[next(iter(tensors))].device)
    if question.payload == "token_log_probs":
        targets = question.targets.to(known.device)
        if not torch.equal(tensors["targets"], targets):
            raise WireError(f"{reply.url} has answered about other tokens than were asked about")
        finite(reply, "log-probabilities", tensors["values"])
        return TokenLogProbs(tensors["values"].masked_fill(~known, 0.0))
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            finite(reply, name, tensor)
    # At temperature 1 it is what the named tokens leave.
    tails = {
        t: tensors[f"tail.{t!r}"]
        for t in question.temperatures
        if t != 1 or f"tail.{t!r}" in tensors
    }
    answer = TopKAndToken(
        tensors["token_ids"],
        tensors["log_probs"],
        tail_log_probs=tails,
        label_log_probs=tensors["label_log_probs"],
    )
    _check_labels(reply, answer, question)
    return answer


def _check_labels(reply: Reply, answer: TopKAndToken, question: Question) -> None:
    """Compare the label's log-probability with that of the same token among the k."""
    targets = question.targets.to(answer.token_ids.device)
    listed = answer.token_ids == targets[:, None]
    among = (answer.log_probs - answer.label_log_probs[:, None]).abs() <= _SPOT
    least = answer.log_probs.amin(-1)
    beyond = answer.label_log_probs <= least + _SPOT
    fits = torch.where(listed.any(-1), (among & listed).any(-1), beyond)
    fits |= targets == IGNORE_INDEX
    if not fits.all():
        place = int((~fits).nonzero()[0, 0])
        raise WireError(
            f"{reply.url} has answered tokens that do not belong to their positions: the token "
            f"{int(targets[place])} that follows position {place} has log-probability "
            f"{float(answer.label_log_probs[place]):.4f}, which its {answer.token_ids.shape[1]} most "
            "likely tokens contradict"
        )


def _shown(values: Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in values.flatten()[:4].tolist())
