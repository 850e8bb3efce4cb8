"""The arithmetic of a chunk as compiled code: all terms of a pass in few sweeps over the logits."""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from itertools import count
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_kd.fused.answers import FullDistribution, TeacherAnswer
from lightning_kd.fused.compile_choice import Compile, pays
from lightning_kd.fused.compiled_kinds import described, kind_of
from lightning_kd.fused.lazy_logits import LazyHeadLogits, LazyLogits, slope_of_head
from lightning_kd.fused.logits_chunk import LogitsChunk, TokenTerm, checked, values_of
from lightning_kd.fused.teacher_rows import Combine, DistributionRows

BACKEND = "inductor"

# What is made of logits is made again where it is read again, rather than stored: of the time, most
# goes to memory. There is a limit, since a long chain of terms would be made over and over.
_OPTIONS: dict[str, Any] = {"realize_opcount_threshold": 128, "realize_reads_threshold": 32}

_given_up: set[Any] = set()
"""Kinds of terms that cannot be traced, and sets of them of which no code could be made."""

_tried: set[Any] = set()
"""Sets of terms that have been evaluated once without a compiler."""

_said: set[str] = set()

_names = count()


class _Arguments(NamedTuple):
    token_terms: Sequence[TokenTerm]
    weights: Sequence[Tensor | None]
    rows: Tensor | slice
    """Numbers of the positions, ``(n,)``: of a slice, each start would have its own code."""
    own: Tensor
    """``(n, V)``; if a term has a weight, the gradient takes its place."""
    theirs: Sequence[Tensor]
    combine: Combine | None
    scale: float
    softcap: float | None


