"""Batches of loaders of the user's own, where completions are generated or compared."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import IGNORE_INDEX, Batch, check_batch, check_contents
from lightning_kd.devices import is_queued
from lightning_kd.own_batches import evaluated, is_own, without_repetitions
from lightning_kd.teacher_rows import has_teacher_rows

_UNLABELED = 16
"""Optimizer steps one after the other without a label, after which a run is given up."""


def _no_labels(which: str) -> str:
    return (
        f"{which} had no label: all of labels is {IGNORE_INDEX}, so nothing is trained on or "
        "evaluated; give each token that is its own id there (docs/data.md)"
    )


class ReadsOwnBatches(L.LightningModule):
    """A module that adds to batches without numbers of rows what evaluation and ``predict`` read.

    Training needs nothing beyond what a batch must have; generated completions are the business of
    the callback that generates them.
    """

    tokenizer: PreTrainedTokenizerBase

    reads_teacher_rows: ClassVar[bool] = False
    """Whether the method asks a teacher about rows, which may have other prompts for it."""

    _own_rows = 0
    _before_loader = 0
    _trains_on_own = False
    _unlabeled = 0
    _labeled = False

    def check_own(self, batch: Batch, batch_idx: int) -> None:
        """Validate a batch's form, and padding and labels: of each on the CPU, elsewhere of the first.

        On an accelerator each look at values waits for it.

        Raises:
            ValueError: If it is none to train on, or prompts alone that nothing completes.
        """
        given = isinstance(batch, Mapping) and {"input_ids", "attention_mask"} <= batch.keys()
        if given and batch.get("labels") is None:
            raise ValueError(
                "the batch has no labels, so it is prompts alone, and nothing completes them here: "
                "give labels as well, or, for a method that learns from what is generated, add the "
                "callback OnPolicyGeneration with lmbda: 1 (in training)"
            )
        check_batch(batch)
        self.check_told(batch)
        if batch_idx == 0 or not is_queued(batch["input_ids"].device):
            check_contents(batch)
        self._trains_on_own = self.trainer.training and is_own(batch)

    def check_told(self, batch: Batch) -> None:
        """Validate that what a batch tells a teacher is read by one.

        Raises:
            ValueError: If the method has no teacher that reads rows.
        """
        if has_teacher_rows(batch) and not self.reads_teacher_rows:
            raise ValueError(
                f"the data tells a teacher more than the student (data.teacher_prompt_template, or "
                f"data.hint of ArithmeticData), and {type(self).__name__} asks none about its rows, so "
                "that it would change nothing; leave it out, or take a method with a teacher (GKD)"
            )

    def check_trained(self, tokens: int) -> None:
        """Validate that optimizer steps on a loader of the user's own train on something.

        Args:
            tokens: Scored tokens of a step, of all ranks.

        Raises:
            ValueError: If none of many steps has a label.
        """
        self._unlabeled = 0 if tokens or not self._trains_on_own else self._unlabeled + 1
        self._labeled |= tokens > 0
        if self._unlabeled >= _UNLABELED:
            raise ValueError(_no_labels(f"{_UNLABELED} optimizer steps in a row"))

    def on_train_epoch_start(self) -> None:
        """Count steps without labels anew."""
        self._unlabeled, self._labeled = 0, False

    def on_train_epoch_end(self) -> None:
        """Refuse an epoch of a loader of the user's own that has trained on nothing.

        Raises:
            ValueError: If none of its batches had a label.
        """
        if self._unlabeled and not self._labeled:
            raise ValueError(_no_labels("all optimizer steps of the epoch"))

    def check_evaluated(self, tokens: int) -> None:
        """Validate that an evaluation with a loader of the user's own has scored something.

        Args:
            tokens: Scored tokens of all ranks.

        Raises:
            ValueError: If it has not, so that its loss would be 0.
        """
        if tokens == 0 and self._own_rows and not self.trainer.sanity_checking:
            raise ValueError(_no_labels("all batches of the evaluation"))

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add prompts, texts and numbers of rows to a batch of a loader of the user's own."""
        if not is_own(batch):
            return
        if batch_idx == dataloader_idx == 0:
            self._own_rows = 0
        if batch_idx == 0:
            self._before_loader = self._own_rows
        first, self._own_rows = self._own_rows, self._own_rows + len(batch["input_ids"])
        predicting = bool(self.trainer.predicting)
        found = evaluated(batch, self.tokenizer, first, prompts_only=predicting)
        if "row" in found:
            places = found["row"] - self._before_loader
            processes, rank = self.trainer.world_size, self.global_rank
            found["row"] = found["row"] * processes + rank
            if processes > 1 and not predicting:
                loader = self._evaluated_loader(dataloader_idx)
                found = without_repetitions(found, loader, places * processes + rank)
            batch.update(found)

    def _evaluated_loader(self, number: int) -> object:
        trainer = self.trainer
        given = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        return CombinedLoader(given).flattened[number]

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add prompts, texts and numbers of rows to a batch of a loader of the user's own."""
        self.on_predict_batch_start(batch, batch_idx, dataloader_idx)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add prompts, texts and numbers of rows to a batch of a loader of the user's own."""
        self.on_predict_batch_start(batch, batch_idx, dataloader_idx)
