"""Masks and texts of what a model wrote."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completions:
    """What a model wrote after each prompt, padded on the right."""

    ids: Tensor
    """Sampled tokens, ``(B, R)``."""
    mask: Tensor
    """True up to and including the first EOS, ``(B, R)``."""

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
    is_eos = torch.isin(completion_ids, torch.tensor(sorted(eos_ids), device=completion_ids.device))
    ended_before = is_eos.cumsum(-1) - is_eos.long()
    return ended_before == 0
