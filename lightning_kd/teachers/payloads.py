"""What a cache keeps of a teacher's answers, and the answers that are made of it again."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from inspect import signature
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_kd.fused import (
    AnswerKind,
    FullDistribution,
    SampledTokens,
    TeacherAnswer,
    TopK,
    TopKAndToken,
)
from lightning_kd.fused.draws import sampled_of, tail_draws_of
from lightning_kd.fused.summaries import top_k_of
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.contract import Ability
from lightning_kd.teachers.head_states import answer_from, head_of, states_of

CacheKind = Literal["hidden", "top_k", "sampled"]
"""What a cache keeps at a position."""


class Payload(ABC):
    """A way to keep answers: planes of numbers at each position, and tensors that all share."""

    kind: ClassVar[CacheKind]

    asks: ClassVar[AnswerKind] = "full_distribution"
    """Kind of answer that it keeps."""

    @property
    @abstractmethod
    def answers(self) -> frozenset[Ability]:
        """Kinds of answers that can be made of it."""

    @property
    def temperatures(self) -> frozenset[float] | None:
        """Temperatures that these answers hold at; None for any."""
        return None

    @abstractmethod
    def planes_of(
        self, answer: TeacherAnswer, positions: ScoredPositions, width: int, seed: int
    ) -> dict[str, Tensor]:
        """Return the numbers to keep, ``(N, ...)`` each.

        Args:
            answer: The teacher's, of the kind :attr:`asks`.
            positions: Those that it is about.
            width: The teacher's vocabulary; few tokens are told of it alone.
            seed: Of what is drawn.

        Raises:
            ValueError: If the answer does not tell them.
        """

    def shared_of(self, answer: TeacherAnswer) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors that are kept once, and how they are put together, as JSON has it."""
        return {}, {}

    @abstractmethod
    def answer(
        self,
        planes: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        layout: Mapping[str, Any],
        kind: AnswerKind,
    ) -> TeacherAnswer:
        """Return an answer of one of the kinds of :attr:`answers`."""

    def settings(self) -> dict[str, Any]:
        """Return the options, as JSON has them."""
        return {}


class HiddenStates(Payload):
    """The hidden states before the output head, and the head once: exact, and H numbers a position."""

    kind = "hidden"

    @property
    def answers(self) -> frozenset[Ability]:
        """The full distribution, at any temperature."""
        return frozenset({"full_distribution"})

    def planes_of(
        self, answer: TeacherAnswer, positions: ScoredPositions, width: int, seed: int
    ) -> dict[str, Tensor]:
        """Return the hidden states of each matrix product of each model."""
        assert isinstance(answer, FullDistribution)  # it was asked for
        return {f"states.{place}": states for place, states in enumerate(states_of(answer))}

    def shared_of(self, answer: TeacherAnswer) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the heads."""
        assert isinstance(answer, FullDistribution)  # it was asked for
        return head_of(answer)

    def answer(
        self,
        planes: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        layout: Mapping[str, Any],
        kind: AnswerKind,
    ) -> FullDistribution:
        """Put states and heads together."""
        states = [planes[f"states.{place}"] for place in range(len(planes))]
        return answer_from(states, shared, dict(layout))


class TopTokens(Payload):
    """The k most likely tokens, the tail at some temperatures, and the label's log-probability.

    Args:
        k: Tokens at a position.
        temperatures: Those at which the tail's probability is kept; 1 is always among them.

    Raises:
        ValueError: If a value is out of its range.
    """

    kind = "top_k"

    def __init__(self, k: int = 64, temperatures: Sequence[float] = (1.0,)) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; it must be 1 or more tokens at each position")
        if not all(isfinite(t) and t > 0 for t in temperatures):
            raise ValueError(f"temperatures are {list(temperatures)}; they must be positive")
        self.k = k
        self._tails = {f"tail.{number}": t for number, t in enumerate(sorted({1.0, *temperatures}))}

    @property
    def answers(self) -> frozenset[Ability]:
        """The k tokens and a tail, and the label beside them."""
        return frozenset({"top_k", "top_k_and_token"})

    @property
    def temperatures(self) -> frozenset[float]:
        """Those of the tails."""
        return frozenset(self._tails.values())

    def planes_of(
        self, answer: TeacherAnswer, positions: ScoredPositions, width: int, seed: int
    ) -> dict[str, Tensor]:
        """Return tokens, log-probabilities and tails."""
        answer = answer.narrowed(width)
        assert isinstance(answer, FullDistribution)  # it was asked for
        tails = tuple(self._tails.values())
        top = top_k_of(answer, positions.targets, self.k, temperatures=tails)
        return {
            "token_ids": top.token_ids.int(),
            "log_probs": top.log_probs,
            "label_log_probs": top.label_log_probs,
            # Where k is the vocabulary there is no tail.
            **{n: top.tail_log_probs[t] for n, t in self._tails.items() if t in top.tail_log_probs},
        }

    def answer(
        self,
        planes: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        layout: Mapping[str, Any],
        kind: AnswerKind,
    ) -> TopK:
        """Return the tokens, with the label's log-probability if it is asked for."""
        ids, log_probs = planes["token_ids"].long(), planes["log_probs"]
        tails = {t: planes[name] for name, t in self._tails.items() if name in planes}
        label = planes["label_log_probs"]
        kept = TopKAndToken(ids, log_probs, tails, label_log_probs=label)
        return kept if kind == "top_k_and_token" else kept.without_label()

    def settings(self) -> dict[str, Any]:
        """Return k and the temperatures."""
        return {"k": self.k, "temperatures": list(self._tails.values())}


