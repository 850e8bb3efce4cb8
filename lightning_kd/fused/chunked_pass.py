"""Values and gradients of token terms, over a chunk of positions at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from lightning_kd.devices import is_queued
from lightning_kd.fused.answers import TeacherAnswer
from lightning_kd.fused.compilation import CompiledTerms
from lightning_kd.fused.compile_choice import Compile
from lightning_kd.fused.lazy_logits import LazyHeadLogits, LazyLogits
from lightning_kd.fused.logits_chunk import LogitsChunk, TokenTerm, checked, values_of

CHUNK_BYTES = 64 * 2**20
"""Logits that are alive at once, of student and teacher together, beside a small head."""

_CACHE_BYTES = 2 * 2**20
"""Logits that one pass of arithmetic goes over: what stays in a processor's cache."""

Weights = Sequence[Tensor | None]
"""For each quantity, what its value at each position weighs in the loss, ``(N,)``; None where it is
only looked at."""


@dataclass(frozen=True)
class ChunkedPass:
    """One pass over all positions: which logits, and what is computed from them."""

    student: LazyLogits | None
    teacher: TeacherAnswer | None
    token_terms: Sequence[TokenTerm]
    chunk_bytes: int | None = None
    """Logits that may be alive at once; :func:`~lightning_kd.fused.chunked_pass.default_chunk_bytes`
    says how many by default."""
    compile: Compile = "never"
    planned_logits: float = 0.0
    """How many the run is going to evaluate, where that decides whether to compile."""

    def values(self) -> Tensor:
        """Every quantity at every position, ``(quantities, N)``."""
        return self._run([None] * len(self.token_terms), ())

    def values_and_gradients(
        self, weights: Weights, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The values, and the gradients of their weighted sum.

        Args:
            weights: What each value weighs.
            wanted: Which of the student's ``inputs`` get a gradient.

        Returns:
            ``(quantities, N)``, and for each wanted input a float32 (or wider) gradient.
        """
        student = self.student
        assert isinstance(student, LazyHeadLogits)  # given logits are differentiated as they are
        into = [
            torch.zeros_like(tensor, dtype=student.dtype) if want else None
            for tensor, want in zip(student.inputs, wanted, strict=True)
        ]
        return self._run(weights, into), into

    def _run(self, weights: Weights, into: Sequence[Tensor | None]) -> Tensor:
        count, width = self._first.shape
        student = self.student
        asked = any(token_term.needs_teacher for token_term in self.token_terms)
        teacher = self.teacher if asked else None
        teachers = teacher.sources if teacher is not None else ()
        dtype, device = self._first.dtype, self.device
        values = torch.empty(len(self.token_terms), count, dtype=dtype, device=device)
        if not self.token_terms:
            return values
        size = self._chunk_size(1 + len(teachers), into)
        # Allocated once: a fresh buffer for each chunk would cost a page fault for each 4 KiB.
        own = torch.empty(size, width if student else 0, dtype=dtype, device=device)
        theirs = [
            torch.empty(size, source.shape[1], dtype=source.dtype, device=device)
            for source in teachers
        ]
        # To look whether one is 0 saves a sweep on the CPU; a device would have to be waited for.
        muting = [
            weight is not None and (is_queued(device) or bool((weight == 0).any()))
            for weight in weights
        ]
        compiled = CompiledTerms(
            student, teacher, self.token_terms, weights, self.compile, self.planned_logits
        )
        for rows in _slices(0, count, size):
            length = rows.stop - rows.start
            if student is not None:
                student.fill(rows, own[:length])
            for source, buffer in zip(teachers, theirs, strict=True):
                source.fill(rows, buffer[:length])
            for part in self._parts(length, least=2 if compiled.numbers else 1):
                here = slice(rows.start + part.start, rows.start + part.stop)
                seen = tuple(buffer[part].to(dtype) for buffer in theirs)
                theirs_here = teacher.rows(here, seen, width) if teacher is not None else None
                chunk = LogitsChunk(here, own[part], theirs_here)
                if not into:
                    self._evaluate_part(chunk, seen, compiled, weights, muting, values)
                    continue
                assert isinstance(student, LazyHeadLogits)
                slope = student.slope(own[part])  # before the logits are overwritten
                gradients = self._evaluate_part(chunk, seen, compiled, weights, muting, values)
                _leave_gradient(own[part], gradients, slope, add=compiled.has_left_gradient)
            if into:
                assert isinstance(student, LazyHeadLogits)
                student.add_gradients(rows, own[:length], into)
        return values

    def _evaluate_part(
        self,
        chunk: LogitsChunk,
        theirs: Sequence[Tensor],
        compiled: CompiledTerms,
        weights: Weights,
        muting: Sequence[bool],
        values: Tensor,
    ) -> list[tuple[Tensor, Tensor]]:
        """Store the values of a part, and return the gradients that are not in its logits yet."""
        done = compiled.numbers
        rest = [number for number in range(len(weights)) if number not in done]
        gradients = self._evaluate_terms(chunk, rest, weights, muting, values, last=not done)
        if done:  # compiled code writes over the logits, which a gradient may be
            logits = chunk.student_logits
            gradients = [(g.clone() if _share_memory(g, logits) else g, w) for g, w in gradients]
        if not compiled.evaluate(chunk.rows, chunk.student_logits, theirs, values):
            gradients += self._evaluate_terms(chunk, done, weights, muting, values, last=False)
        return gradients

    def _evaluate_terms(
        self,
        chunk: LogitsChunk,
        numbers: Sequence[int],
        weights: Weights,
        muting: Sequence[bool],
        values: Tensor,
        *,
        last: bool,
    ) -> list[tuple[Tensor, Tensor]]:
        """Store the values of some terms, and return gradient and weight of each weighted one.

        If nothing reads the logits afterwards, the last gradient may be in their place.
        """
        gradients: list[tuple[Tensor, Tensor]] = []
        for number in numbers:
            if weights[number] is None:
                values[number, chunk.rows] = values_of(self.token_terms[number], chunk)
        # What is only looked at came first: nothing reads the logits after the last gradient.
        weighted = [number for number in numbers if weights[number] is not None]
        for number in weighted:
            token_term, weight = self.token_terms[number], weights[number]
            assert weight is not None  # by the choice of numbers
            in_place = last and number == weighted[-1] and token_term.may_overwrite_logits
            in_place &= not any(_share_memory(g, chunk.student_logits) for g, _ in gradients)
            if in_place:
                chunk.let_overwrite()
            here, gradient = token_term.values_and_gradient(chunk)
            values[number, chunk.rows] = checked(token_term, here, chunk)
            factors = weight[chunk.rows, None]
            if muting[number]:  # of an infinite gradient a weight of 0 would leave NaN
                fill = gradient.masked_fill_ if in_place else gradient.masked_fill
                gradient = fill(factors == 0, 0.0)
            gradients.append((gradient, factors.to(gradient.dtype)))
        return gradients

    @property
    def device(self) -> torch.device:
        """Device of the pass."""
        return self._first.device

    @property
    def _first(self) -> LazyLogits:
        if self.student is not None:
            return self.student
        assert self.teacher is not None  # one of the two is there
        return self.teacher.sources[0]

    def _chunk_size(self, buffers: int, into: Sequence[Tensor | None]) -> int:
        """Positions of a chunk: what fits into the bytes, and no chunk much shorter than another."""
        width = buffers * self._first.shape[1] * self._first.dtype.itemsize
        of_weights = sum(tensor.nbytes for tensor in into[1::2] if tensor is not None)
        allowed = self.chunk_bytes or default_chunk_bytes(of_weights)
        return chunk_size(self._first.shape[0], width, allowed)

    def _parts(self, length: int, least: int) -> Iterator[slice]:
        width = self._first.shape[1] * self._first.dtype.itemsize
        return _slices(0, length, max(least, part_size(length, width, self.device)))


def default_chunk_bytes(of_weights: int) -> int:
    """Return the bytes of logits that may be alive at once.

    Each chunk reads and writes the whole gradient of the head. With logits that take three quarters of
    it, that is a small part of the products, whatever the vocabulary.

    Args:
        of_weights: Bytes of the gradient of the head; 0 if there is none.

    Example:
        >>> default_chunk_bytes(2**30) // 2**20
        768
    """
    return max(CHUNK_BYTES, of_weights // 4 * 3)


def chunk_size(count: int, width: int, chunk_bytes: int) -> int:
    """Return the positions of a chunk.

    Args:
        count: Positions in all.
        width: Bytes of the logits of one, of student and teachers.
        chunk_bytes: Bytes that a chunk may have.

    Example:
        >>> chunk_size(10, 100, 450), chunk_size(10, 100, 10)
        (4, 1)
    """
    fitting = max(1, chunk_bytes // width)
    return ceil(count / max(1, ceil(count / fitting)))


def part_size(length: int, width: int, device: torch.device) -> int:
    """Return the positions of a part of a chunk, which arithmetic goes over at once.

    Args:
        length: Positions of the chunk.
        width: Bytes of the logits of one.
        device: Device of the pass.
    """
    # A kernel launch costs more than a cache miss on an accelerator.
    return max(1, _CACHE_BYTES // width) if device.type == "cpu" else length


def _share_memory(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def _leave_gradient(
    logits: Tensor, gradients: list[tuple[Tensor, Tensor]], slope: Tensor | float, *, add: bool
) -> None:
    """Write the weighted sum of the gradients over the logits, which are not needed any more.

    Or add it to what is there already, with the slope.
    """
    if add:
        for gradient, weight in gradients:
            logits.add_(gradient * weight * slope)
        return
    if not gradients:
        logits.zero_()
    # The last may be in the place of the logits already.
    for number, (gradient, weight) in enumerate(reversed(gradients)):
        if number == 0:
            torch.mul(gradient, weight, out=logits)
        else:
            logits.addcmul_(gradient, weight)
    if isinstance(slope, Tensor) or slope != 1:
        logits.mul_(slope)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for low in range(start, stop, max(size, 1)):
        yield slice(low, min(low + size, stop))
