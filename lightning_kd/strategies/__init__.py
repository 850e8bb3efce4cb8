"""How a run is spread over processes: Lightning's strategies, as this library wants them.

On import, ``fsdp2``, ``fsdp`` and ``deepspeed_stage_1`` to ``_3`` become names of these classes.
"""

from lightning_kd.strategies.checks import check_trainer, shard_mesh
from lightning_kd.strategies.directories import readable_checkpoint
from lightning_kd.strategies.flat_sharded import FlatShardedStrategy, outside_of_steps
from lightning_kd.strategies.fully_sharded import FullyShardedStrategy
from lightning_kd.strategies.gradients import (
    clip_gradients,
    divides_first,
    gradient_norm,
    was_left_out,
)
from lightning_kd.strategies.names import register
from lightning_kd.strategies.pieces import shape_of
from lightning_kd.strategies.weights import whole_weights
from lightning_kd.strategies.zero import ZeroStrategy

__all__ = [
    "FlatShardedStrategy",
    "FullyShardedStrategy",
    "ZeroStrategy",
    "check_trainer",
    "clip_gradients",
    "divides_first",
    "gradient_norm",
    "outside_of_steps",
    "readable_checkpoint",
    "shape_of",
    "shard_mesh",
    "was_left_out",
    "whole_weights",
]

register()
