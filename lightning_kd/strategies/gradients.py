"""What a module does with its gradients, whoever keeps them."""

import math
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_kd.strategies.deepspeed import DeepSpeedStrategy
from lightning_kd.strategies.fsdp1 import FSDP1Strategy


def scales_loss_before_backward(trainer: L.Trainer) -> bool:
    """Must the loss be divided before the backward pass, because nobody sees the gradients after it?

    So it is under DeepSpeed. A step has one micro-batch there, so that its count is known in time.
    """
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def gradient_norm(trainer: L.Trainer, gradients: Sequence[Tensor]) -> Tensor:
    """The norm of the whole gradient, on every process.

    Args:
        trainer: Has a strategy.
        gradients: What this process has of them.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.last_gradient_norm()
    if isinstance(strategy, FSDP1Strategy):
        return strategy.clip_by_norm(math.inf)
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(
    module: L.LightningModule, optimizer: Optimizer, value: float | None, algorithm: str | None
) -> None:
    """Clip as the trainer says, where the strategy has not done it itself."""
    strategy = module.trainer.strategy
    if isinstance(strategy, FSDP1Strategy) and value and algorithm != "value":
        # Lightning refuses, because its precision plugin does not know the root of the shards.
        strategy.clip_by_norm(value)
        return
    module.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm)


def skipped_last_step(trainer: L.Trainer) -> bool:
    """Has DeepSpeed left out the last optimizer step, because its gradient was not finite?"""
    strategy = trainer.strategy
    return isinstance(strategy, DeepSpeedStrategy) and strategy.skipped_last_step()
