"""Answers of a teacher that name some tokens at each position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.fused.answers import (
    SURPLUS,
    AnswerKind,
    TeacherAnswer,
    check_log_probs,
    check_shape,
    rounding,
)
from lightning_kd.fused.sparse_rows import SampledRows, TopKRows
from lightning_kd.fused.tail_bounds import check_tails


def check_token_ids(kind: str, token_ids: Tensor) -> None:
    """Refuse ids that no row of logits can be indexed with.

    Raises:
        ValueError: If they are not int64 or int32.
    """
    if token_ids.dtype not in {torch.int64, torch.int32}:
        raise ValueError(f"the token_ids of the teacher's {kind} are {token_ids.dtype}; give int64")


@dataclass(frozen=True)
class TopK(TeacherAnswer):
    r"""The k most likely tokens; the rest counts as one event, the tail.

    At a temperature :math:`\tau` a named token has :math:`p(v)^{1/\tau} / Z_\tau`, where
    :math:`Z_\tau` is a sum over all tokens. With the tail's probability at :math:`\tau`, which
    ``tail_log_probs`` declares, it is known: the k tokens have what the tail leaves of 1.

    At temperature 1 the tail has, unless it is declared, what the k tokens leave of 1, but no less
    than the dtype can tell from 0. The logarithm of a small tail is more exact when it is declared.

    Example:
        >>> from math import log
        >>> tokens, log_probs = torch.tensor([[5, 2]]), torch.tensor([[0.5, 0.25]]).log()
        >>> softened = {2.0: torch.tensor([log(0.4)])}
        >>> TopK(tokens, log_probs, softened).at(2.0, width=9).exp()
        tensor([[0.3515, 0.2485, 0.4000]])
    """

    kind: ClassVar[AnswerKind] = "top_k"
    token_ids: Tensor
    """``(N, k)``, different at each position."""
    log_probs: Tensor
    """Of these tokens at temperature 1, ``(N, k)``."""
    tail_log_probs: Mapping[float, Tensor] = field(default_factory=dict)
    """Log-probability of all other tokens together, ``(N,)``, at each declared temperature."""

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> TopKRows:
        """Return the k tokens, and a tail unless k is the whole vocabulary."""
        log_probs = self.log_probs[rows]
        if log_probs.shape[1] == width:
            return TopKRows(self.token_ids[rows], log_probs, None)
        tails = {temperature: tail[rows] for temperature, tail in self.tail_log_probs.items()}
        if 1.0 not in tails:
            left = 1 - log_probs.double().exp().sum(-1)
            tails[1.0] = left.clamp_min(torch.finfo(log_probs.dtype).eps).log()
        return TopKRows(self.token_ids[rows], log_probs, tails)

    def at(self, temperature: float, width: int) -> Tensor:
        """Return the log-probabilities of the tokens and the tail, ``(N, k + 1)``.

        Args:
            temperature: 1, or a declared one.
            width: Tokens of the vocabulary; if they are all named there is no tail, ``(N, k)``.

        Raises:
            ValueError: If the tail's probability at the temperature is not known.
        """
        return self.rows(slice(None), (), width).log_probs(temperature)

    def most_likely(self, k: int, width: int) -> Self:
        """Return the answer with the k most likely of its tokens; the others join the tail.

        Args:
            k: Tokens at each position.
            width: Tokens of the vocabulary.

        Raises:
            ValueError: If fewer tokens are named.
        """
        named = self.token_ids.shape[1]
        if k > named:
            raise ValueError(f"k is {k}; the teacher knows {named} tokens at each position")
        if k == named:
            return self
        best = self.log_probs.topk(k, -1)
        tails = {
            t: self.at(t, width).scatter(-1, best.indices, -torch.inf).logsumexp(-1)
            for t in {1.0, *self.tail_log_probs}
        }
        ids = self.token_ids.gather(-1, best.indices)
        return replace(self, token_ids=ids, log_probs=best.values, tail_log_probs=tails)

    def with_tail(self, width: int) -> Self:
        """Return the answer, normalized, with the tail's probability at temperature 1 declared."""
        events = self.at(1.0, width)
        if events.shape[1] == self.token_ids.shape[1]:
            return replace(self, log_probs=events)
        tails = {**self.tail_log_probs, 1.0: events[:, -1]}
        return replace(self, log_probs=events[:, :-1], tail_log_probs=tails)

    def check(self, positions: int, width: int) -> None:
        """Compare shapes, tokens and probabilities."""
        ids, log_probs = self.token_ids, self.log_probs
        tails = self.tail_log_probs
        lengths = [len(ids), len(log_probs), *(len(tail) for tail in tails.values())]
        check_shape(self.kind, lengths, positions)
        if ids.ndim != 2 or ids.shape != log_probs.shape or not 1 <= ids.shape[1] <= width:
            raise ValueError(
                f"the teacher's {self.kind} has token_ids {tuple(ids.shape)} and log_probs "
                f"{tuple(log_probs.shape)}; both must be (positions, k) with k from 1 to {width}"
            )
        check_token_ids(self.kind, ids)
        ranked = ids.sort(-1).values
        if not ((ids >= 0) & (ids < width)).all() or (ranked.diff(dim=-1) == 0).any():
            raise ValueError(
                f"the token_ids of the teacher's {self.kind} must be different at each position and "
                f"from 0 to {width - 1}"
            )
        check_log_probs(self.kind, log_probs)
        most, slack = log_probs.double().exp().sum(-1), SURPLUS + rounding(log_probs)
        if ids.shape[1] == width and (most < 1 - slack).any():
            raise ValueError(
                f"the teacher's {self.kind} has all {width} tokens, and their probabilities add up to "
                f"{most.min():.4f} at a position; they must be normalized, at temperature 1"
            )
        if (most > 1 + slack).any():
            raise ValueError(
                f"the probabilities of the teacher's {self.kind} add up to {most.max():.4f} at a "
                "position; they must be of the whole vocabulary at temperature 1, and 1 at most"
            )
        for temperature, tail in tails.items():
            if tail.ndim != 1 or not temperature > 0:
                raise ValueError(
                    f"the teacher's {self.kind} has a tail of shape {tuple(tail.shape)} at "
                    f"temperature {temperature}; give one log-probability for each position, "
                    "(positions,), at positive temperatures"
                )
            check_log_probs(self.kind, tail)
        if 1.0 in tails and ids.shape[1] < width:
            total = most + tails[1.0].double().exp()
            if ((total - 1).abs() > slack + rounding(tails[1.0][:, None])).any():
                worst = total[(total - 1).abs().argmax()]
                raise ValueError(
                    f"the probabilities of the teacher's {self.kind} and of its tail at temperature "
                    f"1 add up to {worst:.4f} at a position; they must add up to 1"
                )
        check_tails(self.kind, log_probs, tails, width)


