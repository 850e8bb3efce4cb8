"""FSDP1: the weights of a layer in one flat row, and each process has a share of it."""

from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

from lightning_kd.checkpoints import readable_checkpoint
from lightning_kd.strategies.directories import read_safely, replacing
from lightning_kd.strategies.pieces import Pieces

_WRITER = {"strategy": "fsdp"}


class FSDP1Strategy(FSDPStrategy):
    """FSDP1, for those who are bound to it; ``--trainer.strategy fsdp``. Else use FSDP2.

    The units are the layers that transformers says must not be split, and all the rest (embedding,
    last norm, output head) together. Checkpoints are directories to which every process writes its
    shards, replaced only when the next one is complete.

    Args:
        sharding_strategy: What is in shards: ``FULL_SHARD`` weights, gradients and optimizer,
            ``SHARD_GRAD_OP`` all but the weights, ``HYBRID_SHARD`` within each node.
        cpu_offload: Keep the shards in memory of the CPU.
        process_group_backend: ``nccl`` or ``gloo``; chosen by the device when not given.
        timeout: How long a process waits for the others before it gives up.
    """

    def __init__(
        self,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD",
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        self._kinds: set[str] = set()
        super().__init__(
            auto_wrap_policy=partial(_is_layer, kinds=self._kinds),
            sharding_strategy=sharding_strategy,
            cpu_offload=cpu_offload,
            process_group_backend=process_group_backend,
            timeout=timeout,
            state_dict_type="sharded",
        )
        self._last: nn.Module | None = None

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """As Lightning has it, but for buffers: rounded frequencies of RoPE are other positions."""
        lightnings = super().mixed_precision_config
        return lightnings and replace(lightnings, buffer_dtype=torch.float32)

    @property
    def root(self) -> FullyShardedDataParallel:
        """The module, with its shards."""
        assert isinstance(self.model, FullyShardedDataParallel)  # set up
        return self.model

    def pieces(self, model: nn.Module) -> Pieces:
        """The weights of a model unit by unit, and what makes each of them whole."""
        unit_of: dict[Tensor, FullyShardedDataParallel] = {}
        outer_first = FullyShardedDataParallel.fsdp_modules(self.root)
        for unit in outer_first:
            unit_of |= dict.fromkeys(unit.parameters(), unit)
        for unit in dict.fromkeys(unit_of.values()):
            weights = [weight for weight in model.parameters() if unit_of[weight] is unit]
            yield _gathered(unit), weights

    def gathered_rest(self) -> AbstractContextManager[None]:
        """While this is open, what is in no layer is whole: embedding, last norm, output head."""
        return _gathered(self.root)

    def clip_by_norm(self, longest: float) -> Tensor:
        """Clip the gradient, and return the norm that it had."""
        return self.root.clip_grad_norm_(longest)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        """Write beside the old checkpoint, and put the new one in its place when it is complete."""
        with replacing(self, Path(self.broadcast(filepath)), _WRITER, checkpoint) as fresh:
            super().save_checkpoint(checkpoint, fresh, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a directory; the one before it where a process was killed in between.

        Raises:
            ValueError: If it is none, or cannot be read safely.
        """
        path = readable_checkpoint(Path(self.broadcast(checkpoint_path)))
        if not path.is_dir():
            raise ValueError(
                f"{path} is a file, and strategy fsdp (FSDP1) reads the directories that it has "
                "written itself; --trainer.strategy fsdp2 reads the files of every other strategy"
            )
        with read_safely(self, path, _WRITER, weights_only):
            return super().load_checkpoint(path, weights_only is not False)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self._last is not None and self._last.module is model:
            return self._last  # a trainer that tests what it has fitted sets it up once more
        if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            raise ValueError(
                "the module has been in shards of another trainer, which nobody keeps together any "
                "more; build it anew for this one, or use --trainer.strategy fsdp2"
            )
        for parameter in model.parameters():
            parameter.full_shape = parameter.shape  # type: ignore[attr-defined]
        for part in model.modules():
            self._kinds.update(getattr(part, "_no_split_modules", None) or ())
        self._last = super()._setup_model(model)
        return self._last


def _gathered(unit: FullyShardedDataParallel) -> AbstractContextManager[None]:
    """While this is open, every process has all weights of a unit, but for those of inner ones."""
    return FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False)


def _is_layer(module: nn.Module, recurse: bool, nonwrapped_numel: int, *, kinds: set[str]) -> bool:
    return recurse or type(module).__name__ in kinds
