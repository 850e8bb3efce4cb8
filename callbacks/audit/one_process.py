"""A trainer and its module as they would be in a run of one process."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from lightning_kd.callbacks.audit.replacements import replaced, replaced_item

# An attribute with such a name that holds the number of processes is that number.
_WORLD_SIZE = re.compile(r"world|n(um)?_?(gpu|device|process|proc|rank)s?\b", re.IGNORECASE)


class OneProcess(LightningEnvironment):
    """An environment of a single process."""

    def world_size(self) -> int:
        """One."""
        return 1

    def global_rank(self) -> int:
        """The first, and only, process."""
        return 0

    def local_rank(self) -> int:
        """The first, and only, process of its machine."""
        return 0


class OneProcessView:
    """The surroundings of one process, where there are several.

    The default process group is a real group of one, whose collectives are those of a run in one
    process. So it does not matter by which name a module calls them, or who calls them for it:
    Lightning, torchmetrics, or ``from torch.distributed import all_reduce``. Every process enters
    it together with the others, and communicates with none of them inside.

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
    def entered(self) -> Iterator[None]:
        """Put the surroundings in place, and take them away again."""
        if not self._several:
            yield
            return
        strategy = self._trainer.strategy
        self._group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self._calls_before = self._calls_of_other_groups()
        try:
            with (
                replaced(strategy, parallel_devices=[strategy.root_device]),
                replaced(strategy, cluster_environment=OneProcess(), _num_nodes=1),
                replaced_item(os.environ, "WORLD_SIZE", "1"),
                replaced(dist.group, WORLD=self._group),
            ):
                yield
        finally:
            dist.destroy_process_group(self._group)
            self._group = None

    def substitute(self) -> None:
        """Replace what the module remembers of its processes: their number, and its groups."""
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

    def was_left(self) -> bool:
        """Tell whether the module has communicated with other processes inside."""
        return self._group is not None and self._calls_of_other_groups() != self._calls_before

    def _calls_of_other_groups(self) -> int:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(g._get_sequence_number_for_group() for g in groups if g is not self._group)


def _is_world_size(name: str, value: object) -> bool:
    return isinstance(value, int) and _WORLD_SIZE.search(name) is not None