@dataclass(frozen=True)
class TopKAndToken(TopK):
    """The k most likely tokens, the tail, and the token that each scored position predicts."""

    kind = "top_k_and_token"
    label_log_probs: Tensor = field(kw_only=True)
    """Of the token that follows each position, at temperature 1, ``(N,)``; 0 where there is none."""

    def label_log_probs_at(self, temperature: float, targets: Tensor, width: int) -> Tensor:
        r"""Return :math:`\log p^\tau(y_t)`, ``(N,)``; 0 where there is no token.

        Args:
            temperature: 1, or a declared one.
            targets: The tokens, ``(N,)``, with ``IGNORE_INDEX`` where there is none.
            width: Tokens of the vocabulary.

        Raises:
            ValueError: If the tail's probability at the temperature is not known.
        """
        if temperature == 1:
            tempered = self.label_log_probs
        else:
            # A named token's probability before and after tells the normalizer.
            after = self.at(temperature, width)[:, 0]
            normalizer = self.log_probs[:, 0].to(after.dtype) / temperature - after
            tempered = self.label_log_probs.to(after.dtype) / temperature - normalizer
        return tempered.masked_fill(targets == IGNORE_INDEX, 0.0)

    def without_label(self) -> TopK:
        """Return the k tokens and the tail."""
        return TopK(self.token_ids, self.log_probs, self.tail_log_probs)

    def check(self, positions: int, width: int) -> None:
        """Compare shapes, tokens and probabilities, also of the token that follows."""
        super().check(positions, width)
        check_shape(self.kind, [len(self.label_log_probs)], positions)
        if self.label_log_probs.ndim != 1:
            raise ValueError(
                f"the teacher's {self.kind} has label_log_probs of shape "
                f"{tuple(self.label_log_probs.shape)}; give one for each position, (positions,)"
            )
        check_log_probs(self.kind, self.label_log_probs)

    def check_targets(self, targets: Tensor, width: int) -> None:
        """Compare each target's probability with that of the same token, or with what is left."""
        known = targets != IGNORE_INDEX
        label, named = self.label_log_probs.double(), self.log_probs.double()
        own = (self.token_ids == targets[:, None]) & known[:, None]
        at_name = named.masked_fill(~own, -torch.inf).amax(-1)
        # None of the k most likely tokens is less likely than one that is not named.
        events = self.at(1.0, width).double()
        if 1.0 not in self.tail_log_probs and events.shape[1] > named.shape[1]:
            rounded = SURPLUS + rounding(self.log_probs)
            events[:, -1] = events[:, -1].exp().add(rounded).log()
        most = events.amin(-1)
        slack = SURPLUS + label.abs() * max(
            torch.finfo(given.dtype).eps for given in (self.label_log_probs, self.log_probs)
        )
        among = own.any(-1)
        apart = torch.where(among, (label - at_name).abs(), label - most)
        wrong = (known & (apart > slack)).nonzero()
        if len(wrong):
            place = int(wrong[0])
            expected = (
                f"the named tokens say {at_name[place]:.4f} of the same token"
                if among[place]
                else f"of a token that is not named it is {most[place]:.4f} at most, by the tail and "
                "the least likely named one"
            )
            raise ValueError(
                f"the teacher's {self.kind} has the label_log_probs {label[place]:.4f} for token "
                f"{int(targets[place])} at position {place}, but {expected}; give both of one "
                "distribution, at temperature 1"
            )


