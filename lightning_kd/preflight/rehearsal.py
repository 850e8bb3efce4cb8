"""What ``fit`` checks before its first step, on models without weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.callbacks.rollouts.checks import check_window
from lightning_kd.data import DistillationData, PromptsAndText
from lightning_kd.loops.checks import check_limits
from lightning_kd.models.vocabulary import check_ids
from lightning_kd.modules import DistillationModule, TeacherModule
from lightning_kd.modules.origin import check_origin
from lightning_kd.modules.policy_gradient import as_rollout
from lightning_kd.modules.self_taught import check_strategy
from lightning_kd.modules.texts import check_texts
from lightning_kd.preflight.memory import SizedModel
from lightning_kd.strategies import check_trainer
from lightning_kd.teachers import LocalTeacher, RetokenizingTeacher, Teacher
from lightning_kd.teachers.composite import CompositeTeacher


class Rehearsal:
    """The checks of a run in their order, and the messages of those that refuse it.

    Args:
        module: The method.
        datamodule: Its data, or a loader.
        trainer: What would train it; without one, nothing that it decides is checked.
        tokenizer: The data's.
    """

    def __init__(
        self,
        module: DistillationModule,
        datamodule: L.LightningDataModule | Iterable[Any],
        trainer: L.Trainer | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.refused: list[str] = []
        given = isinstance(datamodule, L.LightningDataModule)
        self._data: Any = datamodule if given else None  # a loader alone is no data module
        self._module, self._trainer = module, trainer
        self._tokenizer = tokenizer

    def run(self, sized: Sequence[SizedModel], some: Sequence[Batch]) -> None:
        """Run all checks.

        Args:
            sized: The student and the teacher's models in this process.
            some: Batches of the data.
        """
        read = self._passes(self._read)
        if self._trainer is not None:
            self._passes(check_limits, self._trainer)
            self._passes(check_trainer, self._trainer)
        if isinstance(self._module, TeacherModule):
            own = self._module
            for teacher in own.teachers.values():
                alike = own.learns_from_its_start or teacher is not own.teacher
                self._passes(check_origin, own.student_spec, teacher, alike=alike)
            if self._trainer is not None:
                self._passes(check_strategy, self._trainer, own.teachers.values())
        if some:
            self._passes(self._module.check_told, some[0])
        with self._stand_in(sized) as module:
            student = sized[0].model
            ready = self._passes(check_ids, self._tokenizer, student, "student")
            if isinstance(module, TeacherModule):
                ready = self._teacher(module) and ready
            if read and ready and self._trainer is not None:
                self._rollouts(module, self._trainer, some)

    def _passes(self, check: Callable[..., object], *given: Any, **options: Any) -> bool:
        """Run a check; returns whether it refuses nothing."""
        try:
            check(*given, **options)
        except ValueError as error:
            if str(error) not in self.refused:
                self.refused.append(str(error))
            return False
        return True

    def _read(self) -> None:
        data = self._data
        if isinstance(data, PromptsAndText):
            data.check_tokenizers()
            data.text.read("train")
            data = data.prompts
        if isinstance(data, DistillationData):
            data.read("validation", optional=True)

    @contextmanager
    def _stand_in(self, sized: Sequence[SizedModel]) -> Iterator[DistillationModule]:
        """Yield a module like the run's, whose models have no weights; the run's stays as it is."""
        module, trainer = copy(self._module), self._trainer
        module.__dict__["_modules"] = dict(module._modules)
        module.student, module._tokenizer = sized[0].model, self._tokenizer
        module._trainer = trainer
        before = getattr(trainer, "datamodule", None)
        empty = [
            (each.spec, each)
            for each in sized[1:]
            if isinstance(each.spec, LocalTeacher) and not each.spec.local_models
        ]
        own = module.followers if isinstance(module, TeacherModule) else []
        following = [each for each in own if not each.local_models]
        try:
            for teacher, each in empty:
                teacher._model, teacher._role = each.model, each.role
            for follower in following:
                follower._model = module.student
            if trainer is not None:
                trainer.datamodule = self._data  # type: ignore[attr-defined]
            yield module
        finally:
            for teacher, _ in empty:
                teacher._model = None
            for follower in following:
                follower._model = None
            if trainer is not None:
                trainer.datamodule = before  # type: ignore[attr-defined]

    def _teacher(self, module: TeacherModule) -> bool:
        """Check the teachers; returns whether they could be made ready."""
        ready = self._passes(module.check_answers)
        for role, teacher in module.teachers.items():
            ready = self._prepares(module, teacher, role, self._tokenizer) and ready
        if not ready:
            return False
        for teacher in module.teachers.values():
            self._passes(teacher.check_data, self._data)
            if self._trainer is not None:
                callbacks: list[Any] = self._trainer.callbacks  # type: ignore[attr-defined]
                rewritten = any(isinstance(each, OnPolicyGeneration) for each in callbacks)
                self._passes(check_texts, module, teacher, "fit", rewritten=rewritten)
        return self._passes(module.compare_vocabularies)

    def _prepares(
        self, module: TeacherModule, teacher: Teacher, role: str, tokenizer: PreTrainedTokenizerBase
    ) -> bool:
        policy = module.vocabulary
        if isinstance(teacher, RetokenizingTeacher):
            if not self._passes(teacher.align_with, tokenizer, policy):
                return False
            return self._prepares(module, teacher.teacher, role, teacher.own_tokenizer)
        if isinstance(teacher, CompositeTeacher):
            members = teacher.named_members.items()
            prepared = [
                self._prepares(module, each, f"{role} {name}", tokenizer) for name, each in members
            ]
            if not all(prepared) or policy != "equal":
                return all(prepared)
            return self._passes(teacher.check_vocabularies, "vocabulary: equal")
        if isinstance(teacher, LocalTeacher):
            return self._passes(teacher.check_model, teacher.model, tokenizer, role, policy)
        if teacher.model_specs:  # of another's class, which would load them
            return False
        here = torch.device("cpu") if self._trainer is None else self._trainer.strategy.root_device
        return self._passes(teacher.prepare, tokenizer, here, policy, None, role)

    def _rollouts(
        self, module: DistillationModule, trainer: L.Trainer, some: Sequence[Batch]
    ) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        generating = [each for each in callbacks if isinstance(each, OnPolicyGeneration)]
        self._passes(module.check_lengths, rewritten=bool(generating))
        if module.needs_own_samples and not generating and some:
            self._passes(as_rollout, some[0], type(module).__name__)
        for callback in generating:
            self._passes(callback.check, module)
            rows = getattr(self._data, "batch_size", None)
            if isinstance(self._data, DistillationData | PromptsAndText) and rows:
                steps = callback.steps_per_window * trainer.accumulate_grad_batches
                window = rows * trainer.world_size * steps
                self._passes(check_window, window, callback.plan.group_size)
