"""What a module asks of its trainer before it starts."""

from typing import Any

import lightning as L
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh

from lightning_kd.strategies.deepspeed import DeepSpeedStrategy
from lightning_kd.strategies.fsdp1 import FSDP1Strategy
from lightning_kd.strategies.fsdp2 import FSDP2Strategy


def shard_mesh(trainer: L.Trainer) -> DeviceMesh | None:
    """The processes that share weights under FSDP2; None under another strategy.

    Raises:
        ValueError: If the strategy splits single tensors, which nothing here does.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    split = strategy.device_mesh["tensor_parallel"].size()
    if split > 1:
        raise ValueError(
            f"tensor_parallel_size is {split}: models are sharded here, not split within a tensor. "
            "Use --trainer.strategy fsdp2, or tensor_parallel_size: 1 and data_parallel_size: the "
            "number of processes"
        )
    return strategy.device_mesh["data_parallel"]


def shards_weights(trainer: L.Trainer) -> bool:
    """Has each process no more than a share of the student's weights?"""
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3
    return isinstance(strategy, FSDP1Strategy | ModelParallelStrategy)


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse what Lightning lets pass, and what would divide the loss wrongly.

    Raises:
        ValueError: If there is something to refuse.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every < 0:
        raise ValueError(f"trainer.log_every_n_steps is {every}; it must be 0 or more")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise ValueError(
                f"{type(callback).__name__} tries out steps and takes them back, but rows, seeds and "
                "rollouts of this library follow the steps that were taken. Leave it out, and compare "
                "short runs with other values of data.batch_size or model.optimizer.lr"
            )
    strategy = trainer.strategy
    for lightnings, own, name in (
        (FSDPStrategy, FSDP1Strategy, "fsdp"),
        (LightningDeepSpeedStrategy, DeepSpeedStrategy, "deepspeed_stage_2"),
    ):
        if isinstance(strategy, lightnings) and not isinstance(strategy, own):
            raise ValueError(
                f"{type(strategy).__name__} of Lightning reads checkpoints with pickle and writes "
                f"over the last one; use {own.__name__} of lightning_kd, or its name, such as "
                f"--trainer.strategy {name}"
            )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        # The trainer does not tell anybody the path before it asks the strategy to load it.
        strategy.load_checkpoint = _refuse_to_go_on  # type: ignore[method-assign]
    micro_batches = trainer.accumulate_grad_batches
    if isinstance(strategy, LightningDeepSpeedStrategy) and micro_batches > 1:
        raise ValueError(
            f"accumulate_grad_batches is {micro_batches}: DeepSpeed divides by it twice, drops "
            "the last partial window, and shows no gradient before its step, so the loss could "
            "not be divided by the count of the whole step. Use accumulate_grad_batches: 1 with "
            "a larger data.batch_size or more processes, or --trainer.strategy fsdp2"
        )


def _refuse_to_go_on(checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
    raise ValueError(
        "ModelParallelStrategy of Lightning reads directories with pickle, and gives the states of an "
        f"optimizer with several groups to the wrong weights; go on from {checkpoint_path} with "
        "--trainer.strategy fsdp2"
    )
