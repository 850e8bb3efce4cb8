"""Writing of a cache along the first pass over a data module's texts."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.cache import Manifest, read_manifest
from lightning_kd.cache_writing.options import CachedSplit, CacheOptions
from lightning_kd.cache_writing.scribe import Scribe
from lightning_kd.collectives import max_over_processes
from lightning_kd.data import DistillationData
from lightning_kd.data.evaluation_loader import EvaluationLoader
from lightning_kd.data.loader import TrainingLoader
from lightning_kd.loops import TerminationSignals
from lightning_kd.modules import TeacherModule
from lightning_kd.teachers import TEACHERS, choose_kind


def write_cache(
    trainer: L.Trainer, module: TeacherModule, data: DistillationData, options: CacheOptions
) -> Manifest:
    """Write what a method's teacher says about the texts of its data.

    The teacher reads the batches of the data's first pass, as in training with the same seed, batch
    size and number of processes, and every text once. The student is not built. Each process writes
    shards of its own. After a kill, the same call continues behind the shards that are complete. On
    SIGTERM, SIGHUP or Ctrl-C the writing ends behind the current batch, with the exit code that a
    shell reports for the signal.

    Args:
        trainer: Its devices, strategy and precision run the teacher.
        module: The method: its teacher, and where it scores.
        data: The texts.
        options: What is written, and where.

    Raises:
        ValueError: If no cache can hold what the method needs, the directory has something else, or
            another process writes there.
        OSError: If there is too little space. What is complete stays.

    Returns:
        The manifest of the complete cache.
    """
    _check(trainer, module, data, options)
    writing = _Writing(Scribe(module, data, options))
    try:
        trainer.predict(writing, datamodule=_Texts(data, options.splits), return_predictions=False)
    finally:
        writing.signals.restore()
        writing.scribe.close()
    return read_manifest(Path(options.dirpath).expanduser())


def check_method(module: L.LightningModule) -> None:
    """Validate that a cache can serve a method.

    Raises:
        ValueError: If it cannot.
    """
    if not isinstance(module, TeacherModule):
        raise ValueError(
            f"a cache is of what a teacher says, and {type(module).__name__} has none; take a method "
            "with a teacher, such as SupervisedKD"
        )
    if module.needs_own_samples:
        raise ValueError(
            f"{type(module).__name__} asks its teacher about what the student generates on the way, "
            "which no cache can know; a cache serves methods that learn from the data's texts, such "
            "as SupervisedKD, or GKD without on_policy"
        )


def _check(
    trainer: L.Trainer, module: TeacherModule, data: DistillationData, options: CacheOptions
) -> None:
    check_method(module)
    if not isinstance(data, DistillationData):
        raise ValueError(
            f"the data is a {type(data).__name__}; a cache is written along the rows of a data module "
            "that derives from DistillationData"
        )
    limit = trainer.limit_predict_batches
    if isinstance(limit, int) or limit != 1:  # 1.0 is all, 1 is one
        raise ValueError(
            "trainer.limit_predict_batches (or fast_dev_run) leaves rows out, and a cache needs every "
            "one; for a small cache give less data"
        )
    choose_kind(module.teacher, (options.payload().asks,), f"a cache of {options.kind}", TEACHERS)


class _Writing(L.LightningModule):
    """The scribe, as a module that a trainer can run."""

    def __init__(self, scribe: Scribe) -> None:
        super().__init__()
        self.scribe, self.signals = scribe, TerminationSignals()

    def configure_model(self) -> None:
        """Prepare the teacher."""
        self.scribe.prepare(self.trainer)

    def on_predict_start(self) -> None:
        """Listen to signals in the place of Lightning, which would only note them."""
        self.signals.listen(self.trainer)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> int:
        """Write what is said about a batch, and end if a signal has asked to."""
        rows = self.scribe.take(batch, batch_idx, dataloader_idx)
        number = max_over_processes(self.signals.received, self.device)
        if number:
            rank_zero_info(
                f"Ended by {signal.Signals(number).name}; the shards that are complete stay, and the "
                "same command continues behind them"
            )
            raise SystemExit(128 + number)
        return rows

    def on_predict_end(self) -> None:
        """Complete the cache."""
        self.scribe.end()


class _Texts(L.LightningDataModule):
    """The first pass over some splits, in the batches that training and evaluation read."""

    def __init__(self, data: DistillationData, splits: Sequence[CachedSplit]) -> None:
        super().__init__()
        self.data, self.splits = data, splits

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The data's."""
        return self.data.tokenizer

    def setup(self, stage: str) -> None:
        """Read the splits."""
        self.data.trainer = self.trainer
        for split in self.splits:
            self.data.read(split, optional=split == "validation")
            self.data.check_repeats(split)
        if not any(map(self.data.has, self.splits)):
            raise ValueError(
                f"cache.splits is {list(self.splits)}, and the data has none of them; name a split "
                "that it has"
            )

    def predict_dataloader(self) -> list[TrainingLoader | EvaluationLoader]:
        """A loader for each split that was given."""
        loaders: dict[CachedSplit, Callable[[], TrainingLoader | EvaluationLoader]] = {
            "train": self.data.stream,
            "validation": self.data.val_dataloader,
            "test": self.data.test_dataloader,
        }
        return [loaders[split]() for split in self.splits if self.data.has(split)]
