"""Adapters of strategies: the contract, and that of one process or DDP."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Generic, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_kd.devices import to_device

S = TypeVar("S", bound=Strategy)
A = TypeVar("A", bound="type[StrategyAdapter[Any]]")


class StrategyAdapter(Generic[S]):
    """Adapter of strategies that replicate the student: one process, or DDP.

    Each family that shards something derives from it beside its strategy, and says with
    :func:`register_adapter` which strategies it is for. Nothing else asks what kind of strategy runs.

    Args:
        trainer: The trainer whose strategy is asked.
    """

    shards_weights: bool = False
    """Whether a process holds only its share of the student's weights."""

    flattens_weights: ClassVar[bool] = False
    """Whether that share is of several weights as one row, so that no weight is there as it is."""

    writes_directories: bool = False
    """Whether a checkpoint is a directory of shards instead of one file."""

    scales_loss_before_backward: ClassVar[bool] = False
    """Whether the loss is divided before the backward pass, since gradients cannot be."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer

    @property
    def strategy(self) -> S:
        """The trainer's strategy."""
        return self.trainer.strategy  # type: ignore[return-value]

    def check(self) -> None:
        """Refuse settings of the trainer that this strategy does not support.

        Raises:
            ValueError: If the strategy, or a setting under it, is not supported.
        """

    def shard_mesh(self) -> DeviceMesh | None:
        """Return the processes that share weights under FSDP2; None under another strategy.

        Raises:
            ValueError: If the strategy splits single tensors, which nothing here does.
        """
        return None

    # A step. The gradient of an undivided sum is divided by the count of the whole step, which is
    # known after its last micro-batch. An adapter says where that division takes place.

    def scale_loss(
        self, total: Tensor, sum_scale: Callable[[], float], step_scale: Callable[[], Tensor]
    ) -> Tensor:
        """Scale the weighted sum of a micro-batch for its backward pass.

        Args:
            total: The weighted sum, undivided.
            sum_scale: Returns the factor of an undivided sum, which keeps it in fp16's range.
            step_scale: Closes the step and returns the factor that makes its sum the loss, ``()``,
                float64, on the device of the loss. Call it once per optimizer step: here, or in
                :meth:`scale_gradients`.
        """
        return total * sum_scale()

    def scale_gradients(
        self, gradients: Sequence[Tensor], step_scale: Callable[[], Tensor]
    ) -> None:
        """Divide the gradients of a step in place, unscaled and before clipping.

        Args:
            gradients: Those that this process has.
            step_scale: See :meth:`scale_loss`.
        """
        factor = step_scale()
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        for device, dtype in {(gradient.device, gradient.dtype) for gradient in local}:
            alike = [g for g in local if (g.device, g.dtype) == (device, dtype)]
            there = to_device(factor, device)
            if dtype.itemsize >= 4:
                torch._foreach_mul_(alike, there.to(dtype))
                continue
            for gradient in alike:  # a factor of 8 bits would be another one
                gradient.copy_(gradient.float().mul_(there.float()))

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """Return the norm of the whole gradient before clipping; None if it is not known yet."""
        return torch.nn.utils.get_total_norm(gradients)

    def gradient_norm_after_step(self) -> Tensor | None:
        """Return the norm before clipping, if it is known only after the optimizer step."""
        return None

    def clip(
        self,
        module: L.LightningModule,
        optimizer: Optimizer,
        value: float | None,
        algorithm: str | None,
    ) -> None:
        """Clip the gradients with the trainer's options, unless the strategy has done it."""
        module.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm)

    def skipped_last_step(self) -> bool:
        """Return whether the strategy skipped the last optimizer step: its gradient was not finite."""
        return False

    # The student outside of a step.

    def outside_of_steps(self) -> AbstractContextManager[None]:
        """Return a context in which a callback can run the student outside of the trainer's steps."""
        return nullcontext()

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all weights of a model, in CPU memory.

        All processes call it together; the first one gets the weights, others may get nothing.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(model, options=options)
        return weights


class RefusedAdapter(StrategyAdapter[Strategy]):
    """Adapter of a strategy of Lightning that has a replacement in this library."""

    writes_directories = True
    replacement: ClassVar[str]
    """The class to use instead."""
    name: ClassVar[str]
    """One of its names on the command line."""

    def check(self) -> None:
        """Refuse the strategy.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{type(self.strategy).__name__} of Lightning reads checkpoints with pickle and writes "
            f"over the last one; use {self.replacement} of lightning_kd, or its name, such as "
            f"--trainer.strategy {self.name}"
        )


_ADAPTERS: dict[type[Strategy], type[StrategyAdapter[Any]]] = {}


def register_adapter(strategy: type[Strategy]) -> Callable[[A], A]:
    """Register a class as the adapter of a strategy and of those that derive from it.

    Example:
        >>> from lightning.pytorch.strategies import DDPStrategy
        >>> class Elastic(DDPStrategy): ...
        >>> @register_adapter(Elastic)
        ... class ElasticAdapter(StrategyAdapter[Elastic]): ...
    """

    def register(adapter: A) -> A:
        _ADAPTERS[strategy] = adapter
        return adapter

    return register


def adapter_of(trainer: L.Trainer) -> StrategyAdapter[Any]:
    """Return the adapter of a trainer's strategy: that of its nearest registered class."""
    kinds = type(trainer.strategy).__mro__
    adapter = next((_ADAPTERS[kind] for kind in kinds if kind in _ADAPTERS), StrategyAdapter)
    return adapter(trainer)