class DrawnTokens(Payload):
    """Tokens drawn from the teacher's distribution, for the forward KL and nothing else.

    Args:
        draws: Tokens at a position.
        k: The most likely tokens that are named beside them; the draws are then from the others.

    Raises:
        ValueError: If a value is out of its range.
    """

    kind = "sampled"

    def __init__(self, draws: int = 64, k: int = 0) -> None:
        if draws < 1 or k < 0:
            raise ValueError(f"draws is {draws} and k {k}; they must be at least 1 and 0")
        self.draws, self.k = draws, k

    @property
    def answers(self) -> frozenset[Ability]:
        """Drawn tokens."""
        return frozenset({"sampled"})

    @property
    def temperatures(self) -> frozenset[float]:
        """1 alone."""
        return frozenset({1.0})

    def planes_of(
        self, answer: TeacherAnswer, positions: ScoredPositions, width: int, seed: int
    ) -> dict[str, Tensor]:
        """Return the tokens, their weights and the entropies."""
        answer = answer.narrowed(width)
        assert isinstance(answer, FullDistribution)  # it was asked for
        generator = torch.Generator(answer.logits[0].device).manual_seed(seed)
        if self.k:
            top = top_k_of(answer, positions.targets, self.k)
            drawn = tail_draws_of(answer, top, self.draws, generator)
        else:
            drawn = sampled_of(answer, self.draws, generator)
        return {
            "token_ids": drawn.token_ids.int(),
            "weights": drawn.weights,
            "entropies": drawn.entropies,
        }

    def answer(
        self,
        planes: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        layout: Mapping[str, Any],
        kind: AnswerKind,
    ) -> SampledTokens:
        """Return the tokens."""
        return SampledTokens(planes["token_ids"].long(), planes["weights"], planes["entropies"])

    def settings(self) -> dict[str, Any]:
        """Return the numbers of tokens."""
        return {"draws": self.draws, "k": self.k}


_PAYLOADS: Mapping[str, type[Payload]] = {
    payload.kind: payload for payload in (HiddenStates, TopTokens, DrawnTokens)
}


def make_payload(kind: str, settings: Mapping[str, Any]) -> Payload:
    """Return the payload of a kind.

    Args:
        kind: Its name.
        settings: Its options; those that it has not are refused.

    Raises:
        ValueError: If kind or options are unknown, or a value is out of its range.
    """
    if kind not in _PAYLOADS:
        raise ValueError(f"unknown kind of cache {kind!r}; choose one of {', '.join(_PAYLOADS)}")
    own = signature(_PAYLOADS[kind]).parameters if "__init__" in vars(_PAYLOADS[kind]) else {}
    for name in settings:
        if name not in own:
            raise ValueError(
                f"kind: {kind} has no option {name}; leave it out, or take another kind"
            )
    return _PAYLOADS[kind](**settings)
