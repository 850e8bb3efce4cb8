"""A micro-batch that a model runs on before it is asked about it."""

from dataclasses import dataclass
from typing import Self

import torch
from transformers import PreTrainedModel

from lightning_kd.batch import Batch
from lightning_kd.devices import origin_of, to_device
from lightning_kd.fused import LazyLogits
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.scoring import ScoredPositions


@dataclass(frozen=True)
class Announced:
    """A micro-batch on the device of a model, and what the model makes of it."""

    batch: Batch
    positions: ScoredPositions
    backend: LogitsBackend
    origins: tuple[object, ...]
    logits: LazyLogits | None = None

    @classmethod
    def of(
        cls, batch: Batch, positions: ScoredPositions, backend: LogitsBackend, there: torch.device
    ) -> Self:
        """Move a micro-batch to the device of a model."""
        moved: Batch = {
            **batch,
            "input_ids": to_device(batch["input_ids"], there),
            "attention_mask": to_device(batch["attention_mask"], there),
        }
        return cls(moved, positions.on(there), backend, _origins(batch))

    def is_about(self, batch: Batch, positions: ScoredPositions, backend: LogitsBackend) -> bool:
        """Return whether it is known to be of a batch and its positions, without a look at values."""
        known = self.positions.key is not None and self.positions.key == positions.key
        return known and self.backend is backend and self.origins == _origins(batch)

    def read(self, model: PreTrainedModel) -> LazyLogits:
        """Run the model."""
        return self.backend.read(model, self.batch, self.positions)


def _origins(batch: Batch) -> tuple[object, ...]:
    return tuple(origin_of(batch[name]) for name in ("input_ids", "attention_mask"))
