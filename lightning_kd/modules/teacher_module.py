"""Base of methods with a teacher."""

from collections.abc import Mapping
from functools import partial, reduce
from operator import or_
from typing import get_args

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.batch import Batch
from lightning_kd.divergences import Divergence
from lightning_kd.evaluation import DistributionMetrics
from lightning_kd.fused import (
    AnswerKind,
    ChunkedPass,
    TeacherAnswer,
    TokenTerm,
    evaluate_no_grad,
)
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import (
    LogitsBackend,
    StudentLike,
    VocabularyPolicy,
    shared_vocabulary,
    vocabulary_size,
)
from lightning_kd.modules.answer_checks import check_divergences, check_temperatures, check_width
from lightning_kd.modules.dropped_mass import DroppedMass
from lightning_kd.modules.loss import Scores
from lightning_kd.modules.origin import check_origin
from lightning_kd.modules.remote import LookingAhead, ask_together
from lightning_kd.modules.reverse_kl import REVERSE_KL_NAMES, reverse_kl_term
from lightning_kd.modules.self_taught import SelfTaughtModule
from lightning_kd.modules.student_module import generates_completions
from lightning_kd.modules.teacher_tokens import TeacherTokens
from lightning_kd.modules.texts import check_texts
from lightning_kd.normalization import Normalization
from lightning_kd.option_checks import check_choice
from lightning_kd.scoring import ScoredPositions
from lightning_kd.strategies import adapter_of
from lightning_kd.teacher_rows import as_teacher_reads
from lightning_kd.teachers import TEACHERS, Teacher, TeachersLike, checked_answer, choose_kind
from lightning_kd.teachers.composite import CompositeTeacher
from lightning_kd.teachers.ensemble import teacher_of
from lightning_kd.tokenization import TokenizerLike

_LARGE_MASS = 0.01
"""A probability beyond the shared vocabulary that padding does not have."""


