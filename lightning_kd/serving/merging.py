"""Several questions as one, and one answer as several."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.wire import Question


def merged(questions: Sequence[Question], pad_id: int) -> Question:
    """Return one question about the rows of several, padded on the right to the longest.

    A single one is returned as it came, with the padding that it has.

    Example:
        >>> def about(ids):
        ...     ids = torch.tensor([ids])
        ...     real = torch.ones_like(ids)
        ...     return Question(ids, real, real.bool(), ids[0], "hidden")
        >>> merged([about([3, 4, 5]), about([6])], pad_id=0).input_ids
        tensor([[3, 4, 5],
                [6, 0, 0]])
    """
    if len(questions) == 1:
        return questions[0]
    length = max(question.input_ids.shape[1] for question in questions)

    def joined(name: str, fill: int) -> Tensor:
        parts = [getattr(question, name) for question in questions]
        return torch.cat([F.pad(p, (0, length - p.shape[1]), value=fill) for p in parts])

    return replace(
        questions[0],
        input_ids=joined("input_ids", pad_id),
        attention_mask=joined("attention_mask", 0),
        mask=joined("mask", False),
        targets=torch.cat([question.targets for question in questions]),
    )


def divided(
    tensors: Mapping[str, Tensor], questions: Sequence[Question]
) -> list[dict[str, Tensor]]:
    """Return the share of each question, of tensors over all of their positions."""
    sizes = [len(question.targets) for question in questions]
    parts = {name: torch.split(tensor, sizes) for name, tensor in tensors.items()}
    return [{name: part[n] for name, part in parts.items()} for n in range(len(questions))]
