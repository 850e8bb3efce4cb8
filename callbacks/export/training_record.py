"""What a run was told and what it has measured, as its checkpoints and its model card keep it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import lightning as L

from lightning_kd.callbacks.export.options import arguments_of, base_model, model_text, shown
from lightning_kd.callbacks.export.session import this_session
from lightning_kd.modules import DistillationModule
from lightning_kd.resuming import Plain, Resumable
from lightning_kd.seeding import run_seed
from lightning_kd.teachers import Teacher


@dataclass(frozen=True)
class TrainingRecord:
    """What is known of the training of a student: plain data, all of which may be published.

    Attributes:
        method: Class of the method.
        student: Where the student started from.
        base_model: Name of that model on the hub; empty where it is not there.
        teachers: Where each teacher comes from.
        divergences: Divergences from the teacher, by the name of their option.
        model: Arguments of the method.
        data: Class and arguments of the data module.
        callbacks: Arguments of the callbacks that change the loss or the data.
        optimizer: Class and options of the optimizer.
        trainer: What the trainer decides of the loss.
        sessions: Each command that trained, with the version of this library and the commit of the
            working directory; more than one where a run was resumed.
        metrics: Results of the last validation.
        validated: Optimizer steps before it.
    """

    method: str = ""
    student: str = ""
    base_model: str = ""
    teachers: list[str] = field(default_factory=list)
    divergences: dict[str, Plain] = field(default_factory=dict)
    model: dict[str, Plain] = field(default_factory=dict)
    data: dict[str, Plain] = field(default_factory=dict)
    callbacks: dict[str, Plain] = field(default_factory=dict)
    optimizer: dict[str, Plain] = field(default_factory=dict)
    trainer: dict[str, Plain] = field(default_factory=dict)
    sessions: list[dict[str, str]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    validated: int = 0

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the record of a checkpoint, which another version may have written."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in state.items() if name in known})

    def state(self) -> dict[str, Any]:
        """Return the record as a checkpoint keeps it."""
        return asdict(self)

    def after_validation(self, trainer: L.Trainer) -> Self:
        """Return the record with the results of the validation that has just ended."""
        measured = {
            name: float(value)
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith("val/")
        }
        return replace(self, metrics=measured, validated=trainer.global_step)


def record_of(
    trainer: L.Trainer, module: DistillationModule, before: TrainingRecord
) -> TrainingRecord:
    """Return the record of a run that begins or goes on.

    Args:
        trainer: Its optimizers are there.
        module: The method, with a built student.
        before: What the run that is resumed has recorded; empty for a new one.
    """
    session = this_session()
    again = session in before.sessions[-1:]  # a job that was put into the queue again
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return replace(
        described(module, getattr(trainer, "datamodule", None)),
        callbacks={
            type(c).__name__: arguments_of(c) for c in callbacks if isinstance(c, Resumable)
        },
        optimizer=_optimizer(trainer),
        trainer={
            "precision": str(trainer.precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "processes": trainer.world_size,
            "seed": run_seed(),
        },
        sessions=before.sessions if again else [*before.sessions, session],
        metrics=before.metrics,
        validated=before.validated,
    )


def described(module: DistillationModule, data: object) -> TrainingRecord:
    """Return what a method and its data say of themselves, without a trainer.

    Args:
        module: The method.
        data: The data module; None if there is none.
    """
    teacher = getattr(module, "teacher", None)
    models = [model_text(spec) for spec in getattr(teacher, "model_specs", ())]
    if isinstance(teacher, Teacher) and not models:
        models = [type(teacher).__name__]
    options = arguments_of(module)
    for apart in ("tokenizer", "optimizer", "lr_scheduler"):
        options.pop(apart, None)
    arguments = arguments_of(data) if isinstance(data, Resumable) else {}
    return TrainingRecord(
        method=type(module).__name__,
        student=model_text(module.student_spec),
        base_model=base_model(module.student_spec) or "",
        teachers=models,
        divergences={
            name: {"class": type(divergence).__name__, **arguments_of(divergence)}
            for name, divergence in getattr(module, "teacher_divergences", {}).items()
        },
        model=options,
        data={} if data is None else {"class": type(data).__name__, **arguments},
    )


def _optimizer(trainer: L.Trainer) -> dict[str, Plain]:
    if not trainer.optimizers:
        return {}
    optimizer: Any = trainer.optimizers[0]
    optimizer = getattr(optimizer, "optimizer", optimizer)  # that which a strategy has wrapped
    options = {n: shown(v) for n, v in optimizer.defaults.items() if v not in (None, False)}
    schedules = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    return {"class": type(optimizer).__name__, **options} | (
        {"lr_scheduler": schedules[0]} if schedules else {}
    )
