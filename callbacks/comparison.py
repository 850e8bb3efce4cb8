"""Distributions of student and teacher on the same text, whatever the method learns from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX, Batch
from lightning_kd.fused import (
    ChunkedPass,
    LazyLogits,
    TeacherAnswer,
    TokenTerm,
    evaluate_no_grad,
)
from lightning_kd.modules import TeacherModule
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import checked_answer


@dataclass(frozen=True)
class Compared:
    """Distributions of student and teacher over their shared tokens, at the labels of a batch."""

    positions: ScoredPositions
    student: LazyLogits
    teacher: TeacherAnswer

    def values(self, terms: Sequence[TokenTerm]) -> Tensor:
        """Evaluate terms, a chunk of logits at a time: ``(terms, N)``."""
        return evaluate_no_grad(ChunkedPass(self.student, self.teacher, terms))


@torch.no_grad()
def compared(module: TeacherModule, batch: Batch, chosen: Tensor) -> Compared:
    """Run student and teacher on a batch, for the labels of the chosen rows, ``(B,)``."""
    labels = batch["labels"].masked_fill(~chosen[:, None], IGNORE_INDEX)
    positions = ScoredPositions.from_labels(labels)
    answer = checked_answer(
        module.teacher,
        batch,
        positions,
        kind="full_distribution",
        logits_backend=module.logits_backend,
    )
    student = module.logits_backend.read(module.student, batch, positions)
    return Compared(positions, student.narrowed(module.width), answer.narrowed(module.width))
