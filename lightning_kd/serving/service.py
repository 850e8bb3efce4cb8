"""A teacher of this process, as its server uses it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import IGNORE_INDEX, Batch
from lightning_kd.devices import to_device
from lightning_kd.fused import FullDistribution
from lightning_kd.generation import Completions, GenerationOptions
from lightning_kd.models.logits_backend import FusedLogits
from lightning_kd.option_checks import is_number
from lightning_kd.resuming import describe
from lightning_kd.scoring import ScoredPositions
from lightning_kd.serving.limits import Limits
from lightning_kd.serving.merging import divided, merged
from lightning_kd.serving.payloads import payload_of, spot_check
from lightning_kd.teachers import CachedTeacher, RoutedTeacher, Teacher, checked_answer
from lightning_kd.teachers.head_states import head_of, states_of
from lightning_kd.tokenization import end_of_sequence_ids, padding_id, vocabulary_digest
from lightning_kd.wire import Question
from lightning_kd.wire.messages import PROTOCOL, Payload


@dataclass(frozen=True)
class CompletionOrder:
    """Prompts to complete.

    Attributes:
        prompt_ids: Padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.
        options: Length and sampling.
        seeds: One for each row.
        width: Tokens from here on are never generated; None allows all.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    options: GenerationOptions
    seeds: tuple[int, ...]
    width: int | None = None

    @classmethod
    def of_message(
        cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> "CompletionOrder":
        """Return the order of a message.

        Raises:
            KeyError: If it lacks something.
            TypeError: If it has options that there are not.
            ValueError: If values are of another kind, or do not fit together.
        """
        ids, mask = tensors["prompt_ids"], tensors["prompt_mask"]
        seeds, width = about["seeds"], about["width"]
        if ids.is_floating_point() or mask.is_floating_point():
            raise ValueError("prompt_ids and prompt_mask must be integers")
        if ids.ndim != 2 or 0 in ids.shape or ids.shape != mask.shape:
            raise ValueError(
                f"prompt_ids {tuple(ids.shape)} and prompt_mask {tuple(mask.shape)} do not fit"
            )
        ids, mask = ids.long(), mask.long()
        if (
            ((mask != 0) & (mask != 1)).any()
            or (mask.diff(dim=1) < 0).any()
            or not mask[:, -1].all()
        ):
            raise ValueError(
                "prompt_mask must be 1 on a prompt's tokens, and 0 to the left of them"
            )
        if not isinstance(seeds, list) or len(seeds) != len(ids):
            raise ValueError(f"seeds must be a list of {len(ids)}, one for each row")
        if not all(is_number(seed, whole=True) and 0 <= seed < 2**63 for seed in seeds):
            raise ValueError("a seed must be a whole number from 0 to 2**63 - 1")
        if width is not None and not (is_number(width, whole=True) and width > 0):
            raise ValueError(f"width is {width!r}; it must be a number of tokens, or null")
        return cls(ids, mask, GenerationOptions(**about["options"]), tuple(seeds), width)


class TeacherService:
    """Answers questions with a teacher, all from one thread.

    Args:
        teacher: Any teacher of this process.
        tokenizer: Its tokenizer.
        device: Where it runs.
        limits: Of the server.

    Raises:
        ValueError: If the teacher cannot answer here, or nothing that can be served.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        limits: Limits,
    ) -> None:
        self.teacher, self.tokenizer, self.device = teacher, tokenizer, device
        self._backend = FusedLogits()
        check_servable(teacher)
        teacher.prepare(tokenizer, device, "equal")
        self.generates = _generates(teacher)
        self.vocabulary_size = teacher.vocabulary_size
        self.pad_id = padding_id(tokenizer)
        self.length = self._longest(limits)
        self.head: dict[str, Tensor] = {}
        self._about_states: dict[str, Any] = {"refused": "the teacher gives no full distribution"}
        self.payloads = self._payloads()
        described = json.dumps(describe(teacher), sort_keys=True)
        self.fingerprint = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
        self._vocabulary = vocabulary_digest(tokenizer)

    def description(self) -> dict[str, Any]:
        """Return what a client must know before it asks."""
        return {
            "protocol": PROTOCOL,
            "teacher": type(self.teacher).__name__,
            "fingerprint": self.fingerprint,
            "vocabulary_size": self.vocabulary_size,
            "payloads": sorted(self.payloads),
            "generation": self.generates,
            "length": self.length,
            "vocabulary": self._vocabulary,
            "end_ids": self._end_ids(),
            "states": self._about_states,
        }

    def compute(self, works: Sequence[Any]) -> list[Any]:
        """Answer questions of one payload together, or complete the prompts of one order."""
        with torch.no_grad():
            if isinstance(works[0], CompletionOrder):
                return [self._complete(order) for order in works]
            return cast("list[Any]", self._answer(works))

    def _answer(self, questions: Sequence[Question]) -> list[dict[str, Tensor]]:
        asked = merged(questions, self.pad_id)
        batch, positions = _batch_of(asked, self.device)
        answer = checked_answer(
            self.teacher,
            batch,
            positions,
            kind=self.payloads[asked.payload],
            logits_backend=self._backend,
        ).narrowed(self.vocabulary_size)
        parts = divided(
            payload_of(answer, asked, positions.targets, self.vocabulary_size), questions
        )
        start = 0
        for part, question in zip(parts, questions, strict=True):
            part |= spot_check(answer, question, start)
            start += len(question.targets)
        return [{name: value.cpu() for name, value in part.items()} for part in parts]

    def _complete(self, order: CompletionOrder) -> Completions:
        return self.teacher.generate(
            self.tokenizer,
            order.prompt_ids.to(self.device),
            order.prompt_mask.to(self.device),
            order.options,
            seeds=order.seeds,
            width=order.width,
        )

    def _payloads(self) -> dict[Payload, Any]:
        """Return what can be answered, each with the kind that the teacher is asked for."""
        answers, found = self.teacher.answers, dict[Payload, Any]()
        if "full_distribution" in answers:
            found = {"top_k": "full_distribution", "token_log_probs": "full_distribution"}
            probe = self._probe()
            try:
                self.head, layout = head_of(probe)
                widths = [[*state.shape[1:], str(state.dtype)] for state in states_of(probe)]
                self._about_states = {"layout": layout, "widths": widths}
                found["hidden"] = "full_distribution"
            except ValueError as error:
                self._about_states = {"refused": str(error)}
        else:
            if "top_k_and_token" in answers:
                found["top_k"] = "top_k_and_token"
            if "token_log_probs" in answers:
                found["token_log_probs"] = "token_log_probs"
        if not found and not self.generates:
            raise ValueError(
                f"{type(self.teacher).__name__} answers {', '.join(sorted(answers)) or 'nothing'}; a "
                "server needs full_distribution, top_k_and_token, token_log_probs or generation"
            )
        return found

    @torch.no_grad()
    def _probe(self) -> FullDistribution:
        """Return the teacher's answer at one position."""
        ids = torch.full((1, 2), min(self.pad_id, self.vocabulary_size - 1))
        real, asked = torch.ones_like(ids), torch.tensor([[True, False]])
        batch, positions = _batch_of(Question(ids, real, asked, ids[0, :1], "hidden"), self.device)
        answer = checked_answer(
            self.teacher,
            batch,
            positions,
            kind="full_distribution",
            logits_backend=self._backend,
        ).narrowed(self.vocabulary_size)
        assert isinstance(answer, FullDistribution)  # its kind was checked
        return answer

    def _end_ids(self) -> list[int] | None:
        """Return the tokens that end completions; None where no model of this process writes them."""
        models = self.teacher.local_models.values()
        ends = [end_of_sequence_ids(model, self.tokenizer) for model in models]
        return sorted(set().union(*ends)) if ends else None

    def _longest(self, limits: Limits) -> int | None:
        """Return the longest row that is answered.

        Raises:
            ValueError: If the teacher does not read what the limits allow.
        """
        most = self.teacher.longest_row
        if most is not None and limits.length > most:
            raise ValueError(
                f"limits.length is {limits.length}, but the teacher reads {most} tokens at most; lower "
                "it, or leave it out"
            )
        return limits.length or most


def check_servable(teacher: Teacher) -> None:
    """Refuse a teacher that needs more than the tokens of a request.

    Raises:
        ValueError: If it does; it names what can be served.
    """
    reasons = {
        RoutedTeacher: "it chooses by a column of the data, and a request has tokens alone; serve each "
        "of its teachers by itself, and route among several ServedTeacher in the run",
        CachedTeacher: "it has the answers for rows of the data that it was written for, and a request "
        "has tokens alone; give CachedTeacher to the run itself, or serve the teacher it was written "
        "from",
    }
    for kind, reason in reasons.items():
        if isinstance(teacher, kind):
            raise ValueError(f"a {kind.__name__} cannot be served: {reason}")
    for member in getattr(teacher, "named_members", {}).values():
        check_servable(member)


def _generates(teacher: Teacher) -> bool:
    """Return whether a teacher, once prepared, completes prompts."""
    try:
        teacher.check_generation()
    except ValueError:  # such as one that is served elsewhere and does not
        return False
    return "generation" in teacher.answers


def _batch_of(question: Question, device: torch.device) -> tuple[Batch, ScoredPositions]:
    """Return a question as a micro-batch with its scored positions, on a device."""
    positions = question.positions
    following = positions.scattered(positions.targets).masked_fill(~question.mask, IGNORE_INDEX)
    labels = F.pad(following[:, :-1], (1, 0), value=IGNORE_INDEX)
    batch: Batch = {
        "input_ids": to_device(question.input_ids, device),
        "attention_mask": to_device(question.attention_mask, device),
        "labels": to_device(labels, device),
        "row": torch.arange(len(following), device=device),
    }
    return batch, positions.on(device)
