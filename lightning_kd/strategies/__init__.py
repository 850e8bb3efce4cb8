"""Strategies: Lightning's, with the checkpoints and the division of losses of this library.

On import, ``fsdp2``, ``fsdp`` and ``deepspeed_stage_1`` to ``_3`` become names of these classes.
"""

from lightning_kd.strategies.adapter import StrategyAdapter, adapter_of, register_adapter
from lightning_kd.strategies.checks import check_trainer, searches_of
from lightning_kd.strategies.deepspeed import DeepSpeedStrategy, gathered_copy, is_partitioned
from lightning_kd.strategies.fsdp1 import FSDP1Strategy
from lightning_kd.strategies.fsdp2 import FSDP2Strategy
from lightning_kd.strategies.gathered_shards import shape_of
from lightning_kd.strategies.names import register

__all__ = [
    "DeepSpeedStrategy",
    "FSDP1Strategy",
    "FSDP2Strategy",
    "StrategyAdapter",
    "adapter_of",
    "check_trainer",
    "gathered_copy",
    "is_partitioned",
    "register_adapter",
    "searches_of",
    "shape_of",
]

register()
