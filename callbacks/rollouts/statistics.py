"""Statistics of generated completions and of the time that generation takes."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_kd.callbacks.metric_logging import log_metrics
from lightning_kd.callbacks.rollouts.lengths import is_empty
from lightning_kd.evaluation import distinct_ngrams, repeated_ngrams
from lightning_kd.generation import Completions

_REPEATED = 4
"""Tokens of what counts as a repetition: shorter ones recur in any text."""


class RolloutStatistics:
    """Statistics of the completions of one window at a time.

    ``generated_tokens`` counts those of all windows that this process has generated.

    Args:
        histograms_every: Optimizer steps between histograms of lengths; 0 for none.
    """

    def __init__(self, histograms_every: int) -> None:
        if histograms_every < 0:
            raise ValueError(f"table_every is {histograms_every}; it must be 0 or more")
        self.histograms_every = histograms_every
        self.generated_tokens = 0
        self.begin()

    def begin(self) -> None:
        """Start a window, and its time."""
        self._started = time.perf_counter()
        self._generated: Completions | None = None
        self._seconds = 0.0

    def add(self, generated: Completions, seconds: float) -> None:
        """Add completions, and the time that generating them took."""
        self._generated = replace(generated, log_probs=None, sampling_log_probs=None)
        self._seconds = seconds
        self.generated_tokens += int(generated.mask.sum())

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics so far, for a checkpoint in the middle of a window."""
        generated = None if self._generated is None else asdict(self._generated)
        elapsed = time.perf_counter() - self._started
        return {"generated": generated, "seconds": self._seconds, "elapsed": elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a window, without the time between saving and loading."""
        self._started = time.perf_counter() - state["elapsed"]
        generated = state["generated"]
        self._generated = None if generated is None else Completions(**generated)
        self._seconds = state["seconds"]

    def end(
        self,
        trainer: L.Trainer,
        on_policy: bool,
        steps: int,
        also: Callable[[], Mapping[str, Tensor]] = dict,
        always: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Log the window that ends with this optimizer step, if any of its steps is logged.

        Args:
            trainer: The trainer.
            on_policy: Whether the student has generated the window.
            steps: Optimizer steps of the window, in all of its passes.
            also: Computes what else is logged of a window that was generated, on all ranks together.
            always: What else is logged of every window.
        """
        last = trainer.global_step
        if not passes_multiple(last - steps, last, trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return
        values = {n: torch.tensor(v) for n, v in {"on_policy": float(on_policy), **always}.items()}
        if self._generated is not None:
            values |= {**self._metrics(trainer, self._generated), **also()}
        log_metrics(trainer, {f"rollout/{name}": v for name, v in values.items()}, last - 1)

    def _metrics(self, trainer: L.Trainer, generated: Completions) -> dict[str, Tensor]:
        rows = [
            ids[mask].tolist()
            for ids, mask in zip(generated.ids.cpu(), generated.mask.cpu(), strict=True)
        ]
        repeated = [repeated_ngrams(row, _REPEATED) for row in rows]
        of_rows = [generated.mask.sum(-1), generated.ended, is_empty(generated)]
        of_rows.append(torch.tensor(repeated, device=generated.ids.device))
        own = torch.stack([values.double() for values in of_rows])
        everyone = trainer.strategy.all_gather(own).reshape(-1, *own.shape)
        all_lengths, ended, empty, again = (values.flatten() for values in everyone.unbind(1))
        grams = (all_lengths - _REPEATED + 1).clamp_min(0).sum()
        elapsed = time.perf_counter() - self._started
        last = trainer.global_step
        for logger in trainer.loggers:
            wanted = passes_multiple(last - 1, last, self.histograms_every)
            if wanted and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram("rollout/length", all_lengths, last - 1)
        # Where no completion is so long, there is no share.
        repetition = {f"repetition_{_REPEATED}": again.sum() / grams} if grams > 0 else {}
        return {
            "length_mean": all_lengths.mean(),
            "length_min": all_lengths.min(),
            "length_max": all_lengths.max(),
            "eos_rate": ended.mean(),
            "truncation_rate": 1 - ended.mean(),
            "empty_rate": empty.mean(),
            "distinct_1": torch.tensor(distinct_ngrams(rows, 1)),
            "distinct_2": torch.tensor(distinct_ngrams(rows, 2)),
            "tokens_per_second": all_lengths.sum() / self._seconds,
            "time_share": torch.tensor(self._seconds / elapsed),
            **repetition,
        }


def passes_multiple(after: int, until: int, every: int) -> bool:
    """Return whether there is a multiple of ``every`` in ``(after, until]``.

    Example:
        >>> passes_multiple(8, 12, 10), passes_multiple(10, 12, 10), passes_multiple(0, 9, 0)
        (True, False, False)
    """
    return every > 0 and until // every > after // every
