"""How a run is spread over processes: Lightning's strategies, as this library wants them.

On import, ``fsdp2``, ``fsdp`` and ``deepspeed_stage_1`` to ``_3`` become names of these classes.
"""

from lightning_kd.strategies.checks import check_trainer, shard_mesh, shares_weights
from lightning_kd.strategies.flat_sharded import FlatShardedStrategy
from lightning_kd.strategies.fully_sharded import FullyShardedStrategy
from lightning_kd.strategies.gradients import (
    clip_gradients,
    divides_first,
    gradient_norm,
    was_left_out,
)
from lightning_kd.strategies.names import register
from lightning_kd.strategies.pieces import shape_of
from lightning_kd.strategies.weights import outside_of_steps, whole_weights
from lightning_kd.strategies.zero import ZeroStrategy, gathered_copy, is_released

__all__ = [
    "FlatShardedStrategy",
    "FullyShardedStrategy",
    "ZeroStrategy",
    "check_trainer",
    "clip_gradients",
    "divides_first",
    "gathered_copy",
    "gradient_norm",
    "is_released",
    "outside_of_steps",
    "shape_of",
    "shard_mesh",
    "shares_weights",
    "was_left_out",
    "whole_weights",
]

register()
