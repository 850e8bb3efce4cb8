"""From examples to a padded batch."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from lightning_kd.batch import FILLER_ROW, IGNORE_INDEX, Batch, PromptBatch, pad_rows
from lightning_kd.data.encoding import Example
from lightning_kd.teacher_rows import teacher_rows


class Collator:
    """Pad examples: completions on the right, prompts on the left.

    Masks and labels come from lengths, never from ``ids != pad``, so that the EOS is trained on also
    where it is the padding.

    Args:
        pad_id: Fills up the rows.

    Example:
        >>> batch = Collator(0)([(0, 3, Example([5, 6, 7], 2, "x", "y")), (1, 4, Example([8]))])
        >>> batch["labels"].tolist(), batch["attention_mask"].tolist()
        ([[-100, -100, 7], [8, -100, -100]], [[1, 1, 1], [1, 0, 0]])
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[tuple[int, int, Example]]) -> Batch:
        """Return one batch of (sample number, row number, example)."""
        samples, numbers, examples = zip(*rows, strict=True)
        ids = [example.input_ids for example in examples]
        batch: Batch = {
            "input_ids": pad_rows(ids, self.pad_id),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
            "labels": pad_rows(list(map(_labels, numbers, examples)), IGNORE_INDEX),
            "row": torch.tensor(numbers),
            "sample": torch.tensor(samples),
        }
        if any(example.tokenized_apart for example in examples):
            batch["tokenized_apart"] = torch.tensor([e.tokenized_apart for e in examples])
        if examples[0].document is not None:
            batch["document"] = torch.tensor([example.document for example in examples])
        has_prompts = all(example.prompt is not None for example in examples)
        if has_prompts or examples[0].extra:
            batch["extra"] = {
                name: [example.extra[name] for example in examples] for name in examples[0].extra
            }
        return self._with_prompts(batch, examples) if has_prompts else batch

    def _with_prompts(self, batch: Batch, examples: Sequence[Example]) -> PromptBatch:
        prompts = [example.input_ids[: example.prompt_length] for example in examples]
        found: dict[str, Any] = {
            **batch,
            "prompt_ids": pad_rows(prompts, self.pad_id, left=True),
            "prompt_mask": pad_rows([[1] * len(row) for row in prompts], 0, left=True),
            "prompt": [example.prompt or "" for example in examples],
            "completion": [example.completion for example in examples],
        }
        if any(example.references is not None for example in examples):
            found["references"] = [
                [example.completion] if example.references is None else list(example.references)
                for example in examples
            ]
        told = [e.teacher_prompt for e in examples if e.teacher_prompt is not None]
        if told:
            completions = [e.input_ids[e.prompt_length :] for e in examples]
            found["teacher"] = teacher_rows(told, completions, self.pad_id)
        return cast(PromptBatch, found)


def _labels(number: int, example: Example) -> list[int]:
    ids, prompt_length = example.input_ids, example.prompt_length
    if number == FILLER_ROW:
        return [IGNORE_INDEX] * len(ids)
    if not example.trained:
        return [IGNORE_INDEX] * prompt_length + ids[prompt_length:]
    pairs = zip(ids, example.trained, strict=True)
    return [token if trained else IGNORE_INDEX for token, trained in pairs]
