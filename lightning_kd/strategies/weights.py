"""The weights of a model where they are needed, whoever has them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_kd.strategies.deepspeed import DeepSpeedStrategy
from lightning_kd.strategies.fsdp1 import FSDP1Strategy
from lightning_kd.strategies.pieces import collected


def outside_of_steps(trainer: L.Trainer) -> AbstractContextManager[None]:
    """While this is open, the student can run in a callback, outside of the trainer's steps.

    FSDP1 has embedding and output head ready within its own forward pass only.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDP1Strategy):
        return strategy.gathered_rest()
    return nullcontext()


def full_state_dict(trainer: L.Trainer, model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model, in memory of the CPU.

    All processes ask together; the first one gets them, and another one may get nothing.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDP1Strategy | DeepSpeedStrategy):
        return collected(model, strategy.pieces(model), wanted=trainer.is_global_zero)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights
