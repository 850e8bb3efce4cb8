"""Names of the strategies on the command line."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_kd.strategies.deepspeed import DeepSpeedStrategy
from lightning_kd.strategies.fsdp1 import FSDP1Strategy
from lightning_kd.strategies.fsdp2 import FSDP2Strategy


def register() -> None:
    """Give ``fsdp2`` a meaning, and let Lightning's ``fsdp...`` and ``deepspeed...`` mean ours."""
    StrategyRegistry.register(
        "fsdp2",
        FSDP2Strategy,
        description="Student and optimizer in shards (FSDP2)",
        override=True,
    )
    for prefix, strategy in (("fsdp", FSDP1Strategy), ("deepspeed", DeepSpeedStrategy)):
        for name in StrategyRegistry.available_strategies():
            if name.startswith(prefix) and name != "fsdp2":
                registered = StrategyRegistry[name]
                StrategyRegistry.register(
                    name,
                    strategy,
                    description=registered["description"],
                    override=True,
                    **registered["init_params"],
                )
