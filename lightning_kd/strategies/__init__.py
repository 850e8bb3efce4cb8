"""How a run is spread over processes: Lightning's strategies, as this library wants them.

On import, ``fsdp2``, ``fsdp`` and ``deepspeed_stage_1`` to ``_3`` become names of these classes.
"""

from lightning_kd.strategies.checks import check_trainer, shard_mesh, shards_weights
from lightning_kd.strategies.deepspeed import DeepSpeedStrategy, gathered_copy, is_partitioned
from lightning_kd.strategies.fsdp1 import FSDP1Strategy
from lightning_kd.strategies.fsdp2 import FSDP2Strategy
from lightning_kd.strategies.gradients import (
    clip_gradients,
    gradient_norm,
    scales_loss_before_backward,
    skipped_last_step,
)
from lightning_kd.strategies.names import register
from lightning_kd.strategies.pieces import shape_of
from lightning_kd.strategies.weights import full_state_dict, outside_of_steps

__all__ = [
    "DeepSpeedStrategy",
    "FSDP1Strategy",
    "FSDP2Strategy",
    "check_trainer",
    "clip_gradients",
    "full_state_dict",
    "gathered_copy",
    "gradient_norm",
    "is_partitioned",
    "outside_of_steps",
    "scales_loss_before_backward",
    "shape_of",
    "shard_mesh",
    "shards_weights",
    "skipped_last_step",
]

register()