class TeacherModule(SelfTaughtModule):
    """A student that is compared with a frozen teacher on the same tokens.

    The other options are those of :class:`~lightning_kd.modules.DistillationModule`.

    Args:
        teacher: One model, or any other :class:`~lightning_kd.teachers.Teacher`. In Python also a
            name, a configuration, a model, or a list of these, which are averaged.
        vocabulary: ``equal`` refuses logits of different widths; ``shared`` cuts both to the
            narrower one before the softmax, so that each is renormalized over the tokens that they
            share. What a wider side gives to its other tokens is not in the loss, and is logged as
            ``student_dropped_mass`` or ``teacher_dropped_mass``. ``perplexity``, ``bits_per_byte`` and
            nats of documents are of the student over all its tokens.
    """

    needs: tuple[AnswerKind, ...] = ("full_distribution",)
    """Kinds of the teacher's answers that the method can learn from, the best first."""

    def __init__(
        self,
        *,
        teacher: TeachersLike,
        vocabulary: VocabularyPolicy = "equal",
        student: StudentLike,
        tokenizer: TokenizerLike | None = None,
        normalization: Normalization | str = "token",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        logits_backend: LogitsBackend | None = None,
        generation: GenerationOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(
            student=student,
            tokenizer=tokenizer,
            normalization=normalization,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            logits_backend=logits_backend,
            generation=generation,
            engine=engine,
        )
        check_choice("vocabulary", vocabulary, get_args(VocabularyPolicy))
        self.teacher = teacher_of(teacher)
        self.vocabulary: VocabularyPolicy = vocabulary
        self._warned_of: set[str] = set()

    width: int
    """Logits of student and teacher that are compared."""

    coming: Batch | None = None
    """The micro-batch that comes next, where it is known and the teacher wants to hear of it."""

    @property
    def answer_kind(self) -> AnswerKind:
        """Kind of the teacher's answers in this run.

        Raises:
            ValueError: If the method can use none of its answers.
        """
        return self.kind_from(self.teacher)

    def kind_from(self, teacher: Teacher) -> AnswerKind:
        """Return the kind of the answers that the method takes from a teacher.

        Raises:
            ValueError: If it can use none of them.
        """
        tempered = any(value != 1 for value in self.teacher_temperatures.values())
        # What another temperature or a narrower vocabulary needs.
        whole_first = tempered or self.vocabulary == "shared"
        needs = sorted(self.needs, key=lambda kind: whole_first and kind != "full_distribution")
        return choose_kind(teacher, needs, type(self).__name__, TEACHERS)

    @property
    def teacher_temperatures(self) -> Mapping[str, float]:
        """Temperatures of the teacher, by the name of their option."""
        return {}

    @property
    def teacher_divergences(self) -> Mapping[str, Divergence]:
        """Divergences from the teacher, by the name of their option."""
        return {}

    def configure_callbacks(self) -> list[Callback]:
        """Add those that tell the teacher what comes next, and count the tokens of several."""
        return [*super().configure_callbacks(), LookingAhead(), TeacherTokens()]

    def setup(self, stage: str) -> None:
        """Load the teacher, if it is needed.

        Raises:
            ValueError: If the method can use none of its answers.
        """
        super().setup(stage)
        if stage == "fit":
            self.train_distribution.overlap = None  # what an earlier run's callback has asked for
            for teacher in self.teachers.values():
                alike = self.learns_from_its_start or teacher is not self.teacher
                check_origin(self.student_spec, teacher, alike=alike)
        if stage != "predict":
            self.check_answers()
            self._has_teacher = True
            for role, teacher in self.teachers.items():
                teacher.prepare(
                    self.tokenizer,
                    self.trainer.strategy.root_device,
                    self.vocabulary,
                    adapter_of(self.trainer).shard_mesh(),
                    role,
                )
                teacher.check_data(getattr(self.trainer, "datamodule", None))
                check_texts(self, teacher, stage, rewritten=generates_completions(self.trainer))

    def configure_model(self) -> None:
        """Build the student and compare its vocabulary with the teacher's."""
        super().configure_model()
        if self._has_teacher:
            self.compare_vocabularies()

    def check_answers(self) -> None:
        """Refuse a teacher whose answers do not tell what the method computes from them."""
        check_temperatures(self.teacher, self.answer_kind, self.teacher_temperatures)
        check_divergences(self.teacher, self.answer_kind, self.teacher_divergences)

    def compare_vocabularies(self) -> None:
        """Set the width at which the student and a teacher that is ready are compared.

        Raises:
            ValueError: If they cannot be compared.
        """
        for teacher in self.teachers.values() if self.vocabulary == "equal" else ():
            if isinstance(teacher, CompositeTeacher):
                teacher.check_vocabularies("vocabulary: equal")
        known = self.teacher.vocabulary_size
        if not isinstance(known, int) or known < 1:
            raise ValueError(
                f"the vocabulary_size of {type(self.teacher).__name__} is {known!r}; it must be the "
                "number of tokens that have probabilities"
            )
        if self.teacher.has_own_tokens:
            self.width = vocabulary_size(self.student)
            return
        self.width = shared_vocabulary(vocabulary_size(self.student), known, self.vocabulary)
        if known > self.width and self.answer_kind != "full_distribution":
            raise ValueError(
                f"the teacher has {known} tokens and the student {self.width}; vocabulary: shared "
                "renormalizes the teacher's probabilities over the shared ones, and from "
                f"{self.answer_kind} that cannot be known. Take a student with at least {known} logits"
            )

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The student and the models of the teacher, by role."""
        of_teachers = [dict(teacher.local_models) for teacher in self.teachers.values()]
        return reduce(or_, of_teachers, super().models)

    def teacher_answer(self, batch: Batch, positions: ScoredPositions) -> TeacherAnswer:
        """Return the teacher's answer at these positions, over all tokens that it knows."""
        return self.answer_of(self.teacher, batch, positions)

    def answer_of(
        self, teacher: Teacher, batch: Batch, positions: ScoredPositions
    ) -> TeacherAnswer:
        """Return the answer of one of the teachers, over all tokens that it knows.

        Raises:
            ValueError: If what it answers is not about these positions.
        """
        ask = partial(
            checked_answer,
            teacher,
            batch,
            positions,
            kind=self.kind_from(teacher),
            logits_backend=self.logits_backend,
        )
        answer = ask_together(ask, self.device) if teacher.is_remote else ask()
        if self.vocabulary == "equal" and not teacher.has_own_tokens:
            check_width(teacher, answer, self.width)
        return answer

    def score(self, batch: Batch) -> Scores:
        """Run student and teacher on the same ids."""
        positions = self.positions(batch)
        teacher = self.teacher_answer(batch, positions)
        self.train_distribution.check(teacher)
        if self.coming is not None:
            # The teacher works on it while the student works on this one.
            ahead, self.coming = self.coming, None
            rows, positions_ahead = as_teacher_reads(ahead, self.positions(ahead))
            self.teacher.announce(rows, positions_ahead, kind=self.answer_kind)
        student = self.logits_backend.read(self.student, batch, positions)
        return Scores(positions, student, teacher).narrowed(self.width)

    def token_reverse_kl(self, batch: Batch) -> tuple[str, Tensor]:
        """Return the reverse KL at each scored position, as far as the teacher's answer gives it.

        Returns:
            The name of what the teacher's answer lets one compute, and its values, ``(N,)``.
        """
        with torch.no_grad():
            scores = self.score(batch)
        assert scores.teacher is not None  # score() has put it there
        term = reverse_kl_term(scores.teacher, scores.positions.targets)
        asked = scores.teacher if term.needs_teacher else None
        values = evaluate_no_grad(ChunkedPass(scores.student, asked, [term]))[0]
        return REVERSE_KL_NAMES[scores.teacher.kind], values

    def _metric_terms(self, metrics: DistributionMetrics, scores: Scores) -> list[TokenTerm]:
        hidden = () if scores.uncut is None else DroppedMass(scores.uncut, self.width).terms
        return [*super()._metric_terms(metrics, scores), *hidden]

    def _measure(self, metrics: DistributionMetrics, scores: Scores, values: Tensor) -> None:
        """Add the values of the metrics' terms, with the labels' nats over all tokens."""
        if scores.uncut is not None:
            dropped = DroppedMass(scores.uncut, self.width)
            own = len(values) - len(dropped.terms)
            values, normalizers = values[:own], values[own:]
            hidden = dropped.measure(normalizers, values[0])
            metrics.update_dropped(hidden.of_student, hidden.of_teacher, scores.positions.targets)
            if hidden.label_nats is not None:
                values = torch.cat([hidden.label_nats[None], values[1:]])
        super()._measure(metrics, scores, values)

    def _log_distribution(self, stage: str, metrics: DistributionMetrics) -> set[str]:
        shown = super()._log_distribution(stage, metrics)
        for name in metrics.dropped_names:
            mass = self.trainer.callback_metrics.get(f"{stage}/{name}", torch.zeros(()))
            if mass > _LARGE_MASS and name not in self._warned_of:
                self._warned_of.add(name)
                side = name.partition("_")[0]
                rank_zero_warn(
                    f"the {side} gives {mass:.1%} of its probability to tokens beyond the "
                    f"{self.width} that are compared ({stage}/{name}). Both sides are renormalized "
                    "over those, so the loss does not see it; vocabulary: shared is meant for "
                    "surplus that is padding"
                )
        return shown
