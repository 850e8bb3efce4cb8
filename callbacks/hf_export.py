"""Export of the trained student as a Hugging Face directory."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args
from uuid import uuid4

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from torch import Tensor

from lightning_kd.callbacks.export.card import CardContext
from lightning_kd.callbacks.export.directory import (
    check_place,
    check_replaceable,
    write_directory,
)
from lightning_kd.callbacks.export.first_rank import on_first_rank
from lightning_kd.callbacks.export.hub import HubRepository
from lightning_kd.callbacks.export.redaction import presentable
from lightning_kd.callbacks.export.remedies import after_failed_push, after_failed_write
from lightning_kd.callbacks.export.training_record import TrainingRecord, record_of
from lightning_kd.checkpoints import AtomicCheckpointIO
from lightning_kd.models.adapters import check_mergeable
from lightning_kd.modules import DistillationModule
from lightning_kd.option_checks import check_choice
from lightning_kd.strategies import adapter_of

Which = Literal["last", "best"]

_STUDENT = "student."
"""Prefix of the student's weights in a checkpoint."""


class HFExport(Callback):
    """Export the student, its tokenizer, generation config and model card when training ends.

    ``AutoModelForCausalLM.from_pretrained`` loads the directory, and another run can load it as
    student or teacher. Weights are safetensors; adapters are merged into the weights. The directory is
    written under another name and then renamed, so that it is always complete.

    A model that the run reads (its student, teachers or tokenizer) is never replaced. Another model is
    replaced only with ``overwrite``, or if it is this run's own: in the logger's directory, or
    exported by the run that is resumed. A directory with anything beside a model, such as files of
    your own, is never replaced.

    The card tells the method with its options, teachers, data, the last validation, and the commands
    that trained. It has no tokens, and of paths outside of the working directory the last name alone.

    Args:
        dirpath: Output directory. Defaults to ``student`` in the run's directory.
        weights: ``last``, or ``best``: those of the best checkpoint of a ``ModelCheckpoint`` with a
            ``monitor``.
        overwrite: Whether to replace another model at ``dirpath``.
        push_to_hub: ``user/name`` of a repository on the Hugging Face hub, to which the directory is
            uploaded as well. The token is that of ``hf auth login`` or ``HF_TOKEN``.
        private: Whether only its owners see the repository.

    Raises:
        ValueError: If a value is not a choice; before the first step, if the student could not be
            written to ``dirpath``, the hub would not take it, or there will be no best checkpoint.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        weights: Which = "last",
        overwrite: bool = False,
        push_to_hub: str | None = None,
        private: bool = True,
    ) -> None:
        check_choice("weights", weights, get_args(Which))
        if push_to_hub is None and not private:
            raise ValueError(
                "export.private is false, and nothing is pushed to the hub; give export.push_to_hub"
            )
        if dirpath is not None and not str(dirpath):
            raise ValueError(
                "export.dirpath is empty; name a directory, or leave it out for student in the run's"
            )
        self.dirpath = None if dirpath is None else os.path.expanduser(dirpath)
        self.weights, self.overwrite = weights, overwrite
        self.repository = None if push_to_hub is None else HubRepository(push_to_hub, private)
        self.record = TrainingRecord()
        self._run = uuid4().hex

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the run, which may replace its own export, and what its card will say."""
        return {"run": self._run, "record": self.record.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the id of the run, whose export may be replaced, and what is known of it."""
        self._run = state_dict.get("run", self._run)
        self.record = TrainingRecord.of_state(state_dict.get("record", {}))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the hub, before any model is loaded, whether it will take the student.

        Raises:
            ValueError: If it will not.
        """
        if stage == TrainerFn.FITTING and self._exports(pl_module, trainer):
            self.check_hub(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate that the student can be exported, before it is trained.

        Raises:
            ValueError: If it cannot.
        """
        if trainer.ckpt_path is None:
            self._run, self.record = uuid4().hex, TrainingRecord()  # the callback may be used again
        if not self._exports(pl_module, trainer):
            return
        if self.weights == "best":
            self._check_best(trainer)
        directory = self._directory(trainer)
        self.check(trainer, pl_module, directory)
        if trainer.ckpt_path is None:
            self._check_replaceable(trainer, directory)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the directory again, after the strategy has restored the callback's state.

        Raises:
            ValueError: If there is another model in it.
        """
        if not self._exports(pl_module, trainer):
            return
        self._check_replaceable(trainer, self._directory(trainer))
        if trainer.is_global_zero:
            self.record = record_of(trainer, pl_module, self.record)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the results for the card."""
        if trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking:
            self.record = self.record.after_validation(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the student: all ranks gather weights, and the first one writes.

        Raises:
            ValueError: If the student could not be written or pushed.
        """
        if not self._exports(pl_module, trainer):
            return
        last, directory = self.weights != "best", self._directory(trainer)
        weights = adapter_of(trainer).full_state_dict(pl_module.student) if last else {}

        def best() -> tuple[dict[str, Tensor], TrainingRecord]:
            return (weights, self.record) if last else self._best(trainer)

        self.write(trainer, pl_module, directory, best, self._description(trainer))

    def check(self, trainer: L.Trainer, module: DistillationModule, directory: Path) -> None:
        """Validate that a student can be exported.

        Args:
            trainer: All of its processes call it together.
            module: Its student is built.
            directory: Where it will go.

        Raises:
            ValueError: If adapters cannot be merged, or the directory cannot be written.
        """
        check_mergeable(module.student)
        on_first_rank(trainer, lambda: check_place(module, directory))

    def check_hub(self, trainer: L.Trainer) -> None:
        """Validate that the hub would take a student, if it is to be pushed there.

        Raises:
            ValueError: If it would not.
        """
        if self.repository is not None:
            on_first_rank(trainer, self.repository.check)

    def write(
        self,
        trainer: L.Trainer,
        module: DistillationModule,
        directory: Path,
        read: Callable[[], tuple[dict[str, Tensor], TrainingRecord]],
        description: str,
    ) -> None:
        """Write a student, and push it to the hub if that was asked for.

        Args:
            trainer: All of its processes call it together.
            module: Its student has the form of the weights.
            directory: Where it goes.
            read: Returns the student's weights and what is known of their training.
            description: Says which weights these are.

        Raises:
            ValueError: If it could not be written or pushed; nothing that was there is lost.
        """

        def export() -> None:
            # It may have appeared during training.
            check_replaceable(directory, self._run, overwrite=self.overwrite)
            try:
                weights, record = read()
                context = CardContext(record, self._name(directory), presentable(description))
                write_directory(
                    module, weights, directory, self._run, context, overwrite=self.overwrite
                )
            except (OSError, RuntimeError, SafetensorError) as error:
                raise ValueError(
                    f"the student could not be written to {directory}: {error}. "
                    f"{after_failed_write(trainer)}"
                ) from error
            rank_zero_info(f"The student is in {directory}: {description}")
            if self.repository is not None:
                remedy = after_failed_push(trainer, self.repository.name, log_dir)
                rank_zero_info(f"It is pushed to {self.repository.push(directory, remedy)}")

        log_dir = trainer.log_dir  # on every rank: the trainer broadcasts it
        on_first_rank(trainer, export)

    def _exports(
        self, module: L.LightningModule, trainer: L.Trainer
    ) -> TypeGuard[DistillationModule]:
        return isinstance(module, DistillationModule) and not getattr(
            trainer, "fast_dev_run", False
        )

    def _directory(self, trainer: L.Trainer) -> Path:
        # On every rank: the trainer broadcasts it.
        log_dir = trainer.log_dir
        return Path(self.dirpath or Path(log_dir or ".") / "student").resolve()

    def _name(self, directory: Path) -> str:
        """Return the name under which the exported student is loaded, from here or the hub."""
        if self.repository is not None:
            return self.repository.name
        here = Path.cwd()
        inside = directory.is_relative_to(here)
        return str(directory.relative_to(here)) if inside else directory.name

    def _check_replaceable(self, trainer: L.Trainer, directory: Path) -> None:
        on_first_rank(
            trainer, lambda: check_replaceable(directory, self._run, overwrite=self.overwrite)
        )

    def _check_best(self, trainer: L.Trainer) -> None:
        if self._monitor(trainer) is None:
            raise ValueError(
                "export.weights is best, but no ModelCheckpoint has a monitor; give one, for example "
                "with monitor: val/loss, or export.weights: last"
            )
        if adapter_of(trainer).writes_directories:
            raise ValueError(
                "export.weights is best, but this strategy writes sharded checkpoints; use "
                "--trainer.strategy fsdp2 with checkpoints of one file, or export.weights: last, and "
                "lightning-kd export --ckpt_path best afterwards"
            )

    def _monitor(self, trainer: L.Trainer) -> ModelCheckpoint | None:
        saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        return next((c for c in saving if c.monitor is not None), None)

    def _best(self, trainer: L.Trainer) -> tuple[dict[str, Tensor], TrainingRecord]:
        monitor = self._monitor(trainer)
        assert monitor is not None  # checked in on_fit_start
        if not monitor.best_model_path:
            raise RuntimeError(
                f"there is no best checkpoint, because {monitor.monitor} was never logged when one was "
                "to be saved"
            )
        saved = AtomicCheckpointIO().load_checkpoint(monitor.best_model_path, map_location="cpu")
        weights = saved["state_dict"]
        student = {
            n.removeprefix(_STUDENT): w for n, w in weights.items() if n.startswith(_STUDENT)
        }
        # Weights alone (save_weights_only) do not say what they were measured to be.
        own = saved.get("callbacks", {}).get(self.state_key, {}).get("record")
        unmeasured = replace(self.record, metrics={})
        return student, unmeasured if own is None else TrainingRecord.of_state(own)

    def _description(self, trainer: L.Trainer) -> str:
        monitor = self._monitor(trainer)
        if self.weights == "last" or monitor is None:
            return f"its last weights, after {trainer.global_step} optimizer steps"
        score = monitor.best_model_score
        value = "" if score is None else f" {float(score):.4g}"
        return f"its best weights, with {monitor.monitor}{value}, from {monitor.best_model_path}"
