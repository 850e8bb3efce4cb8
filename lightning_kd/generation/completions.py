"""Masks and texts of what a model wrote."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completions:
    """What a model wrote after each prompt, padded on the right."""

    ids: Tensor
    """Tokens, ``(B, R)``."""
    mask: Tensor
    """True up to and including the first EOS, ``(B, R)``."""
    log_probs: Tensor
    """Log-probability of each token under its writer (of a mixture: the student) at the sampling
    temperature, before top-k and top-p, ``(B, R)``; 0 outside the mask. Greedy: at temperature 1."""
    sampling_log_probs: Tensor
    """The same under what it was drawn from: other numbers only where two models were mixed."""
    ended: Tensor
    """True where the completion ends with an EOS, ``(B,)``; the others were cut at their longest."""

    def rows(self, chosen: slice) -> "Completions":
        """The completions of some rows."""
        return Completions(*(getattr(self, f.name)[chosen] for f in fields(self)))

    @classmethod
    def join(cls, parts: Sequence["Completions"], pad_id: int) -> "Completions":
        """Completions of several batches as those of one."""
        longest = max(part.ids.shape[1] for part in parts)

        def column(name: str) -> Tensor:
            values = [getattr(part, name) for part in parts]
            fill = pad_id if name == "ids" else 0
            if values[0].ndim > 1:
                values = [F.pad(v, (0, longest - v.shape[1]), value=fill) for v in values]
            return torch.cat(values)

        return cls(*(column(f.name) for f in fields(cls)))

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The completions as text, without special tokens."""
        return [
            tokenizer.decode(ids[mask], skip_special_tokens=True)
            for ids, mask in zip(self.ids.cpu(), self.mask.cpu(), strict=True)
        ]


def completion_mask(completion_ids: Tensor, eos_ids: Collection[int]) -> Tensor:
    """True up to and including the first EOS of each row, ``(B, R) -> (B, R)``.

    It is computed from where the EOS stands, never from ``ids != pad``: for many tokenizers the two
    are the same token, and the EOS belongs to what the model wrote.

    Example:
        >>> completion_mask(torch.tensor([[5, 2, 2], [2, 2, 2], [5, 6, 7]]), {2}).int()
        tensor([[1, 1, 0],
                [1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    is_eos = is_end(completion_ids, eos_ids)
    ended_before = is_eos.cumsum(-1) - is_eos.long()
    return ended_before == 0


def is_end(ids: Tensor, eos_ids: Collection[int]) -> Tensor:
    """True where a token ends its completion."""
    return torch.isin(ids, torch.tensor(sorted(eos_ids), device=ids.device))
