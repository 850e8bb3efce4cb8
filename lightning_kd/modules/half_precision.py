"""Sums of losses in the range of fp16."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_kd.checkpoints import RUN_KEY
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import StudentLike
from lightning_kd.modules.student_module import StudentModule
from lightning_kd.normalization import Normalization
from lightning_kd.scoring import ScoredPositions
from lightning_kd.tokenization import TokenizerLike

_LONG = 1024
"""Tokens of a long row, where the data does not say how long a row may be."""


class SumScale:
    r"""A power of two that makes an undivided sum as small as a mean, while it is in fp16.

    A loss is divided by its count after the backward pass. In fp16 the gradients of a sum, times the
    65,536 that a gradient scaler begins with, overflow where those of a mean over tokens do not, and
    the scaler would skip the first dozen steps. So the sum is multiplied by :math:`2^{-k}` before
    the backward pass and its gradients by :math:`2^k` after it. :math:`2^k` is at least the total
    weight of the tokens of a micro-batch: the largest mean over the micro-batches of a step so far,
    and that of this step's first micro-batch on any rank. In the first step, where others follow that
    may be longer, it is that of a micro-batch whose rows are all as long as they may be. It is one
    number for a whole step, on all ranks. In any other precision :math:`k` is 0; there it would
    change nothing, being exact.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        """The largest mean weight of a step's micro-batches so far; it goes into checkpoints."""
        self._exponent = 0
        self._weight: Tensor | None = None

    def sum_factor(
        self, trainer: L.Trainer, scored: ScoredPositions, normalization: Normalization
    ) -> float:
        """Return the factor of a micro-batch's sum; called on all ranks together."""
        if not _in_fp16(trainer):
            return 1.0
        own = _weight(scored.tokens_per_row, normalization)
        if self._weight is None:
            self._begin_step(trainer, scored, normalization, own)
        self._weight = own if self._weight is None else self._weight + own
        return 2.0**-self._exponent

    def _begin_step(
        self, trainer: L.Trainer, scored: ScoredPositions, normalization: Normalization, own: Tensor
    ) -> None:
        expected = own
        if self.largest == 0 and trainer.accumulate_grad_batches > 1:
            # The first micro-batch may be the shortest: a large guess costs bits of one step only.
            rows, columns = scored.mask.shape
            data = getattr(trainer, "datamodule", None)
            longest = max(columns, getattr(data, "max_length", None) or _LONG)
            lengths = torch.full((rows,), longest, device=scored.mask.device)
            expected = _weight(lengths, normalization)
        first = trainer.strategy.reduce(expected, reduce_op="max").item()
        self._exponent = max(0, math.ceil(math.log2(max(1.0, self.largest, first))))

    def gradient_factor(self, trainer: L.Trainer, micro_batches: int) -> float:
        """Return the factor of the gradients of a step of so many micro-batches."""
        if self._weight is None:
            return 1.0
        weight = trainer.strategy.reduce(self._weight, reduce_op="sum").item() / micro_batches
        self.largest, self._weight = max(self.largest, weight), None
        return 2.0**self._exponent


class ScaledSumModule(StudentModule):
    """A student whose :class:`SumScale` goes into its checkpoints.

    The options are those of :class:`~lightning_kd.modules.student_module.StudentModule`.
    """

    def __init__(
        self,
        *,
        student: StudentLike,
        tokenizer: TokenizerLike | None = None,
        generation: GenerationOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(
            student=student,
            tokenizer=tokenizer,
            generation=generation,
            engine=engine,
        )
        self._sum_scale = SumScale()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how large the sums have been."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[RUN_KEY]["largest_weight"] = self._sum_scale.largest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore how large the sums have been; older checkpoints do not have it."""
        super().on_load_checkpoint(checkpoint)
        self._sum_scale.largest = checkpoint[RUN_KEY].get("largest_weight", 0.0)


def _weight(lengths: Tensor, normalization: Normalization) -> Tensor:
    return (normalization.row_weights(lengths) * lengths).sum()


def _in_fp16(trainer: L.Trainer) -> bool:
    precision = str(trainer.precision_plugin.precision)
    return precision.startswith("16") or precision == "transformer-engine-float16"
