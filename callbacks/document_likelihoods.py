"""Writing of what a student needs for each document of an evaluation."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_kd.batch import FILLER_ROW, Batch
from lightning_kd.callbacks.evaluations import EvaluationCallback, Stage
from lightning_kd.callbacks.output_paths import check_output
from lightning_kd.collectives import gather_objects
from lightning_kd.filesystem import write_text
from lightning_kd.modules import DistillationModule

Totals = dict[Any, list[float]]


class DocumentLikelihoods(EvaluationCallback):
    """Write nats, tokens and bytes of each document of validation and test, one JSON object each.

    ``document`` is the number of the row in the data as given, dropped ones counted, or of the document
    where ``DocumentData`` cuts long ones into ``windows``: their totals are over all of these.
    ``nats`` is minus the log-probability of the scored tokens, so that ``nats / tokens`` and
    ``nats / bytes / ln 2`` are what the text costs per token and per byte; ``bytes`` are those of the
    scored text, ``null`` where the tokenizer does not tell them. An EOS that is scored is a token
    without bytes.

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

    def check(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
        """Validate the output file.

        Raises:
            ValueError: If the data is read from it, or another callback writes it.
        """
        alike = [c for c in trainer.callbacks if isinstance(c, DocumentLikelihoods)]  # type: ignore[attr-defined]
        if [other.path.absolute() for other in alike].count(self.path.absolute()) > 1:
            raise ValueError(
                f"two DocumentLikelihoods write {self.path}, and one file would be left; give each a "
                "path of its own, or leave one out"
            )
        data = getattr(trainer, "datamodule", None)
        check_output(data, self.path, "DocumentLikelihoods.path")

    def begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin anew."""
        self._totals = {}

    def add(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Add the rows of a batch.

        Raises:
            ValueError: If they do not have the column that names their documents.
        """
        assert isinstance(module, DistillationModule)
        rows = batch["row"].tolist()
        for row, name, values in zip(
            rows,
            self._documents(batch, rows),
            module.label_likelihood.per_row().tolist(),
            strict=True,
        ):
            if row != FILLER_ROW:
                _add(self._totals, name, values)

    def end(self, trainer: L.Trainer, module: L.LightningModule, stage: Stage) -> None:
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

    def _documents(self, batch: Batch, rows: list[int]) -> list[Any]:
        further = batch.get("extra", {})
        if self.document_column is None:
            return batch["document"].tolist() if "document" in batch else rows
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
        write_text(self.path, "".join(lines))
        rank_zero_info(f"the likelihoods of {len(lines)} documents are in {self.path}")


def _add(totals: Totals, name: Any, values: list[float]) -> None:
    so_far = totals.get(name, [0.0] * len(values))
    totals[name] = [a + b for a, b in zip(so_far, values, strict=True)]
