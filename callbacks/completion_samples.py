"""Evaluation and logging of the student's completions."""

from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_kd.batch import FILLER_ROW, Batch, has_prompts
from lightning_kd.callbacks.text_tables import log_table
from lightning_kd.collectives import any_process
from lightning_kd.evaluation import ExactMatch
from lightning_kd.generation import GenerationOptions
from lightning_kd.models.positions import check_length
from lightning_kd.modules import DistillationModule
from lightning_kd.modules.student_module import longest_rows
from lightning_kd.strategies import adapter_of

Stage = Literal["val", "test"]


class CompletionSamples(Callback):
    """Complete validation prompts greedily; log the share of exact matches and a table of samples.

    Logs ``val/exact_match`` (``test/exact_match``) over the first ``batches`` batches, and the table
    ``val/samples`` to each logger that can show one (TensorBoard, Weights & Biases). Batches without
    prompts are skipped.

    Args:
        max_new_tokens: Largest number of tokens of a completion.
        batches: Number of evaluation batches that each rank completes; -1 for all.
        samples: Number of rows of the table.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(self, max_new_tokens: int = 128, batches: int = -1, samples: int = 8) -> None:
        if batches < -1 or batches == 0:
            raise ValueError(f"batches is {batches}; give 1 or more, or -1 for all")
        if samples < 0:
            raise ValueError(f"samples is {samples}; it must be 0 or more")
        self.options = GenerationOptions(max_new_tokens=max_new_tokens)
        self.batches = batches
        self.samples = samples
        self._metric = ExactMatch()
        self._table: list[tuple[str, str, str]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate that prompts and completions fit into the student's positions.

        Raises:
            ValueError: If they are longer.
        """
        self._check_lengths(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the lengths in a run that only validates."""
        self._check_lengths(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the lengths of test data."""
        self._check_lengths(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Complete the batch."""
        self._complete(pl_module, batch, batch_idx)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Complete the batch."""
        self._complete(pl_module, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the metric and the table."""
        self._log("val", trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the metric and the table."""
        self._log("test", trainer, pl_module)

    def _check_lengths(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not isinstance(module, DistillationModule):
            return
        longest = longest_rows(trainer)
        prompt = max((longest[s][1] for s in ("validation", "test") if s in longest), default=0)
        if prompt > 0:
            length = prompt + self.options.max_new_tokens
            what = "prompts and max_new_tokens of CompletionSamples"
            check_length({"student": module.student}, length, what)

    def _complete(self, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        beyond = self.batches != -1 and batch_idx >= self.batches
        if beyond or not has_prompts(batch) or not isinstance(module, DistillationModule):
            return
        with adapter_of(module.trainer).outside_of_steps():
            completions = module.complete(batch, purpose="samples", options=self.options)
        texts = completions.texts(module.tokenizer)
        rows = [
            (prompt, text, reference)
            for row, prompt, text, reference in zip(
                batch["row"].tolist(), batch["prompt"], texts, batch["completion"], strict=True
            )
            if row != FILLER_ROW
        ]
        self._metric.to(module.device)
        self._metric.update([row[1] for row in rows], [row[2] for row in rows])
        self._table += rows[: self.samples - len(self._table)]

    def _log(self, stage: Stage, trainer: L.Trainer, module: L.LightningModule) -> None:
        # On every rank: one without a row or a batch must take part in the sum.
        if any_process(self._metric.update_called, module.device):
            self._metric.to(module.device).update([], [])
            share = self._metric.compute()
            module.log(f"{stage}/exact_match", share, prog_bar=True, sync_dist=True)
        if self._table:
            header = ("prompt", "completion", "reference")
            log_table(trainer, f"{stage}/samples", header, self._table, trainer.global_step)
        self._metric.reset()
        self._table = []
