"""Batches of loaders of the user's own, where completions are generated or compared."""

from typing import Any

import lightning as L
from transformers import PreTrainedTokenizerBase

from lightning_kd.own_batches import evaluated, is_own


class ReadsOwnBatches(L.LightningModule):
    """A module that adds to batches without numbers of rows what evaluation and ``predict`` read.

    Training needs nothing beyond what a batch must have; generated completions are the business of
    the callback that generates them.
    """

    tokenizer: PreTrainedTokenizerBase

    _own_rows = 0

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add prompts, texts and numbers of rows to a batch of a loader of the user's own."""
        if not is_own(batch):
            return
        if batch_idx == dataloader_idx == 0:
            self._own_rows = 0
        first, self._own_rows = self._own_rows, self._own_rows + len(batch["input_ids"])
        predicting = bool(self.trainer.predicting)
        found = evaluated(batch, self.tokenizer, first, prompts_only=predicting)
        if "row" in found:
            found["row"] = found["row"] * self.trainer.world_size + self.global_rank
            batch.update(found)

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add prompts, texts and numbers of rows to a batch of a loader of the user's own."""
        self.on_predict_batch_start(batch, batch_idx, dataloader_idx)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add prompts, texts and numbers of rows to a batch of a loader of the user's own."""
        self.on_predict_batch_start(batch, batch_idx, dataloader_idx)
