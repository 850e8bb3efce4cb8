"""Writing of what a student needs for each document of an evaluation."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_kd.batch import FILLER_ROW, Batch
from lightning_kd.callbacks.output_paths import check_output
from lightning_kd.collectives import gather_objects
from lightning_kd.data.rows import DOCUMENT
from lightning_kd.modules import DistillationModule

Totals = dict[Any, list[float]]


class DocumentLikelihoods(Callback):
    """Write nats, tokens and bytes of each document of validation and test, one JSON object each.

    ``document`` is the number of the row, or of the document where ``DocumentData`` cuts long ones
    into ``windows``: their totals are over all of these. ``nats`` is minus the log-probability of the
    scored tokens, so that ``nats / tokens`` and ``nats / bytes / ln 2`` are what the text costs per
    token and per byte; ``bytes`` are those of the scored text, ``null`` where the tokenizer does not
    tell them. An EOS that is scored is a token without bytes.

    Each evaluation writes the file anew, when it is over; that before training writes none. The lines
    do not depend on the number of processes.

    Args:
        path: Output file.
        document_column: Further column of the data (``extra_columns``) that names the document of each
            row, whose rows are added up. Defaults to the row itself.
    """

    def __init__(self, path: str = "documents.jsonl", document_column: str | None = None) -> None:
        self.path, self.document_column = Path(path), document_column
        self._totals: Totals = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the output file."""
        check_output(trainer, self.path, "DocumentLikelihoods.path")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew.

        Raises:
            ValueError: If the data is read from the output file.
        """
        check_output(trainer, self.path, "DocumentLikelihoods.path")
        self._totals = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew; see :meth:`on_validation_start`."""
        self.on_validation_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the rows of a batch.

        Raises:
            ValueError: If they do not have the column that names their documents.
        """
        assert isinstance(pl_module, DistillationModule)
        rows = batch["row"].tolist()
        for row, name, values in zip(
            rows,
            self._documents(batch, rows),
            pl_module.label_likelihood.per_row().tolist(),
            strict=True,
        ):
            if row != FILLER_ROW:
                _add(self._totals, name, values)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the rows of a batch."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add up over all processes, and write."""
        if trainer.sanity_checking:
            return
        joined: Totals = {}
        for part in gather_objects(self._totals):
            for name, values in part.items():
                _add(joined, name, values)
        self._totals = {}
        if trainer.is_global_zero:
            self._write(joined)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add up over all processes, and write."""
        self.on_validation_end(trainer, pl_module)

    def _documents(self, batch: Batch, rows: list[int]) -> list[Any]:
        further = batch.get("extra", {})
        if self.document_column is None:
            return further.get(DOCUMENT, rows)
        if self.document_column not in further:
            raise ValueError(
                f"document_column is {self.document_column!r}, and the rows have {sorted(further)}; "
                "name it in data.extra_columns"
            )
        return further[self.document_column]

    def _write(self, totals: Totals) -> None:
        lines = []
        for name in sorted(totals):
            nats, tokens, size = totals[name]
            known = int(size) if size == size else None
            record = {"document": name, "nats": nats, "tokens": int(tokens), "bytes": known}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_name(self.path.name + ".tmp")
        written.write_text("".join(lines), encoding="utf-8")
        written.replace(self.path)
        rank_zero_info(f"the likelihoods of {len(lines)} documents are in {self.path}")


def _add(totals: Totals, name: Any, values: list[float]) -> None:
    so_far = totals.get(name, [0.0] * len(values))
    totals[name] = [a + b for a, b in zip(so_far, values, strict=True)]