def _arithmetic(
    token_terms: Sequence[TokenTerm],
    weights: Sequence[Tensor | None],
    rows: Tensor | slice,
    own: Tensor,
    theirs: Sequence[Tensor],
    combine: Combine | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Evaluate terms at some rows, without Python's decisions about values: ``(terms, n)``."""
    teacher = None if combine is None else DistributionRows(theirs, combine)
    # What terms look up by a slice of positions they look up by their numbers as well.
    chunk = LogitsChunk(cast(slice, rows), own, teacher)
    values, total = [], None
    for token_term, weight in zip(token_terms, weights, strict=True):
        if weight is None:
            values.append(values_of(token_term, chunk).to(own.dtype))
            continue
        here, gradient = token_term.values_and_gradient(chunk)
        values.append(checked(token_term, here, chunk).to(own.dtype))
        factors = weight[rows, None]
        # Of an infinite gradient a weight of 0 would leave NaN.
        gradient = torch.where(factors == 0, 0.0, gradient * factors.to(gradient.dtype))
        total = gradient if total is None else total + gradient
    stacked = torch.stack(values)
    if total is not None:
        own.copy_(total * slope_of_head(own, scale, softcap))
    return stacked


class CompiledTerms:
    """Those terms of a pass that are compiled, as one function of some rows of the logits.

    Args:
        student: The student's logits.
        teacher: The teacher's answer.
        token_terms: All terms of the pass.
        weights: What each weighs in the loss, ``(N,)``; None where it is only looked at.
        mode: Whether to compile.
        planned_logits: How many the run is going to evaluate, as far as is known.
    """

    def __init__(
        self,
        student: LazyLogits | None,
        teacher: TeacherAnswer | None,
        token_terms: Sequence[TokenTerm],
        weights: Sequence[Tensor | None],
        mode: Compile,
        planned_logits: float = 0.0,
    ) -> None:
        self._student, self._teacher, self._mode = student, teacher, mode
        self._terms, self._weights = token_terms, weights
        self.numbers: list[int] = []
        """Which of the terms are compiled; fewer, once some could not be."""
        self.has_left_gradient = False
        """Whether the last evaluation has put a gradient in the place of the student's logits."""
        automatic = mode == "auto" and student is not None and pays(student.device, planned_logits)
        if student is not None and (mode == "always" or automatic):
            self._choose()

    def evaluate(self, rows: slice, own: Tensor, theirs: Sequence[Tensor], values: Tensor) -> bool:
        """Store values at some rows, and put the gradient in the place of the student's logits.

        Args:
            rows: The positions.
            own: The student's logits there, ``(n, V)``.
            theirs: Those of the teacher's models.
            values: Of all terms at all positions, ``(terms, N)``.

        Returns:
            Whether it has been done. If not, nothing has changed but :attr:`numbers`.

        Raises:
            ValueError: If ``mode`` is ``always`` and no code can be made, or a term refuses the logits.
        """
        self.has_left_gradient = False
        if not self.numbers:
            return True
        arguments = self._arguments(rows, own, theirs)
        key = self._key(self.numbers)
        if key not in _tried:
            # The errors of a term come as it raises them.
            _arithmetic(
                *_first_rows(arguments)._replace(rows=slice(rows.start, rows.start + len(own[:2])))
            )
            _tried.add(key)
        try:
            if len(own) == 1:  # a number of 1 would have its own code
                found = _arithmetic(*arguments._replace(rows=rows))
            else:
                found = _run(_compiled(key, BACKEND), arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._fall_back(error, arguments)
            return False
        for number, value in zip(self.numbers, found, strict=True):
            values[number, rows] = value
        self.has_left_gradient = any(weight is not None for weight in arguments.weights)
        return True

    def _choose(self) -> None:
        self.numbers = [
            number
            for number, term in enumerate(self._terms)
            if kind_of(term) not in _given_up and self._has_all_it_reads(term)
        ]
        if self._key(self.numbers) in _given_up:
            self.numbers = []

    def _has_all_it_reads(self, term: TokenTerm) -> bool:
        if not term.needs_teacher or type(self._teacher) in (FullDistribution, type(None)):
            return True
        _say(
            f"terms that read a {type(self._teacher).__name__} of the teacher are not compiled; they "
            "are evaluated as with compile: never"
        )
        return False

    def _key(self, numbers: Sequence[int]) -> Any:
        return tuple(
            (kind_of(self._terms[number]), self._weights[number] is not None) for number in numbers
        )

    def _arguments(self, rows: slice, own: Tensor, theirs: Sequence[Tensor]) -> _Arguments:
        head = self._student if isinstance(self._student, LazyHeadLogits) else None
        terms = [self._terms[number] for number in self.numbers]
        asked = any(term.needs_teacher for term in terms)
        teacher = self._teacher if asked and isinstance(self._teacher, FullDistribution) else None
        return _Arguments(
            terms,
            [self._weights[number] for number in self.numbers],
            torch.arange(rows.start, rows.stop, device=own.device),
            own,
            list(theirs) if teacher is not None else [],
            None if teacher is None else teacher.combine,
            1.0 if head is None else head.scale,
            None if head is None else head.softcap,
        )

    def _stop_at_limit(self, terms: Sequence[TokenTerm]) -> None:
        limit = torch._dynamo.config.recompile_limit
        what = (
            f"{' and '.join(map(described, terms))} came with over {limit} settings in this process, "
            "each of which needs code of its own (a width of the vocabulary, a type, a number such as "
            "a temperature or a beta)"
        )
        advice = "Keep numbers constant over a run, or raise torch._dynamo.config.recompile_limit"
        if self._mode == "always":
            raise ValueError(f"compile is always, and {what}. {advice}; or set compile to auto")
        _given_up.add(self._key(self.numbers))
        _say(f"these terms go on without a compiler: {what}. {advice}")
        self._choose()

    def _fall_back(self, error: Exception, arguments: _Arguments) -> None:
        from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

        why = _reason(error)
        if isinstance(error, FailOnRecompileLimitHit):
            self._stop_at_limit(arguments.token_terms)
            return
        if isinstance(error, BackendCompilerFailed) and self._mode == "always":
            raise ValueError(
                f"compile is always, and no code can be made on {arguments.own.device.type}: {why}. "
                "Install a C++ compiler, and Triton on CUDA, or set compile to auto"
            ) from error
        refused = []
        if not isinstance(error, BackendCompilerFailed):
            refused = [
                term
                for term, weight in zip(arguments.token_terms, arguments.weights, strict=True)
                if not _is_traced(term, weight, arguments)
            ]
        for term in refused:
            _given_up.add(kind_of(term))
            _say(f"{described(term)} is not compiled: it cannot be traced ({why})")
        if not refused:
            _given_up.add(self._key(self.numbers))
            _say(f"the fused evaluation goes on without a compiler: {why}")
        self._choose()


@cache
def _compiled(key: Any, backend: str) -> Any:
    """A function of its own for each set of terms: their variants are counted apart, and few."""
    code = _arithmetic.__code__.replace(co_name=f"arithmetic_{next(_names)}")
    function = FunctionType(code, _arithmetic.__globals__)
    options = None
    if backend == "inductor":
        options = _OPTIONS
        with warnings.catch_warnings():  # PyTorch's own, of what it has deprecated itself
            warnings.simplefilter("ignore")
            import_module("torch._inductor.compile_fx")
    return torch.compile(function, dynamic=True, fullgraph=True, backend=backend, options=options)


def _run(function: Any, arguments: _Arguments) -> Tensor:
    import torch._dynamo
    from torch.fx.experimental import _config as symbolic_shapes

    for tensor in (arguments.own, *arguments.theirs):
        torch._dynamo.mark_static(tensor, 1)
    # Numbers of rows that are equal by chance are not taken for one; a beta is part of the code.
    with (
        torch._dynamo.config.patch(specialize_float=True),
        symbolic_shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        found: Tensor = function(*arguments)
    return found


def _first_rows(arguments: _Arguments) -> _Arguments:
    assert isinstance(arguments.rows, Tensor)
    return arguments._replace(
        rows=arguments.rows[:2],
        own=arguments.own[:2].clone(),
        theirs=[tensor[:2] for tensor in arguments.theirs],
    )


def _is_traced(term: TokenTerm, weight: Tensor | None, arguments: _Arguments) -> bool:
    alone = _first_rows(arguments)._replace(token_terms=[term], weights=[weight])
    try:
        _run(_compiled((kind_of(term), weight is not None), "eager"), alone)
    except Exception:
        return False
    return True


def _reason(error: Exception) -> str:
    """The first line that says something; a backend's error begins with the backend's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[1] if lines[0].endswith("raised:") and len(lines) > 1 else lines[0]


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        rank_zero_warn(line)
