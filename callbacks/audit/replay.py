"""Replay of optimizer steps as in Lightning's automatic optimization, without the update."""

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

from lightning_kd.callbacks.audit.micro_batch_partitioning import clone_batch, padded_length
from lightning_kd.callbacks.audit.replacements import replaced, restored
from lightning_kd.callbacks.audit.single_process import SingleProcess
from lightning_kd.callbacks.audit.state_snapshot import StateSnapshot

Gradient = list[Tensor]
"""One tensor for each parameter that trains."""

Mode = Literal["training", "no_dropout", "evaluation"]
"""As the module trained; in evaluation except for batch norms; all in evaluation."""

REPLAY_ERRORS = (ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, AssertionError)
"""Errors of a module that does not support a partitioning: reported, while the run continues."""

_NEVER_CLIPS = 1e30
_COLUMNS = 8


class StepReplay:
    """Replay of optimizer steps of one module, each from the same state.

    A step is computed as in Lightning's automatic optimization, with the module's hooks in
    Lightning's order, up to and including ``configure_gradient_clipping``.

    Args:
        trainer: The trainer of the module.
        module: A module with automatic optimization.
        snapshot: The state that each step starts from.
        single_process: Replaces what the module holds of its processes, while it is active.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        snapshot: StateSnapshot,
        single_process: SingleProcess,
    ) -> None:
        self.trainer: Any = trainer
        self.module, self.snapshot = module, snapshot
        self.single_process = single_process
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
        previous: Sequence[Any] = (),
    ) -> Gradient:
        """Compute the gradient of one optimizer step.

        Args:
            micro_batches: The micro-batches of this process.
            over_ranks: Whether to take the mean over processes, as the strategy does.
            seed: Seed of other random numbers than those of the saved state.
            previous: Micro-batches of a step to take first, after which state is not restored.
        """
        while True:
            self.snapshot.restore()
            self.single_process.replace_in_module()
            self._set_mode()
            if seed is not None:
                self.snapshot.reseed(seed)
            if previous:
                self._step(previous, over_ranks=False, completed=True)
            gradient = self._step(micro_batches, over_ranks=over_ranks, completed=False)
            if self._scale <= 1 or all(bool(g.isfinite().all()) for g in gradient):
                return gradient
            self._scale /= 16  # as a gradient scaler does after an overflow

    @contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        """Compute gradients in another mode."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def max_padding(self, batch: Any) -> int:
        """Return how many columns, up to 8, can be appended without exceeding position embeddings.

        An index out of range is an assertion on a GPU, after which the GPU cannot be used.
        """
        width = padded_length(batch)
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
        """Return the names of batch norms that train with statistics of the micro-batch."""
        self.snapshot.restore()
        return [n for n, part in self.module.named_modules() if _uses_batch_statistics(part)]

    def _set_mode(self) -> None:
        if self.mode == "training":
            return
        for part in self.module.modules():
            if self.mode == "evaluation" or not _uses_batch_statistics(part):
                part.training = False

    def _step(self, micro_batches: Sequence[Any], *, over_ranks: bool, completed: bool) -> Gradient:
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
            batch, last = clone_batch(original), index + 1 == count
            self._count_batch(index, count)
            module.on_train_batch_start(batch, index)
            outputs: dict[str, Any] = {}
            closure = self._closure(batch, index, over_ranks and last, outputs)
            if last:
                capture: Any = _StepCapture(optimizer, before_step)
                module.optimizer_step(self.trainer.current_epoch, index, capture, closure)
            else:
                closure()
            if completed:
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
        """Set the loop's counters to this micro-batch of the step."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = self.trainer.num_training_batches
        finished = 0 if batches == float("inf") else count * (int(batches) // count + 1)
        progress.current.ready = finished + index + 1
        progress.is_last_batch = index + 1 == count


class _StepCapture:
    """Optimizer passed to ``optimizer_step`` that computes the gradient but updates nothing."""

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
def isolated(trainer: Any, module: L.LightningModule) -> Iterator[None]:
    """Turn off logging and clipping, and restore what a step changes in the trainer."""
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
    """Return whether ``training_step`` receives batches, instead of reading the loader itself."""
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
