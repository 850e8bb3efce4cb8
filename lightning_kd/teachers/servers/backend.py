"""The contract of what speaks to a kind of server."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_kd.fused import TeacherAnswer
from lightning_kd.wire import Question, Reply, Request
from lightning_kd.wire.messages import Payload

Ask = Callable[[Request], Reply]
"""Sends a request, and returns its reply or raises a ``WireError``."""


@dataclass(frozen=True)
class Description:
    """What a server says of its teacher.

    Attributes:
        fingerprint: Equal where answers are.
        payloads: What its answers can hold.
        vocabulary_size: Tokens of the teacher; None where the server does not say.
        length: Longest row; None where there is no limit, or it is not said.
        most_k: Most tokens of a ``top_k`` answer; None where it is not said.
        generates: Whether it completes prompts for this library.
        vocabulary: Digest of the tokens and their ids; None where it is not said.
        tolerance: Difference in nats between the log-probabilities of a row alone and in a batch that
            rounding explains.
    """

    fingerprint: str
    payloads: frozenset[Payload]
    vocabulary_size: int | None = None
    length: int | None = None
    most_k: int | None = None
    generates: bool = False
    vocabulary: str | None = None
    tolerance: float = 0.25


class Backend(ABC):
    """Speaks to one kind of server."""

    payloads: ClassVar[frozenset[Payload]]
    """What such a server can be asked for."""

    any_temperature: ClassVar[bool] = False
    """Whether the tail's mass can be had at other temperatures than 1."""

    adds_special_tokens: ClassVar[bool] = False
    """Whether :meth:`token_ids` has the special tokens that the tokenizer puts around a text."""

    repeats_exactly: ClassVar[bool] = False
    """Whether it gives the same answer to the same question, bit for bit."""

    lists_rows: ClassVar[bool] = False
    """Whether answers are lists over all tokens of a row, of which those that were asked for are taken.

    They tell of the row's own tokens alone, so labels must be these."""

    tokens_beside: ClassVar[int] = 0
    """Tokens that a row takes beside its own, of the length that the server reads."""

    probe: ClassVar[tuple[int, int]] = (1024, 256)
    """Tokens of the vocabulary in each text whose ids are compared, and the number of these texts."""

    def check_health(self, ask: Ask) -> None:
        """Ask whether the server is up.

        Raises:
            WireError: If it is not.
        """
        ask(Request("GET", "/health"))

    @abstractmethod
    def describe(self, ask: Ask) -> Description:
        """Ask what is served.

        Raises:
            WireError: If what came is no description.
        """

    @abstractmethod
    def token_ids(self, ask: Ask, text: str) -> list[int]:
        """Ask for the ids of a text.

        Raises:
            WireError: If what came is no list of ids.
        """

    def longest(self, question: Question) -> int:
        """Return the tokens of the longest row that is sent."""
        lengths = question.attention_mask.sum(-1)
        if self.lists_rows:  # one more behind the last, where it is asked about
            last = question.mask.gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0]
            lengths = lengths + last.long()
        return int(lengths.max())

    def vocabulary(self, ask: Ask) -> Mapping[str, int]:
        """Ask for the id of each token; written where descriptions have :attr:`vocabulary`.

        Raises:
            WireError: If what came are none.
        """
        raise NotImplementedError

    @abstractmethod
    def answer(self, ask: Ask, question: Question, device: torch.device) -> TeacherAnswer:
        """Ask a question.

        Args:
            ask: Sends a request.
            question: The question.
            device: Of the answer.

        Raises:
            WireError: If what came is no answer to it.
        """
