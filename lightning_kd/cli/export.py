"""The command ``lightning-kd export``."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import lightning as L
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedTokenizerBase

from lightning_kd.callbacks import HFExport
from lightning_kd.callbacks.export.training_record import described
from lightning_kd.checkpoints import readable_checkpoint
from lightning_kd.cli.cache import CachingTrainer
from lightning_kd.modules import DistillationModule
from lightning_kd.named_checkpoints import why_no_checkpoint
from lightning_kd.strategies import adapter_of

_NEEDS_CONFIG = (
    "give --config the config.yaml of the run that saved it (runs/version_N/config.yaml), or what its "
    "fit was given"
)


class ExportingTrainer(CachingTrainer):
    """Lightning's trainer, with the command that exports a checkpoint."""

    @classmethod
    def for_export(cls, options: Mapping[str, Any], export: HFExport) -> Self:
        """Return the trainer of a run's options, with nothing of it that trains or evaluates.

        Args:
            options: Of the run's trainer.
            export: What is exported, and where.
        """
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        whole = {"fast_dev_run": False, "limit_predict_batches": 1.0}
        return cls(**{**options, **quiet, **whole, "callbacks": [export, _ExportAtStart(export)]})

    def export_student(
        self,
        model: DistillationModule,
        datamodule: L.LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write the student of a checkpoint as a Hugging Face directory with a model card.

        ``--config`` defaults to the ``config.yaml`` of the run that the checkpoint is in, and
        ``--export.dirpath`` to ``student`` in its directory. Neither teacher nor data are read.

        Args:
            model: The method that trained it. Its teacher is not loaded.
            datamodule: Has the tokenizer. Its rows are not read.
            ckpt_path: The checkpoint.
            weights_only: As for ``test``.

        Raises:
            ValueError: If there is no checkpoint, or the student cannot be written.
        """
        if ckpt_path is None:
            raise ValueError(
                "export needs the checkpoint that is meant: --ckpt_path PATH; or last or best, of the "
                "run whose config.yaml is given with --config"
            )
        if not isinstance(model, DistillationModule):
            raise ValueError(
                f"the model is a {type(model).__name__}; export writes the student of a "
                "DistillationModule"
            )
        model.loads_teacher = False
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, _ExportAtStart):
                callback.checkpoint = Path(ckpt_path)
        with warnings.catch_warnings():
            # The callbacks that trained are left out on purpose.
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
            self.predict(
                model,
                datamodule=_NoRows(datamodule),
                ckpt_path=ckpt_path,
                weights_only=weights_only,
                return_predictions=False,
            )

    export = export_student
    """The command; jsonargparse names a group by the function, and the options have this name."""


def with_run_config(arguments: Sequence[str]) -> list[str]:
    """Return the command line of ``export`` with the configuration of the checkpoint's run.

    Args:
        arguments: Those of ``lightning-kd``. Other commands stay as they are.

    Raises:
        ValueError: If no configuration is given, and none is beside the checkpoint; or an option of
            ``fit`` is given that ``--ckpt_path`` stands for.
    """
    given = list(arguments)
    if given[:1] != ["export"] or {"-h", "--help"} & {*given}:
        return given
    names = {argument.partition("=")[0] for argument in given}
    if "--export.weights" in names:
        raise ValueError(
            "--export.weights is of fit; here --ckpt_path says which weights: a path, last or best"
        )
    checkpoint = _value(given, "--ckpt_path")
    if {"--config", "-c"} & names or checkpoint is None:
        return given
    if checkpoint in {"last", "best"}:
        raise ValueError(f"--ckpt_path {checkpoint}: of which run? {_NEEDS_CONFIG}")
    place = readable_checkpoint(Path(checkpoint)).absolute()
    if not place.exists():
        return given  # which is said where all checkpoints are looked for
    if why := why_no_checkpoint(checkpoint):
        raise ValueError(f"--ckpt_path: {why}")
    config = run_of(place) / "config.yaml"
    if not config.is_file():
        raise ValueError(
            f"there is no {config} of the run that saved {checkpoint}; {_NEEDS_CONFIG}"
        )
    return ["export", "--config", str(config), *given[1:]]


def run_of(checkpoint: Path) -> Path:
    """Return the directory of the run that a checkpoint lies in.

    Example:
        >>> run_of(Path("runs/version_3/checkpoints/last.ckpt"))
        PosixPath('runs/version_3')
    """
    inside = checkpoint.parent
    return inside.parent if inside.name == "checkpoints" else inside


class _ExportAtStart(Callback):
    """Export a student when the strategy has restored its weights, before anything is predicted."""

    checkpoint: Path
    """Where the weights come from."""

    def __init__(self, export: HFExport) -> None:
        self.options = export
        self.step: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the hub before anything is loaded."""
        self.options.check_hub(trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the number of steps."""
        self.step = checkpoint["global_step"]

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export."""
        assert isinstance(pl_module, DistillationModule)  # export_student has checked it
        beside = run_of(self.checkpoint.absolute()) / "student"
        directory = Path(self.options.dirpath or beside).resolve()
        self.options.check(trainer, pl_module, directory)
        weights = adapter_of(trainer).full_state_dict(pl_module.student)
        record = self.options.record
        if not record.method:  # weights alone, or those of an earlier version
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            record = described(pl_module, data.data)
        steps = "" if self.step is None else f" after {self.step} optimizer steps"
        description = f"the weights{steps} of {self.checkpoint}"
        self.options.write(trainer, pl_module, directory, lambda: (weights, record), description)


class _NoRows(L.LightningDataModule):
    """A run's tokenizer, and nothing to predict."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data = data

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The run's."""
        tokenizer: PreTrainedTokenizerBase | None = getattr(self.data, "tokenizer", None)
        return tokenizer

    def predict_dataloader(self) -> "_Nothing":
        """A loader without a length: the trainer goes through all of its hooks."""
        return _Nothing()


class _Nothing:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _value(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of an option of a command line; None where it is not given."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        if option == name:
            return value if equals else following
    return None
