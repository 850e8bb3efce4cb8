"""Counts of an optimizer step before it is taken, for terms with a normalization of their own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.hooks import DataHooks
from torch import Tensor

from lightning_kd.batch import Batch, Rollout
from lightning_kd.devices import LateCopy, pinned, to_device
from lightning_kd.loops.progress import show
from lightning_kd.modules.half_precision import ScaledSumModule
from lightning_kd.modules.loss_sums import ReducedSums
from lightning_kd.normalization import BatchMean, Normalization, constant_ratio, divisor
from lightning_kd.scoring import ScoredPositions, find_places
from lightning_kd.strategies import searches_of

_MOVE = "transfer_batch_to_device"
_PLAIN = DataHooks.transfer_batch_to_device
"""Moves a batch as it is, which a hook of the user's own need not."""


@runtime_checkable
class WindowLoader(Protocol):
    """Loader that knows which micro-batches follow."""

    def window_of(self, batch: Batch) -> tuple[Sequence[Batch], int]:
        """Return this rank's micro-batches of a batch's window, and the batch's place among them."""
        ...


class StepCountingModule(ScaledSumModule):
    r"""A module whose loss may have terms with normalizations of their own.

    The gradients of all terms add up in one place, which is divided once by the module's count
    :math:`C`. A term with a count :math:`C'` of its own is multiplied by :math:`C / C'` before the
    backward pass, with both counts of the whole optimizer step: so they are counted before its first
    micro-batch is trained on.
    """

    normalization: Normalization
    """Of the loss, and of every term without one of its own."""

    terms: tuple[str, ...]
    """Names of the loss's terms, as methods return them and as loggers show them."""

    _step_sums: ReducedSums
    _late_sums = LateCopy()
    _late_counts = LateCopy()
    _count_ratios: Mapping[str, Tensor | float] | None = None
    _counted: Sequence[str] = ()

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        """Find on the host where a batch is scored, and move it without waiting."""
        # Lightning warns of a module with the hook itself that comes with a data module.
        owners = self, getattr(self._trainer, "datamodule", None) or self
        if hook_name != _MOVE or any(getattr(type(o), _MOVE) is not _PLAIN for o in owners):
            return super()._call_batch_hook(hook_name, *args)
        batch, device, number = args
        moved = super()._call_batch_hook(hook_name, pinned(batch, device), device, number)
        find_places(batch, moved)
        return moved

    def positions(self, batch: Batch) -> ScoredPositions:
        """Return which logits are scored: those that predict a label."""
        return ScoredPositions.from_labels(batch["labels"])

    @property
    def term_normalizations(self) -> Mapping[str, Normalization]:
        """Normalizations of terms that the method divides differently from the others, by name."""
        return {}

    def term_positions(self, name: str, batch: Batch) -> ScoredPositions:
        """Return the positions of a term with a normalization of its own, which counts them.

        Args:
            name: One of :attr:`term_normalizations`.
            batch: A micro-batch, on any device, on which no model has run.
        """
        return self.positions(batch)

    def constant_count_ratios(self) -> Mapping[str, float]:
        """Return :math:`C / C'` of the terms for which it is one number, whatever the rows are.

        Nothing need be counted ahead for these. Unless a method says otherwise, it is so where both
        normalizations count the same rows (``sequence``, ``batch``, constant).
        """
        if type(self).term_positions is not StepCountingModule.term_positions:
            return {}
        ratios = {
            name: constant_ratio(self.normalization, own)
            for name, own in self.term_normalizations.items()
        }
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}

    def count_step(self, batches: Sequence[Batch]) -> None:
        """Count an optimizer step before its first backward pass; all ranks call it together.

        Args:
            batches: This rank's micro-batches of the step, the one that comes first among them.
        """
        ratios: dict[str, Tensor | float] = dict(self.constant_count_ratios())
        names = self._counted_ahead()
        if names:
            counts = torch.stack([self._counts(batch, names) for batch in batches]).sum(0)
            of_module, *of_terms = divisor(self.sum_over_ranks(counts)).unbind()
            ratios |= {n: of_module / count for n, count in zip(names, of_terms, strict=True)}
        self._count_ratios = ratios

    def count_rollouts(self, batch: Batch, window: Sequence[Rollout], place: int) -> None:
        """Count the optimizer step that a rollout begins; the loader does not know their lengths.

        Args:
            batch: The micro-batch to train on.
            window: This rank's rollouts.
            place: Index of the micro-batch among them.
        """
        accumulate = self.trainer.accumulate_grad_batches
        if self.term_normalizations and place % accumulate == 0:
            self.count_step([batch, *window[place + 1 : place + accumulate]])

    def configure_callbacks(self) -> list[Callback]:
        """Add the callback that counts each step as it begins."""
        return [*super().configure_callbacks(), _StepCounter()]

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on every rank."""
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")

    def step_batches(self, batch: Batch) -> Sequence[Batch]:
        """Return this rank's micro-batches of the optimizer step that a batch begins.

        Raises:
            ValueError: If others are to follow, and the loader does not tell them.
        """
        accumulate = self.trainer.accumulate_grad_batches
        if accumulate == 1 or not self._counted_ahead():
            return [batch]
        loader = self.trainer.train_dataloader
        if not isinstance(loader, WindowLoader):
            raise ValueError(self._refusal(loader, accumulate))
        window, place = loader.window_of(batch)
        return [batch, *window[place + 1 : place + accumulate]]

    def check_counts(self) -> None:
        """Compare what was counted ahead with what was scored, off the CPU of the step before.

        Raises:
            ValueError: If it differs, so that the gradient of the step was wrong.
        """
        sums, ratios = self._step_sums.sums, self._count_ratios or {}
        self._count_ratios, self._counted = None, list(ratios)
        if not ratios:
            return
        told = [r if isinstance(r, Tensor) else sums.new_full((), r) for r in ratios.values()]
        self._compare_counts(self._late_counts.exchange(torch.cat([sums, torch.stack(told)])))

    def check_sums(self) -> None:
        """Check counts and tokens of the step, off the CPU those of the step before.

        Raises:
            ValueError: If a normalization counts wrongly, or many steps have trained on nothing.
        """
        self._look_at_sums(self._late_sums.exchange(self._step_sums.sums))

    def check_last_step(self) -> None:
        """Check the last step, where only those before it have been.

        Raises:
            ValueError: As :meth:`check_sums` and :meth:`check_counts`.
        """
        self._look_at_sums(self._late_sums.flush())
        self._compare_counts(self._late_counts.flush())

    def on_train_epoch_end(self) -> None:
        """Check the last step, and see ``ReadsOwnBatches``."""
        self.check_last_step()
        super().on_train_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save nothing of a step that was divided wrongly."""
        self.check_last_step()
        super().on_save_checkpoint(checkpoint)

    def _look_at_sums(self, sums: Tensor | None) -> None:
        if sums is not None:
            step = self._step_sums.on_host(sums).read()
            show(self.trainer, "train/loss", step.means["loss"])
            self.check_trained(step.tokens)

    def _compare_counts(self, row: Tensor | None) -> None:
        if row is None:
            return
        start = len(row) - len(self._counted)
        step = self._step_sums.on_host(row[:start]).read()
        for name, ratio in zip(self._counted, row[start:].tolist(), strict=True):
            own = step.counts[name]
            if own > 0 and not math.isclose(ratio * own, step.divisor, rel_tol=1e-6):
                raise ValueError(
                    f"the step was divided by {step.divisor:g}, its term {name} by {own:g}, but "
                    f"{type(self).__name__} had expected a ratio of {ratio:g} before it: the "
                    "positions of the term must be those that term_positions returns, and "
                    "constant_count_ratios must hold for every step"
                )

    @property
    def count_ratios(self) -> Mapping[str, Tensor | float]:
        """Return the ratio :math:`C / C'` of this step, for each term with a count of its own.

        Raises:
            RuntimeError: If nothing has counted the step.
        """
        if self._count_ratios is None and self.term_normalizations:
            raise RuntimeError(
                "the step was not counted: call count_step before the first training_step of an "
                "optimizer step where no Trainer does it"
            )
        return self._count_ratios or {}

    def _counted_ahead(self) -> list[str]:
        constant = self.constant_count_ratios()
        return [name for name in self.term_normalizations if name not in constant]

    def _counts(self, batch: Batch, names: Sequence[str]) -> Tensor:
        """Return what a micro-batch adds to the module's count, and to those of single terms."""
        own = [
            self.term_normalizations[name].count(self.term_positions(name, batch).tokens_per_row)
            for name in names
        ]
        of_module = self.normalization.count(self.positions(batch).tokens_per_row)
        return to_device(torch.stack([of_module, *own]), self.device)

    def _refusal(self, loader: object, accumulate: int) -> str:
        (name, *_) = self._counted_ahead()
        own = self.term_normalizations[name]
        alike = "sequence" if isinstance(own, BatchMean) else "token"
        return (
            f"{type(self).__name__} divides its term {name} by the count of {own!r} and others by "
            f"that of {self.normalization!r}. With accumulate_grad_batches {accumulate}, the ratio "
            f"of both must be known before the first micro-batch of a step, and a "
            f"{type(loader).__name__} does not tell what follows. Train with a data module that "
            "derives from DistillationData, set accumulate_grad_batches: 1, or set "
            f"model.normalization: {alike} (which counts the same, over the same positions)"
        )


class _StepCounter(Callback):
    """Counts each optimizer step as it begins, after the callbacks that generate completions."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        searches = searches_of(trainer)
        if searches and _counting(pl_module).term_normalizations:
            raise ValueError(
                f"{type(searches[0]).__name__} searches without the callback that counts the terms of "
                f"{type(pl_module).__name__}; compare short runs instead"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = _counting(pl_module)
        # A run that was broken off has left those of its last step.
        module._count_ratios = None
        module._late_sums, module._late_counts = LateCopy(), LateCopy()
        unknown = [name for name in module.term_normalizations if name not in module.terms]
        if unknown:
            raise ValueError(
                f"term_normalizations of {type(module).__name__} names {unknown}; its terms are "
                f"{', '.join(module.terms)}"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        module = _counting(pl_module)
        if module.term_normalizations and module._count_ratios is None:
            module.count_step(module.step_batches(batch))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        module = _counting(pl_module)
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if module.term_normalizations and ends_step:
            module.check_counts()


def _counting(module: L.LightningModule) -> StepCountingModule:
    assert isinstance(module, StepCountingModule)  # it has brought this callback
    return module
