"""FSDP2: each process has a share of every weight."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lightning_kd.checkpoints import RUN_KEY, compare_weights, explained, readable_checkpoint
from lightning_kd.integrity import check_file
from lightning_kd.strategies.directories import compare_run, read_safely, replacing

_WRITER = {"strategy": "fsdp2"}


class FSDP2Strategy(ModelParallelStrategy):
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
        with replacing(self, path, _WRITER, checkpoint) as fresh:
            super().save_checkpoint(checkpoint, fresh, storage_options)

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
            with read_safely(self, path, _WRITER, weights_only):
                return super().load_checkpoint(path, safe)
        with explained(path):
            check_file(path)
            checkpoint: dict[str, Any] = torch.load(
                path, mmap=True, map_location="cpu", weights_only=safe
            )
        # Not Lightning's own: it takes the numbers that a plain optimizer gives its parameters for
        # their order in the module, which they are not where there are groups.
        compare_run(self, checkpoint.get(RUN_KEY, {}))
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