@dataclass(frozen=True)
class SampledTokens(TeacherAnswer):
    r"""Tokens drawn from the teacher's distribution, at temperature 1.

    They stand in for the distribution: the expectation over the draws of :math:`\sum_i w_i f(v_i)`
    is :math:`\sum_v p(v) f(v)` for every :math:`f`. So

    .. math:: \sum_i w_i\,(-\log q(v_i)) - H(p)

    is an unbiased estimate of the forward KL, and so is its gradient. It may be negative. No other
    divergence can be estimated like this.

    Of m independent draws from the whole distribution each weighs 1/m. Tokens that are always named,
    with their probability for weight, and m draws from the rest, with the rest's probability over m,
    vary less.

    References:
        Anshumann et al., *Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs*, ACL
        2025. https://arxiv.org/abs/2503.16870
    """

    kind = "sampled"
    token_ids: Tensor
    """``(N, m)``; a token may be there more than once."""
    weights: Tensor
    """Of these tokens, ``(N, m)``, 0 or more; they add up to 1 at each position."""
    entropies: Tensor
    """Of the teacher's distribution, in nats, ``(N,)``."""

    def rows(self, rows: slice, logits: Sequence[Tensor], width: int) -> SampledRows:
        """Return the drawn tokens."""
        return SampledRows(self.token_ids[rows], self.weights[rows], self.entropies[rows])

    def check(self, positions: int, width: int) -> None:
        """Compare shapes, tokens and weights."""
        ids, weights, entropies = self.token_ids, self.weights, self.entropies
        check_shape(self.kind, [len(ids), len(weights), len(entropies)], positions)
        if ids.ndim != 2 or ids.shape != weights.shape or ids.shape[1] < 1 or entropies.ndim != 1:
            raise ValueError(
                f"the teacher's {self.kind} has token_ids {tuple(ids.shape)}, weights "
                f"{tuple(weights.shape)} and entropies {tuple(entropies.shape)}; they must be "
                "(positions, m), (positions, m) and (positions,), with m at least 1"
            )
        check_token_ids(self.kind, ids)
        if not ((ids >= 0) & (ids < width)).all():
            raise ValueError(
                f"the token_ids of the teacher's {self.kind} must be from 0 to {width - 1}"
            )
        total = weights.double().sum(-1)
        if not ((weights >= 0).all() and ((total - 1).abs() <= SURPLUS).all()):
            raise ValueError(
                f"the weights of the teacher's {self.kind} must be 0 or more and add up to 1 at each "
                f"position; they are from {weights.min():.4f} on and add up to between "
                f"{total.min():.4f} and {total.max():.4f}"
            )
        if not (entropies.isfinite() & (entropies >= -SURPLUS)).all():
            raise ValueError(
                f"the entropies of the teacher's {self.kind} must be finite and 0 or more, in nats"
            )
