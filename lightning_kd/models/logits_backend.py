"""Logits backends: all logits at once, by the model, or a chunk at a time, by the fused loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.batch import Batch
from lightning_kd.divergences.log_space import weighted
from lightning_kd.fused import (
    ChunkedPass,
    LazyLogits,
    LogitsChunk,
    MaterializedLogits,
    TeacherAnswer,
    TokenTerm,
    per_token,
    weighted_sum,
)
from lightning_kd.fused.chunked_pass import Weights
from lightning_kd.fused.compile_choice import Compile
from lightning_kd.fused.logits_chunk import values_of
from lightning_kd.models.output_head import OutputHead, UnsupportedHeadError, find_head
from lightning_kd.option_checks import check_choice, check_whole
from lightning_kd.resuming import Resumable
from lightning_kd.scoring import ScoredPositions


class LogitsBackend(Resumable, ABC):
    """Runs models, and evaluates token terms at scored positions."""

    @abstractmethod
    def read(self, model: PreTrainedModel, batch: Batch, scored: ScoredPositions) -> LazyLogits:
        """Run a model on a batch."""

    @abstractmethod
    def evaluate(
        self,
        student: LazyLogits,
        teacher: TeacherAnswer | None,
        token_terms: Sequence[TokenTerm],
        weights: Weights,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of all values, ``()``, and the values, ``(terms, N)``.

        Gradients flow from the sum alone. A weight of None leaves a quantity out of it.
        """

    @abstractmethod
    def per_token(
        self, student: LazyLogits, teacher: TeacherAnswer | None, token_terms: Sequence[TokenTerm]
    ) -> Tensor:
        """Return values with gradients, for terms that are made of them: ``(terms, N)``.

        A pass of its own over the logits, which :meth:`evaluate` does not share.
        """

    def plan(self, logits: float) -> None:
        """Hear, once a run has trained on a micro-batch, how many logits of the student it evaluates.

        Args:
            logits: In all its steps, as far as the first micro-batch tells; 0 if nobody knows.
        """


