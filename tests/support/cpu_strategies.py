"""Strategies for accelerators on processes of a CPU: to test them, and for nothing else."""

from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_kd.strategies import DeepSpeedStrategy, FSDP1Strategy
from tests.support.scripts import needs_deepspeed, written_beside_deepspeed, written_by


class FlatOnCPU(FSDP1Strategy):
    """FSDP1 where torch would look for an accelerator."""

    def _setup_model(self, model):
        build = FullyShardedDataParallel.__init__

        def on_cpu(self, *args, **options):
            build(self, *args, **(options | {"device_id": torch.device("cpu")}))

        with patch.object(FullyShardedDataParallel, "__init__", on_cpu):
            return super()._setup_model(model)


class ZeroOnCPU(DeepSpeedStrategy):
    """A stage of ZeRO over gloo, which leaves no process a weight that it does not need now.

    With the default limits a small model would be whole on every process.
    """

    setup_environment = DDPStrategy.setup_environment

    def __init__(self, stage: int, *, offload: bool = False, **limits: int) -> None:
        super().__init__(
            stage=stage, offload_optimizer=offload, offload_parameters=offload, logging_level=30
        )
        kept = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        limits = dict.fromkeys((*kept, "prefetch_bucket_size"), 0) | limits
        self.config["zero_optimization"] |= {f"stage3_{k}": v for k, v in limits.items()}

    @property
    def root_device(self):
        return torch.device("cpu", self.local_rank)

    def setup_distributed(self):
        import deepspeed

        self.set_world_ranks()
        self._set_node_environment_variables()
        deepspeed.init_distributed("gloo", distributed_port=self.cluster_environment.main_port)


STRATEGIES = {
    "fsdp": FlatOnCPU,
    "zero_1": lambda: ZeroOnCPU(1),
    "zero_2": lambda: ZeroOnCPU(2),
    "zero_3": lambda: ZeroOnCPU(3),
    "zero_3_offload": lambda: ZeroOnCPU(
        3, offload=True, prefetch_bucket_size=10_000, max_live_parameters=10_000
    ),
}

NAMES = [pytest.param(name, marks=needs_deepspeed if "zero" in name else ()) for name in STRATEGIES]


def written_under(name, script, out):
    """What a script writes that is told the name of a strategy."""
    return (written_beside_deepspeed if "zero" in name else written_by)(script, out, name)
