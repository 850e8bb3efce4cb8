"""What the strategies are called on the command line."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_kd.strategies.flat_sharded import FlatShardedStrategy
from lightning_kd.strategies.fully_sharded import FullyShardedStrategy
from lightning_kd.strategies.zero import ZeroStrategy


def register() -> None:
    """Give ``fsdp2`` a meaning, and let Lightning's ``fsdp...`` and ``deepspeed...`` mean ours."""
    StrategyRegistry.register(
        "fsdp2",
        FullyShardedStrategy,
        description="Student and optimizer in shards (FSDP2)",
        override=True,
    )
    for prefix, strategy in (("fsdp", FlatShardedStrategy), ("deepspeed", ZeroStrategy)):
        for name in StrategyRegistry.available_strategies():
            if name.startswith(prefix) and name != "fsdp2":
                lightnings = StrategyRegistry[name]
                StrategyRegistry.register(
                    name,
                    strategy,
                    description=lightnings["description"],
                    override=True,
                    **lightnings["init_params"],
                )
