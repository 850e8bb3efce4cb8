"""Export of the trained student as a Hugging Face directory."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args
from uuid import uuid4

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from lightning_kd.checkpoints import AtomicCheckpointIO, fresh_name
from lightning_kd.filesystem import check_writable, flush, replace_directory
from lightning_kd.models.adapters import check_mergeable, has_adapters, merge_adapters
from lightning_kd.models.sharding import is_sharded
from lightning_kd.modules import DistillationModule
from lightning_kd.strategies import adapter_of
from lightning_kd.tokenization import end_of_sequence_ids

Which = Literal["last", "best"]

_RUN = ".run"
"""File in the exported directory that holds the id of the run."""

_STUDENT = "student."
"""Prefix of the student's weights in a checkpoint."""


class HFExport(Callback):
    """Export the student, its tokenizer and a generation config when training ends.

    ``AutoModelForCausalLM.from_pretrained`` loads the directory, and another run can load it as
    student or teacher. Weights are safetensors; adapters are merged into the weights. The directory is
    written under another name and then renamed, so that it is always complete.

    A model that the run reads (its student, teachers or tokenizer) is never replaced. Another model is
    replaced only with ``overwrite``, or if it is this run's own: in the logger's directory, or
    exported by the run that is resumed.

    Args:
        dirpath: Output directory. Defaults to ``student`` in the logger's directory.
        weights: ``last``, or ``best``: those of the best checkpoint of a ``ModelCheckpoint`` with a
            ``monitor``.
        overwrite: Whether to replace another model at ``dirpath``.

    Raises:
        ValueError: If a value is not a choice; before the first step, if the student could not be
            written to ``dirpath``, or there will be no best checkpoint.
    """

    def __init__(
        self, dirpath: str | None = None, *, weights: Which = "last", overwrite: bool = False
    ) -> None:
        if weights not in get_args(Which):
            raise ValueError(f"unknown weights {weights!r}; choose one of {get_args(Which)}")
        self.dirpath, self.weights, self.overwrite = dirpath, weights, overwrite
        self._run = uuid4().hex

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the run, which may replace its own export."""
        return {"run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the id of the resumed run, whose export may be replaced."""
        self._run = state_dict.get("run", self._run)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate that the student can be exported, before it is trained.

        Raises:
            ValueError: If it cannot.
        """
        if trainer.ckpt_path is None:
            self._run = uuid4().hex  # the callback may be used again
        if not self._exports(pl_module, trainer):
            return
        if self.weights == "best":
            self._check_best(trainer)
        check_mergeable(pl_module.student)
        directory = self._directory(trainer)
        _on_first_rank(trainer, lambda: self._check_writable(pl_module, directory))
        if trainer.ckpt_path is None:
            _on_first_rank(trainer, lambda: self._check_replaceable(directory))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the directory again, after the strategy has restored the callback's state.

        Raises:
            ValueError: If there is another model in it.
        """
        if self._exports(pl_module, trainer):
            directory = self._directory(trainer)
            _on_first_rank(trainer, lambda: self._check_replaceable(directory))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the student: all ranks gather weights, and the first one writes.

        Raises:
            ValueError: If the student could not be written.
        """
        if not self._exports(pl_module, trainer):
            return
        last = self.weights != "best"
        weights = adapter_of(trainer).full_state_dict(pl_module.student) if last else {}
        directory = self._directory(trainer)

        def export() -> None:
            self._check_replaceable(directory)  # it may have appeared during training
            try:
                best = weights or self._best_weights(trainer)
                _write(pl_module, best, directory, self._run)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise ValueError(
                    f"the student could not be written to {directory}: {error}. {_remedy(trainer)}"
                ) from error

        _on_first_rank(trainer, export)
        rank_zero_info(f"The student is in {directory}: {self._description(trainer)}")

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

    def _check_writable(self, module: DistillationModule, directory: Path) -> None:
        for role, path in _inputs(module):
            if Path(path).exists() and Path(path).resolve() == directory:
                raise ValueError(
                    f"export.dirpath is {directory}, which is the {role} of this run; a run never "
                    "replaces what it reads. Choose another directory"
                )
        try:
            fresh_name(directory).exists()
            if directory.exists() and not directory.is_dir():
                raise NotADirectoryError("there is a file of that name")
            check_writable(directory)
        except OSError as error:
            raise ValueError(
                f"the student could not be written to {directory}: {error}. Choose another directory "
                "with export.dirpath"
            ) from error

    def _check_replaceable(self, directory: Path) -> None:
        if not directory.exists() or not any(directory.iterdir()):
            return
        others = sorted(p.name for p in directory.iterdir() if p.is_dir())
        if others or not (directory / "config.json").exists():
            raise ValueError(
                f"export.dirpath is {directory}, which does not hold only a model: it also has "
                f"{', '.join(others[:3]) or 'files without a config.json'}. Choose another directory"
            )
        if _exporting_run(directory) != self._run and not self.overwrite:
            raise ValueError(
                f"there is a model in {directory} already. Choose another export.dirpath, or replace "
                "it with export.overwrite: true"
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
                "--trainer.strategy fsdp2 with checkpoints of one file, or export.weights: last"
            )

    def _monitor(self, trainer: L.Trainer) -> ModelCheckpoint | None:
        saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        return next((c for c in saving if c.monitor is not None), None)

    def _best_weights(self, trainer: L.Trainer) -> dict[str, Tensor]:
        monitor = self._monitor(trainer)
        assert monitor is not None  # checked in on_fit_start
        if not monitor.best_model_path:
            raise RuntimeError(
                f"there is no best checkpoint, because {monitor.monitor} was never logged when one was "
                "to be saved"
            )
        saved = AtomicCheckpointIO().load_checkpoint(monitor.best_model_path, map_location="cpu")
        weights = saved["state_dict"]
        return {n.removeprefix(_STUDENT): w for n, w in weights.items() if n.startswith(_STUDENT)}

    def _description(self, trainer: L.Trainer) -> str:
        monitor = self._monitor(trainer)
        if self.weights == "last" or monitor is None:
            return f"its last weights, after {trainer.global_step} optimizer steps"
        score = monitor.best_model_score
        value = "" if score is None else f" {float(score):.4g}"
        return f"its best weights, with {monitor.monitor}{value}, from {monitor.best_model_path}"


def write_student(module: DistillationModule, weights: dict[str, Any], directory: Path) -> None:
    """Save model, tokenizer and generation config under ``directory``."""
    model, tokenizer = module.student, module.tokenizer
    if has_adapters(model):
        # Merging changes the weights in place, and this model may be trained further; a sharded one
        # cannot be copied, but can be built again.
        if is_sharded(model):
            model = module.student_spec.build(tokenizer)
        else:
            model = copy.deepcopy(model).cpu()
        model.load_state_dict(weights)
        model = merge_adapters(model)
        weights = model.state_dict()
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(end_of_sequence_ids(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def _exporting_run(directory: Path) -> str | None:
    """Return the id of the run that exported a model; None if it was not exported by a run."""
    mark = directory / _RUN
    return mark.read_text().strip() if mark.is_file() else None


def _write(module: DistillationModule, weights: dict[str, Any], directory: Path, run: str) -> None:
    """Write to a temporary directory and rename it; remove it if that fails."""
    fresh = fresh_name(directory)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        write_student(module, weights, fresh)
        (fresh / _RUN).write_text(run)
        flush(fresh)
        replace_directory(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _inputs(module: DistillationModule) -> list[tuple[str, str]]:
    """Return directories that a run reads, with their roles; some may be names on the hub."""
    teacher = getattr(module, "teacher", None)
    sources = {"student": module.student_spec, **getattr(teacher, "sources", {})}
    named = [(role, source.name_or_path) for role, source in sources.items()]
    named += [(role, model.name_or_path) for role, model in module.models.items()]
    named.append(("tokenizer", module.tokenizer.name_or_path))
    return [(role, path) for role, path in named if path]


def _remedy(trainer: L.Trainer) -> str:
    """Return how to export the trained student after a failure."""
    saved = [
        path
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        for path in (callback.last_model_path, callback.best_model_path)
        if path and Path(path).exists()
    ]
    if not saved:
        return "There is no checkpoint of it: no ModelCheckpoint has saved one"
    newest = max(saved, key=lambda path: Path(path).stat().st_mtime)
    return (
        f"Nothing is lost: make room, and give the same command with --ckpt_path {newest} and "
        "--export.dirpath for another directory"
    )


def _on_first_rank(trainer: L.Trainer, check: Callable[[], None]) -> None:
    """Call a function on the first rank; all ranks raise its ``ValueError``.

    Raises:
        ValueError: If the function raises one.
    """
    message: str | None = None
    if trainer.is_global_zero:
        try:
            check()
        except ValueError as error:
            message = str(error)
    message = trainer.strategy.broadcast(message)
    if message is not None:
        raise ValueError(message)