class DenseLogits(LogitsBackend):
    """Backend with all logits at once and automatic differentiation: the readable reference.

    Needs memory for several ``(positions, vocabulary)`` tensors. In bfloat16 the model has rounded
    its logits before they are compared, which costs most of a small divergence.
    """

    def read(self, model: PreTrainedModel, batch: Batch, scored: ScoredPositions) -> LazyLogits:
        """Run a model and keep its logits."""
        return MaterializedLogits(scored.select(_forward(model, batch)))

    def evaluate(
        self,
        student: LazyLogits,
        teacher: TeacherAnswer | None,
        token_terms: Sequence[TokenTerm],
        weights: Weights,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate all positions as one chunk."""
        assert isinstance(student, MaterializedLogits)  # read() made it
        chunk = _chunk(student, teacher, token_terms)
        # An empty sum keeps a graph where nothing has a weight, or nothing is scored.
        total = student.logits[:0].sum(dtype=torch.float64)
        values = []
        for token_term, weight in zip(token_terms, weights, strict=True):
            here = chunk if weight is None else chunk.without_gradient_where(weight)
            value = values_of(token_term, here)
            if weight is not None:
                total = total + weighted(weight, value).sum(dtype=torch.float64)
            values.append(value.detach())
        return total, torch.stack(values) if values else student.logits.new_empty(
            0, student.shape[0]
        )

    def per_token(
        self, student: LazyLogits, teacher: TeacherAnswer | None, token_terms: Sequence[TokenTerm]
    ) -> Tensor:
        """Return values of all positions as one chunk, differentiated automatically."""
        assert isinstance(student, MaterializedLogits)  # read() made it
        chunk = _chunk(student, teacher, token_terms)
        return torch.stack([values_of(token_term, chunk) for token_term in token_terms])


class FusedLogits(LogitsBackend):
    """Backend with a chunk of logits at a time, in float32 or wider, with closed-form gradients.

    Each model's output head is taken apart from it once, and compared with the model's own logits.
    A model with another kind of head falls back to :class:`DenseLogits`, with a warning.

    Args:
        chunk_megabytes: Logits of student and teacher that may be alive at once. Defaults to three
            quarters of what the gradient of the student's head takes in float32, and at least 64.
        compile: Whether ``torch.compile`` makes one piece of code of all terms of a pass. ``auto``
            does so on CUDA, and on a CPU in a run of 5e10 logits or more, and goes on without where
            it fails; ``always`` does so everywhere, and refuses where no code can be made. A term
            that cannot be traced is evaluated without, as a warning says.

    Raises:
        ValueError: If ``chunk_megabytes`` is no positive whole number, or ``compile`` is another word;
            later, if it is ``always`` where nothing can be compiled.
    """

    def __init__(
        self,
        chunk_megabytes: int | None = None,
        compile: Compile = "auto",  # noqa: A002  as in Lightning and PyTorch
    ) -> None:
        if chunk_megabytes is not None:
            otherwise = ", or None for three quarters of the head's gradient"
            check_whole("chunk_megabytes", chunk_megabytes, otherwise)
        check_choice("compile", compile, get_args(Compile))
        self.chunk_megabytes, self.compile = chunk_megabytes, compile
        self._heads: list[tuple[PreTrainedModel, OutputHead | None]] = []
        self._dense = DenseLogits()
        self._planned_logits = 0.0

    def plan(self, logits: float) -> None:
        """Remember it, for ``compile: auto`` on a CPU."""
        self._planned_logits = logits

    def read(self, model: PreTrainedModel, batch: Batch, scored: ScoredPositions) -> LazyLogits:
        """Run a model and keep its hidden states and output head."""
        head = self._head(model)
        if head is None:
            return self._dense.read(model, batch, scored)
        with head.bypassed() as seen:
            _forward(model, batch)
        return head.project(scored.pick(seen[0]))

    def evaluate(
        self,
        student: LazyLogits,
        teacher: TeacherAnswer | None,
        token_terms: Sequence[TokenTerm],
        weights: Weights,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate in one pass over the chunks."""
        if isinstance(student, MaterializedLogits):
            return self._dense.evaluate(student, teacher, token_terms, weights)
        return weighted_sum(self._pass(student, teacher, token_terms), weights)

    def per_token(
        self, student: LazyLogits, teacher: TeacherAnswer | None, token_terms: Sequence[TokenTerm]
    ) -> Tensor:
        """Return values from one pass over the chunks; the backward pass is a second one."""
        if isinstance(student, MaterializedLogits):
            return self._dense.per_token(student, teacher, token_terms)
        return per_token(self._pass(student, teacher, token_terms))

    def _pass(
        self, student: LazyLogits, teacher: TeacherAnswer | None, token_terms: Sequence[TokenTerm]
    ) -> ChunkedPass:
        return ChunkedPass(
            student, teacher, token_terms, self.chunk_bytes, self.compile, self._planned_logits
        )

    @property
    def chunk_bytes(self) -> int | None:
        """The limit in bytes; None for the default."""
        return None if self.chunk_megabytes is None else self.chunk_megabytes * 2**20

    def _head(self, model: PreTrainedModel) -> OutputHead | None:
        for known, found in self._heads:
            if known is model:
                return found
        head: OutputHead | None = None
        try:
            head = find_head(model)
        except UnsupportedHeadError as error:
            if self.compile == "always":
                raise ValueError(
                    "compile is always, and the fused evaluation is not used for "
                    f"{type(model).__name__}: {error}. Whole logits are not compiled; set it to auto"
                ) from error
            rank_zero_warn(
                f"the fused evaluation is not used for {type(model).__name__}: {error}. Its logits "
                "are made whole; model.logits_backend: DenseLogits says so without this warning"
            )
        self._heads.append((model, head))
        return head


def _forward(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return logits


def _chunk(
    student: MaterializedLogits, teacher: TeacherAnswer | None, token_terms: Sequence[TokenTerm]
) -> LogitsChunk:
    """Return one chunk of all positions."""
    rows, theirs = slice(0, student.shape[0]), None
    if teacher is not None and any(term.needs_teacher for term in token_terms):
        logits = [_materialize(source) for source in teacher.sources]
        theirs = teacher.rows(rows, logits, student.shape[1])
    return LogitsChunk(rows, student.logits, theirs)


def _materialize(source: LazyLogits) -> Tensor:
    if isinstance(source, MaterializedLogits):
        return source.logits
    out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    source.fill(slice(0, source.shape[0]), out)
    return out
