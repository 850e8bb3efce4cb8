"""Execution of code as in a run of a single process."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from lightning_kd.callbacks.audit.replacements import replaced, replaced_item

# An attribute of such a name whose value is the number of processes is taken for that number.
_WORLD_SIZE = re.compile(r"world|n(um)?_?(gpu|device|process|proc|rank)s?\b", re.IGNORECASE)


class SingleProcessEnvironment(LightningEnvironment):
    """Cluster environment of a single process."""

    def world_size(self) -> int:
        """Return 1."""
        return 1

    def global_rank(self) -> int:
        """Return 0, the only process."""
        return 0

    def local_rank(self) -> int:
        """Return 0, the only process of its machine."""
        return 0


class SingleProcess:
    """Replacement of the process group and the cluster environment by those of a single process.

    The default process group becomes a real group of one, whose collectives are those of a run in one
    process. So it does not matter by which name a module calls them, or what calls them for it:
    Lightning, torchmetrics, or ``from torch.distributed import all_reduce``. All processes enter
    it together, and do not communicate with each other inside.

    Args:
        trainer: The trainer of the run.
        module: Its module.
    """

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._trainer: Any = trainer
        self._module = module
        self._several = trainer.world_size > 1
        self._world_size = trainer.world_size
        self._group: dist.ProcessGroup | None = None
        self._calls_before = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace group and environment; do nothing in a run of one process."""
        if not self._several:
            yield
            return
        strategy = self._trainer.strategy
        self._group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self._calls_before = self._calls_of_other_groups()
        try:
            with (
                replaced(strategy, parallel_devices=[strategy.root_device]),
                replaced(strategy, cluster_environment=SingleProcessEnvironment(), _num_nodes=1),
                replaced_item(os.environ, "WORLD_SIZE", "1"),
                replaced(dist.group, WORLD=self._group),
            ):
                yield
        finally:
            dist.destroy_process_group(self._group)
            self._group = None

    def replace_in_module(self) -> None:
        """Replace the process groups and the number of processes that the module's attributes hold."""
        if self._group is None:
            return
        for part in self._module.modules():
            stores = [part.__dict__, part.__dict__.get("_hparams") or {}]
            for store in stores:
                for name, value in store.items():
                    if isinstance(value, dist.ProcessGroup):
                        store[name] = self._group
                    elif _is_world_size(name, value) and value == self._world_size:
                        store[name] = 1

    def was_bypassed(self) -> bool:
        """Return whether the module communicated with other processes nevertheless."""
        return self._group is not None and self._calls_of_other_groups() != self._calls_before

    def _calls_of_other_groups(self) -> int:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(g._get_sequence_number_for_group() for g in groups if g is not self._group)


def _is_world_size(name: str, value: object) -> bool:
    return isinstance(value, int) and _WORLD_SIZE.search(name) is not None
