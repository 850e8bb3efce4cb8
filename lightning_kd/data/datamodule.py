"""What every data module shares: the tokenizer, the loaders, and steps instead of epochs."""

import math
from abc import abstractmethod
from typing import Literal

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_kd.data.collate import Collator
from lightning_kd.data.loader import EvaluationLoader, Rows, TrainingLoader
from lightning_kd.models.vocabulary import load_tokenizer
from lightning_kd.seeding import run_seed

Split = Literal["train", "validation", "test", "predict"]
_SPLITS_OF: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class DistillationData(L.LightningDataModule):
    """Rows of each split, as batches of :class:`~lightning_kd.types.Batch`.

    A data module derives from this class and writes :meth:`rows`.

    Args:
        tokenizer: Directory or hub name, or a tokenizer. It needs an EOS.
        batch_size: Rows of a micro-batch on one process.
        eval_batch_size: Rows of an evaluation batch; ``batch_size`` when not given.
        num_workers: Processes that prepare batches ahead; the rows do not depend on it.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        *,
        tokenizer: str | PreTrainedTokenizerBase,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(
                f"batch_size is {batch_size} and eval_batch_size {eval_batch_size}; "
                "they must be 1 or more"
            )
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 0 or more")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.eval_batch_size = eval_batch_size or batch_size
        self._tokenizer = tokenizer
        self._rows: dict[Split, Rows | None] = {}

    @abstractmethod
    def rows(self, split: Split) -> Rows | None:
        """The rows of a split, or None where it was not given."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for.

        Raises:
            ValueError: If there is none, or it has no EOS.
        """
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token; completions could not end")
        return self._tokenizer

    def setup(self, stage: str) -> None:
        """Read and tokenize the splits of a stage.

        Raises:
            ValueError: If a split that the stage needs was not given.
        """
        stage = TrainerFn(stage).value
        for split in _SPLITS_OF[stage]:
            if split not in self._rows:
                self._rows[split] = self.rows(split)
            optional = stage == "fit" and split == "validation"
            if self._rows[split] is None and not optional:
                raise ValueError(
                    f"{stage} needs data.{split}, which was not given to {type(self).__name__}"
                )
        if stage == "fit":
            self._count_steps()
            if self._rows["validation"] is None:
                # An empty loader in its place would make Lightning warn at every run.
                self._attached_trainer().limit_val_batches = 0

    def train_dataloader(self) -> TrainingLoader:
        """The whole run as one stream."""
        rows, trainer = self._ready("train"), self._attached_trainer()
        return TrainingLoader(
            rows,
            self._collator,
            batch_size=self.batch_size,
            micro_batches=trainer.max_steps * trainer.accumulate_grad_batches,
            seed=run_seed(),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> EvaluationLoader:
        """Every validation row once."""
        return self._evaluation("validation")

    def test_dataloader(self) -> EvaluationLoader:
        """Every test row once."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Every row to complete, once."""
        return self._evaluation("predict")

    @property
    def _collator(self) -> Collator:
        pad = self.tokenizer.pad_token_id
        return Collator(self.tokenizer.eos_token_id if pad is None else pad)

    def _evaluation(self, split: Split) -> EvaluationLoader:
        rows, trainer = self._ready(split), self._attached_trainer()
        return EvaluationLoader(
            rows,
            self._collator,
            batch_size=self.eval_batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=self.num_workers,
        )

    def _ready(self, split: Split) -> Rows:
        rows = self._rows.get(split)
        if rows is None:
            raise ValueError(
                f"there are no {split} rows: they were not given, or setup was not called"
            )
        return rows

    def _attached_trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise ValueError("the loaders follow the trainer: pass datamodule=... to trainer.fit")
        return self.trainer

    def _count_steps(self) -> None:
        """Turn epochs into optimizer steps: for Lightning, the whole run is one epoch.

        A position in one long stream is all the state that an exact resume needs; a position in an
        epoch and a count of epochs can disagree.
        """
        trainer, rows = self._attached_trainer(), self._rows["train"]
        if trainer.max_steps != -1:
            return
        assert rows is not None
        global_batch = self.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(
                "give trainer.max_steps or trainer.max_epochs: one pass over "
                f"{len(rows)} rows is {math.ceil(len(rows) / global_batch)} steps"
            )
        steps = math.ceil(epochs * len(rows) / global_batch)
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit_loop.max_epochs = 1
        rank_zero_info(f"{epochs} epochs over {len(rows)} rows are {steps} optimizer steps")
