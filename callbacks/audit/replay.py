"""Gradients of a module as Lightning's automatic optimization computes them, without a step."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_kd.callbacks.audit.micro_batch_partitioning import fresh_copy, width_of
from lightning_kd.callbacks.audit.one_process import OneProcessView
from lightning_kd.callbacks.audit.replacements import replaced, restored
from lightning_kd.callbacks.audit.state_snapshot import StateSnapshot

Gradient = list[Tensor]
"""One tensor for each parameter that trains."""

Mode = Literal["training", "evaluation", "frozen"]
"""As the module trained; without dropout, but with the statistics of batch norms; all in evaluation."""

REFUSALS = (ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, AssertionError)
"""What a module may raise that does not take a cut: it is reported, and the run goes on."""

_NEVER_CLIPS = 1e30
_COLUMNS = 8


class GradientRunner:
    """Computes gradients of one module, each from the same state.

    A step goes the way of Lightning's automatic optimization, with the hooks of the module in
    Lightning's order, up to and including ``configure_gradient_clipping``; then it ends.

    Args:
        trainer: The trainer of the module.
        module: A module with automatic optimization.
        snapshot: The state that each gradient begins from.
        view: Where the run has several processes, the surroundings of one.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        snapshot: StateSnapshot,
        view: OneProcessView,
    ) -> None:
        self.trainer: Any = trainer
        self.module, self.snapshot, self.view = module, snapshot, view
        self.mode: Mode = "training"
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())
        self._with_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def gradient(
        self,
        micro_batches: Sequence[Any],
        *,
        over_ranks: bool = False,
        seed: int | None = None,
        after: Sequence[Any] = (),
    ) -> Gradient:
        """Compute the gradient of one optimizer step.

        Args:
            micro_batches: Those of this process.
            over_ranks: Whether to take the mean over processes, as the strategy does.
            seed: For other random numbers than those of the saved state.
            after: Micro-batches of a step to take before it, without restoring the state.
        """
        while True:
            self.snapshot.restore()
            self.view.substitute()
            self._set_mode()
            if seed is not None:
                self.snapshot.reseed(seed)
            if after:
                self._step(after, over_ranks=False, ended=True)
            gradient = self._step(micro_batches, over_ranks=over_ranks, ended=False)
            if self._scale <= 1 or all(bool(g.isfinite().all()) for g in gradient):
                return gradient
            self._scale /= 16  # as a gradient scaler would after an overflow

    @contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        """Compute gradients in another mode."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def room_for_columns(self, batch: Any) -> int:
        """Return how many columns, up to 8, can be appended without exceeding a table of positions.

        A table that is too small is an assertion on a GPU, after which it cannot be used.
        """
        width = width_of(batch)
        if width is None:
            return 0
        limits = [
            part.num_embeddings
            for part in self.module.modules()
            if isinstance(part, torch.nn.Embedding)
        ]
        for part in self.module.modules():
            limit = getattr(getattr(part, "config", None), "max_position_embeddings", None)
            limits += [limit] if isinstance(limit, int) else []
        return min([_COLUMNS, *(limit - width for limit in limits if limit >= width)])

    def batch_norms(self) -> list[str]:
        """Name the batch norms that trained with statistics of the micro-batch."""
        self.snapshot.restore()
        return [n for n, part in self.module.named_modules() if _uses_batch_statistics(part)]

    def _set_mode(self) -> None:
        if self.mode == "training":
            return
        for part in self.module.modules():
            if self.mode == "frozen" or not _uses_batch_statistics(part):
                part.training = False

    def _step(self, micro_batches: Sequence[Any], *, over_ranks: bool, ended: bool) -> Gradient:
        module, optimizer, count = self.module, self.trainer.optimizers[0], len(micro_batches)
        for parameter in self.parameters:
            parameter.grad = None
        self.trainer.accumulate_grad_batches = count
        gradient: Gradient = []

        def before_step() -> None:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self._scale)
            module.on_before_optimizer_step(optimizer)
            module.configure_gradient_clipping(
                optimizer,
                gradient_clip_val=self.trainer.gradient_clip_val,
                gradient_clip_algorithm=self.trainer.gradient_clip_algorithm,
            )
            gradient[:] = [_dense(p) for p in self.parameters]

        for index, original in enumerate(micro_batches):
            batch, last = fresh_copy(original), index + 1 == count
            self._count_batch(index, count)
            module.on_train_batch_start(batch, index)
            outputs: dict[str, Any] = {}
            closure = self._closure(batch, index, over_ranks and last, outputs)
            if last:
                capture: Any = _StepCapture(optimizer, before_step)
                module.optimizer_step(self.trainer.current_epoch, index, capture, closure)
            else:
                closure()
            if ended:
                module.on_train_batch_end(outputs, batch, index)
        return gradient or [_dense(p) for p in self.parameters]

    def _closure(
        self, batch: Any, index: int, reduces: bool, outputs: dict[str, Any]
    ) -> Callable[[], Tensor | None]:
        module, optimizer = self.module, self.trainer.optimizers[0]

        def closure() -> Tensor | None:
            with torch.enable_grad(), self.trainer.precision_plugin.train_step_context():
                output: Any = module.training_step(batch, *([index] if self._with_index else []))
            loss = output["loss"] if isinstance(output, Mapping) else output
            if index == 0:
                module.on_before_zero_grad(optimizer)
                module.optimizer_zero_grad(self.trainer.current_epoch, index, optimizer)
            if loss is None:
                return None
            outputs.update(output if isinstance(output, Mapping) else {"loss": loss.detach()})
            scaled: Tensor = loss / self.trainer.accumulate_grad_batches
            if self._scale != 1:
                scaled = scaled.float() * self._scale
            with torch.enable_grad():
                module.on_before_backward(scaled)
                module.backward(scaled)
            if reduces:
                self._average_over_ranks()
            module.on_after_backward()
            return scaled.detach()

        return closure

    def _average_over_ranks(self) -> None:
        for parameter in self.parameters:
            gradient = _dense(parameter)
            torch.distributed.all_reduce(gradient)
            parameter.grad = gradient / self.trainer.world_size

    def _count_batch(self, index: int, count: int) -> None:
        """Let the loop's counters say which micro-batch of the window this is."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = self.trainer.num_training_batches
        finished = 0 if batches == float("inf") else count * (int(batches) // count + 1)
        progress.current.ready = finished + index + 1
        progress.is_last_batch = index + 1 == count


class _StepCapture:
    """Stands in for the optimizer in ``optimizer_step``: everything up to the step, but no step."""

    def __init__(self, optimizer: Any, before_step: Callable[[], None]) -> None:
        self.optimizer = optimizer
        self._before_step = before_step

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> None:
        if closure is not None:
            closure()
        self._before_step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


@contextmanager
def silenced(trainer: Any, module: L.LightningModule) -> Iterator[None]:
    """Log nothing, never clip, and put back what a step changes of the trainer."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    with ExitStack() as replacements:
        replacements.enter_context(restored(trainer, "accumulate_grad_batches", "should_stop"))
        replacements.enter_context(restored(progress, "is_last_batch"))
        replacements.enter_context(restored(progress.current, "ready"))
        loggers = [DummyLogger() for _ in trainer.loggers]
        replacements.enter_context(replaced(trainer, loggers=loggers))
        if trainer.gradient_clip_val is not None:
            replacements.enter_context(replaced(trainer, gradient_clip_val=_NEVER_CLIPS))
        for part in module.modules():
            if isinstance(part, L.LightningModule):
                replacements.enter_context(replaced(part, log=_log_nothing, log_dict=_log_nothing))
        yield


def takes_batches(module: L.LightningModule) -> bool:
    """Tell whether ``training_step`` is given batches, and does not read the loader itself."""
    return "dataloader_iter" not in inspect.signature(module.training_step).parameters


def _log_nothing(*_: Any, **__: Any) -> None:
    return None


def _uses_batch_statistics(part: torch.nn.Module) -> bool:
    return isinstance(part, _BatchNorm) and part.training


def _dense(parameter: torch.nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach().clone()
