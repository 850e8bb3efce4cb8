"""A causal language model that reads its prompts once and then one token at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.generation.cache import can_drop_rows, masks_unseen, preallocated
from lightning_kd.generation.token_positions import (
    accepted_arguments,
    check_padded_scores,
    check_padding,
    check_steps,
    check_virtual_tokens,
    no_cache,
)
from lightning_kd.models.modes import evaluating

__all__ = ["Decoder", "evaluating", "tokens_between_looks"]

_BETWEEN_LOOKS = {"cpu": 1}
_BETWEEN_LOOKS_OF_OTHERS = 8


def tokens_between_looks(device: torch.device) -> int:
    """Return how many tokens of each row are generated before the host looks which rows have ended.

    A look waits until a GPU has done all that it was given, which then idles until it is given more. On
    a CPU there is nothing to wait for, and rows that have ended cost nothing more.
    """
    return _BETWEEN_LOOKS.get(device.type, _BETWEEN_LOOKS_OF_OTHERS)


class Decoder:
    """A model and its key-value cache, for one batch of prompts.

    Args:
        model: Any causal language model of transformers with a key-value cache.
        prompt_ids: Prompts padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.

    Raises:
        ValueError: If the model keeps no cache, adapters put tokens in front of its own, or prompts are
            padded and it takes padding for tokens.
    """

    def __init__(self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        check_steps(model)
        check_virtual_tokens(model)
        self.model = model
        self._accepted = accepted_arguments(model)
        self._cache: Any = None
        # Without padding there is nothing to mask, and the attention kernel need not look.
        self._mask = None if bool(prompt_mask.all()) else prompt_mask
        self._position = prompt_mask.sum(-1, keepdim=True)
        first = (prompt_mask.cumsum(-1) - 1).clamp(min=0)
        self.logits = self._forward(prompt_ids, first)
        """Scores of the next token, ``(rows, V)``, float32 or wider."""
        if self._mask is not None:
            check_padding(model)
            check_padded_scores(model, self.logits)
        self._make_room()

    def append(self, tokens: Tensor) -> None:
        """Read one more token of each row, ``(rows,)``."""
        if self._mask is not None:
            self._mask = F.pad(self._mask, (0, 1), value=1)
        self.logits = self._forward(tokens[:, None], self._position)
        self._position = self._position + 1

    @property
    def can_drop_rows(self) -> bool:
        """Whether rows can be removed from the cache."""
        return can_drop_rows(self._cache)

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only."""
        self._cache.batch_select_indices(rows)
        self._position = self._position[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]

    def _make_room(self) -> None:
        """Make room in the cache for tokens behind the prompts."""
        self._cache = preallocated(self._cache)
        if self._mask is not None and tokens_between_looks(self.logits.device) > 1:
            masks_unseen(self._cache)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        options = {"position_ids": positions, "logits_to_keep": 1}
        output = self.model(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in options.items() if name in self._accepted},
        )
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise no_cache(self.model)
        logits: Tensor = output.logits[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float()
