"""Masks and texts of what a model generated."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completions:
    """Completions of a batch of prompts, padded on the right."""

    ids: Tensor
    """Tokens, ``(B, R)``."""
    mask: Tensor
    """True up to and including the first EOS, ``(B, R)``."""
    log_probs: Tensor | None
    """Log-probability of each token under the generating model (of a mixture: the student) at the
    sampling temperature, before top-k and top-p, ``(B, R)``; 0 outside the mask. Greedy: at
    temperature 1. None where the engine gives none."""
    sampling_log_probs: Tensor | None
    """The same under the sampling distribution: other values only if two models were mixed."""
    ended: Tensor
    """True where the completion ends with an EOS, ``(B,)``; the others were truncated."""

    @classmethod
    def of_columns(
        cls,
        ids: Tensor,
        log_probs: Tensor,
        sampling_log_probs: Tensor,
        eos_ids: Collection[int],
    ) -> "Completions":
        """Return completions that go on to their first EOS, or else through all columns."""
        mask = completion_mask(ids, eos_ids)
        return cls(ids, mask, log_probs, sampling_log_probs, (is_end(ids, eos_ids) & mask).any(-1))

    def trimmed(self) -> "Completions":
        """Return the completions without columns in which all have ended."""
        longest = int(self.mask.sum(-1).max())
        values = [getattr(self, field.name) for field in fields(self)]
        short = (v if v is None or v.ndim == 1 else v[:, :longest] for v in values)
        return Completions(*short)

    def to(self, device: torch.device) -> "Completions":
        """Return the completions on a device; Lightning moves what ``predict`` returns with it."""
        values = [getattr(self, field.name) for field in fields(self)]
        return Completions(*(None if value is None else value.to(device) for value in values))  # type: ignore[arg-type]

    def rows(self, chosen: slice) -> "Completions":
        """Return the completions of some rows."""
        values = [getattr(self, field.name) for field in fields(self)]
        return Completions(*(None if value is None else value[chosen] for value in values))  # type: ignore[arg-type]

    @classmethod
    def of_tokens(
        cls,
        tokens: Sequence[Sequence[int]],
        *,
        eos_ids: Collection[int],
        pad_id: int,
        device: torch.device | None = None,
    ) -> "Completions":
        """Return completions without log-probabilities, from the tokens of each row.

        Example:
            >>> Completions.of_tokens([[5, 2], [6, 7, 8]], eos_ids={2}, pad_id=0).ended
            tensor([ True, False])
        """
        width = max(len(row) for row in tokens)
        rows = [[*row, *[pad_id] * (width - len(row))] for row in tokens]
        ids = torch.tensor(rows, dtype=torch.long, device=device)
        lengths = torch.tensor([len(row) for row in tokens], device=device)
        real = torch.arange(width, device=device) < lengths[:, None]
        mask = completion_mask(ids, eos_ids) & real
        return cls(ids, mask, None, None, (is_end(ids, eos_ids) & mask).any(-1))

    @classmethod
    def join(cls, parts: Sequence["Completions"], pad_id: int) -> "Completions":
        """Concatenate the completions of several batches."""
        longest = max(part.ids.shape[1] for part in parts)

        def column(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values):
                return None
            fill = pad_id if name == "ids" else 0
            if values[0].ndim > 1:
                values = [F.pad(v, (0, longest - v.shape[1]), value=fill) for v in values]
            return torch.cat(values)

        return cls(**{f.name: column(f.name) for f in fields(cls)})  # type: ignore[arg-type]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the completions as text, without special tokens."""
        return [
            tokenizer.decode(ids[mask], skip_special_tokens=True)
            for ids, mask in zip(self.ids.cpu(), self.mask.cpu(), strict=True)
        ]


def completion_mask(completion_ids: Tensor, eos_ids: Collection[int]) -> Tensor:
    """Return True up to and including the first EOS of each row, ``(B, R) -> (B, R)``.

    It is computed from where the EOS stands, never from ``ids != pad``: for many tokenizers the two
    are the same token, and the EOS belongs to what the model generated.

    Example:
        >>> completion_mask(torch.tensor([[5, 2, 2], [2, 2, 2], [5, 6, 7]]), {2}).int()
        tensor([[1, 1, 0],
                [1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    is_eos = is_end(completion_ids, eos_ids)
    ended_before = is_eos.cumsum(-1) - is_eos.long()
    return ended_before == 0


def is_end(ids: Tensor, eos_ids: Collection[int] | Tensor) -> Tensor:
    """Return True where a token ends its completion; ends in a tensor are copied to no device."""
    ends = eos_ids
    if not isinstance(ends, Tensor):
        ends = torch.tensor(sorted(ends), device=ids.device)
    # Not torch.isin, which sorts where there are many ends: the host then waits for the device.
    return (ids[..., None] == ends).any(-1)
