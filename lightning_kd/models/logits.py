"""How logits come about: whole, by the model, or a chunk at a time, by the fused evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.divergences.log_space import weighted
from lightning_kd.evaluation import (
    CHUNK_BYTES,
    Block,
    GivenLogits,
    LogitSource,
    Quantity,
    Sweep,
    TeacherLogits,
    weighted_sum,
)
from lightning_kd.evaluation.chunks import Weights
from lightning_kd.models.output_head import OutputHead, UnsupportedHeadError, find_head
from lightning_kd.scoring import ScoredPositions
from lightning_kd.types import Batch


class Logits(ABC):
    """Reads models at scored positions, and evaluates quantities there."""

    @abstractmethod
    def read(self, model: PreTrainedModel, batch: Batch, scored: ScoredPositions) -> LogitSource:
        """Run a model on a batch."""

    @abstractmethod
    def evaluate(
        self,
        student: LogitSource,
        teacher: TeacherLogits | None,
        quantities: Sequence[Quantity],
        weights: Weights,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of all values, ``()``, and the values, ``(quantities, N)``.

        Gradients flow from the sum alone. A weight of None leaves a quantity out of it.
        """


class DenseLogits(Logits):
    """All logits of all positions at once, and automatic differentiation: the readable reference.

    Needs memory for several ``(positions, vocabulary)`` tensors. In bfloat16 the model has rounded
    its logits before they are compared, which costs most of a small divergence.
    """

    def read(self, model: PreTrainedModel, batch: Batch, scored: ScoredPositions) -> LogitSource:
        """The model's own logits."""
        return GivenLogits(scored.select(_forward(model, batch)))

    def evaluate(
        self,
        student: LogitSource,
        teacher: TeacherLogits | None,
        quantities: Sequence[Quantity],
        weights: Weights,
    ) -> tuple[Tensor, Tensor]:
        """One block of all positions."""
        assert isinstance(student, GivenLogits)  # read() made it
        rows = slice(0, student.shape[0])
        theirs = tuple(_whole(source) for source in teacher.sources) if teacher else ()
        block = Block(rows, student.logits, theirs, teacher.combine if teacher else None)
        # An empty sum keeps a graph where nothing has a weight, or nothing is scored.
        total = student.logits[:0].sum(dtype=torch.float64)
        values = []
        for quantity, weight in zip(quantities, weights, strict=True):
            value = quantity.values(
                block if weight is None else block.without_gradient_where(weight)
            )
            if weight is not None:
                total = total + weighted(weight, value).sum(dtype=torch.float64)
            values.append(value.detach())
        return total, torch.stack(values)


class FusedLogits(Logits):
    """The logits of a chunk of positions at a time, in float32 or wider, with their gradients.

    Each model's output head is taken apart from it once, and compared with the model's own logits.
    A model whose head is not understood is read as :class:`DenseLogits` does, with a warning.

    Args:
        chunk_megabytes: Logits of student and teacher that may be alive at once.

    Raises:
        ValueError: If ``chunk_megabytes`` is not positive.
    """

    def __init__(self, chunk_megabytes: int = CHUNK_BYTES // 2**20) -> None:
        if chunk_megabytes < 1:
            raise ValueError(f"chunk_megabytes is {chunk_megabytes}; it must be positive")
        self.chunk_megabytes = chunk_megabytes
        self._heads: list[tuple[PreTrainedModel, OutputHead | None]] = []
        self._dense = DenseLogits()

    def read(self, model: PreTrainedModel, batch: Batch, scored: ScoredPositions) -> LogitSource:
        """The model's hidden states, and its head."""
        head = self._head(model)
        if head is None:
            return self._dense.read(model, batch, scored)
        with head.bypassed() as seen:
            _forward(model, batch)
        return head.project(seen[0][scored.mask])

    def evaluate(
        self,
        student: LogitSource,
        teacher: TeacherLogits | None,
        quantities: Sequence[Quantity],
        weights: Weights,
    ) -> tuple[Tensor, Tensor]:
        """One pass over the chunks."""
        if isinstance(student, GivenLogits):
            return self._dense.evaluate(student, teacher, quantities, weights)
        sweep = Sweep(student, teacher, quantities, self.chunk_megabytes * 2**20)
        return weighted_sum(sweep, weights)

    def _head(self, model: PreTrainedModel) -> OutputHead | None:
        for known, found in self._heads:
            if known is model:
                return found
        head: OutputHead | None = None
        try:
            head = find_head(model)
        except UnsupportedHeadError as error:
            rank_zero_warn(
                f"the fused evaluation is not used for {type(model).__name__}: {error}. Its logits "
                "are made whole; model.logits: DenseLogits says so without this warning"
            )
        self._heads.append((model, head))
        return head


def _forward(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return logits


def _whole(source: LogitSource) -> Tensor:
    if isinstance(source, GivenLogits):
        return source.logits
    out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    source.fill(slice(0, source.shape[0]), out)
    return out
