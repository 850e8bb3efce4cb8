"""FSDP2: each process has a share of every weight."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_kd.checkpoints import RUN_KEY, compare_weights, explained, readable_checkpoint
from lightning_kd.integrity import check_file
from lightning_kd.strategies.adapter import StrategyAdapter, register_adapter
from lightning_kd.strategies.directories import compare_run, read_safely, replacing

_WRITER = {"strategy": "fsdp2"}


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2: shards student and optimizer over all processes; ``--trainer.strategy fsdp2``.

    Lightning's own ``ModelParallelStrategy`` replicates over nodes and splits tensors within them
    unless it is told sizes; this one shards over all processes.

    Args:
        save_distributed_checkpoint: A directory to which every process writes its shards, instead
            of one file that also loads on one process. Either is replaced only when the next is
            complete.
        process_group_backend: ``nccl`` or ``gloo``; defaults to the device's.
        timeout: Time that a process waits for the others before it gives up.
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
        """Make one mesh over all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        """Write beside the old checkpoint, and replace it when the new one is complete."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(self, path, _WRITER, checkpoint) as fresh:
            super().save_checkpoint(checkpoint, fresh, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a file or directory, or the one before it if a process was killed while replacing it.

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
    """Return an optimizer's state under the names of its parameters, group by group."""
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


@register_adapter(ModelParallelStrategy)
class ModelParallelAdapter(StrategyAdapter[ModelParallelStrategy]):
    """Adapter of Lightning's FSDP2, which trains and evaluates here, and does not resume."""

    shards_weights = True

    @property
    def writes_directories(self) -> bool:  # type: ignore[override]
        """True with ``save_distributed_checkpoint``."""
        return self.strategy._save_distributed_checkpoint

    def check(self) -> None:
        """Let the strategy refuse to load a checkpoint."""
        # The trainer does not tell anybody the path before it asks the strategy to load it.
        self.strategy.load_checkpoint = _refuse_to_resume  # type: ignore[method-assign]

    def shard_mesh(self) -> DeviceMesh:
        """Return the processes that share weights.

        Raises:
            ValueError: If the strategy splits single tensors, which nothing here does.
        """
        split = self.strategy.device_mesh["tensor_parallel"].size()
        if split > 1:
            raise ValueError(
                f"tensor_parallel_size is {split}: models are sharded here, not split within a "
                "tensor. Use --trainer.strategy fsdp2, or tensor_parallel_size: 1 and "
                "data_parallel_size: the number of processes"
            )
        return self.strategy.device_mesh["data_parallel"]

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm of the whole gradient."""
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


@register_adapter(FSDP2Strategy)
class FSDP2Adapter(ModelParallelAdapter):
    """Adapter of :class:`FSDP2Strategy`, which also resumes."""

    def check(self) -> None:
        """Accept the strategy as it is."""


def _refuse_to_resume(checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
    raise ValueError(
        "ModelParallelStrategy of Lightning reads directories with pickle, and gives the states of an "
        f"optimizer with several groups to the wrong weights; go on from {checkpoint_path} with "
        "--trainer.strategy fsdp2"
    )
