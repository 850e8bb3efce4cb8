"""How a run is spread over processes: Lightning's strategies, and FSDP2 as this library wants it."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_kd.checkpoints import compare_weights, explained


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2: student and optimizer in shards over all processes; ``--trainer.strategy fsdp2``.

    Lightning's own ``ModelParallelStrategy`` replicates over nodes and splits tensors within them
    unless it is told sizes; this one shards over all processes.

    Args:
        save_distributed_checkpoint: A directory to which every process writes its shards, instead
            of one file that also loads on one process. Either is replaced only when the next is
            complete.
        process_group_backend: ``nccl`` or ``gloo``; chosen by the device when not given.
        timeout: How long a process waits for the others before it gives up.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """One mesh over all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        """Write beside the old checkpoint, and put the new one in its place when it is complete."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        fresh, old = _fresh(path), _old(path)
        if self.is_global_zero:
            shutil.rmtree(fresh, ignore_errors=True)
        self.barrier("checkpoint_begins")
        super().save_checkpoint(checkpoint, fresh, storage_options)
        self.barrier("checkpoint_written")
        if self.is_global_zero:
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            fresh.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        self.barrier("checkpoint_in_place")

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a file or a directory; the one before it where a process was killed in between.

        Raises:
            ValueError: If it cannot be read, or is of another model.
        """
        path = readable_checkpoint(Path(self.broadcast(checkpoint_path)))
        safe = True if weights_only is None else weights_only
        if path.is_dir():
            return super().load_checkpoint(path, safe)
        with explained(path):
            checkpoint: dict[str, Any] = torch.load(
                path, mmap=True, map_location="cpu", weights_only=safe
            )
        # Not Lightning's own: it takes the numbers that a plain optimizer gives its parameters for
        # their order in the module, which they are not where there are groups.
        assert self.model is not None  # Lightning has set it up
        options = StateDictOptions(full_state_dict=True)
        weights = checkpoint.pop("state_dict")
        compare_weights(weights, self.model.state_dict())
        set_model_state_dict(self.model, weights, options=options)
        for optimizer, saved in zip(
            self.optimizers, checkpoint.get("optimizer_states", ()), strict=False
        ):
            state = _by_name(saved, optimizer, self.model)
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return checkpoint


def readable_checkpoint(path: Path) -> Path:
    """The checkpoint, or what it was to replace when the process was killed between two renamings."""
    old = _old(path)
    return old if not path.exists() and old.exists() else path


def shard_mesh(trainer: L.Trainer) -> DeviceMesh | None:
    """The processes that share weights; None where every process has all of them.

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


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse what Lightning lets pass, and a strategy under which the loss would be divided wrongly.

    Raises:
        ValueError: If there is something to refuse.
    """
    for name, least in (("accumulate_grad_batches", 1), ("log_every_n_steps", 0)):
        value = getattr(trainer, name)
        if value < least:
            raise ValueError(f"trainer.{name} is {value}; it must be {least} or more")
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "strategy fsdp (FSDP1) flattens the weights that gradients are divided and clipped by; "
            "use --trainer.strategy fsdp2, which shards the same"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            "DeepSpeed divides gradients by the number of micro-batches itself, drops the last "
            "partial window, and shows none of them before its step, so the loss could not be "
            "divided by its own count; use --trainer.strategy fsdp2"
        )


def _by_name(saved: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's state under the names of its parameters, which stand group by group in it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    named: dict[int, str] = {}
    for of_saved, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        pairs = zip(of_saved["params"], (names[p] for p in own["params"]), strict=True)
        named |= dict(pairs)
        groups.append(of_saved | {"params": [named[number] for number in of_saved["params"]]})
    return {
        "state": {named[number]: value for number, value in saved["state"].items()},
        "param_groups": groups,
    }


def _fresh(path: Path) -> Path:
    return path.with_name(f"{path.name}.fresh")


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


if "fsdp2" not in StrategyRegistry.available_strategies():
    StrategyRegistry.register(
        "fsdp2", FullyShardedStrategy, description="Student and optimizer in shards (FSDP2)"
    )
