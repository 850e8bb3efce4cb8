"""FSDP1: each process has a share of a layer's weights, laid out as one flat row."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.optim import Optimizer

from lightning_kd.checkpoints import readable_checkpoint
from lightning_kd.strategies.adapter import RefusedAdapter, StrategyAdapter, register_adapter
from lightning_kd.strategies.directories import read_safely, replacing
from lightning_kd.strategies.gathered_shards import GatheredShards, gather_state_dict

_WRITER = {"strategy": "fsdp"}


class FSDP1Strategy(FSDPStrategy):
    """FSDP1, for runs that are bound to it; ``--trainer.strategy fsdp``. Prefer FSDP2.

    The units are the layers that transformers says must not be split, and all the rest (embedding,
    last norm, output head) together. Checkpoints are directories to which every process writes its
    shards, replaced only when the next one is complete.

    Args:
        sharding_strategy: What is sharded: ``FULL_SHARD`` weights, gradients and optimizer,
            ``SHARD_GRAD_OP`` all but the weights, ``HYBRID_SHARD`` within each node.
        cpu_offload: Keep the shards in memory of the CPU.
        process_group_backend: ``nccl`` or ``gloo``; defaults to the device's.
        timeout: Time that a process waits for the others before it gives up.
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
        """Lightning's, but with buffers in float32: rounded frequencies of RoPE are other positions."""
        configured = super().mixed_precision_config
        return configured and replace(configured, buffer_dtype=torch.float32)

    @property
    def root(self) -> FullyShardedDataParallel:
        """The sharded module."""
        assert isinstance(self.model, FullyShardedDataParallel)  # set up
        return self.model

    def gathered_shards(self, model: nn.Module) -> GatheredShards:
        """Yield the weights of a model unit by unit, with the context that unshards each unit."""
        unit_of: dict[Tensor, FullyShardedDataParallel] = {}
        outer_first = FullyShardedDataParallel.fsdp_modules(self.root)
        for unit in outer_first:
            unit_of |= dict.fromkeys(unit.parameters(), unit)
        for unit in dict.fromkeys(unit_of.values()):
            weights = [weight for weight in model.parameters() if unit_of[weight] is unit]
            yield _gathered(unit), weights

    def gathered_rest(self) -> AbstractContextManager[None]:
        """Unshard what is in no layer within this context: embedding, last norm, output head."""
        return _gathered(self.root)

    def clip_by_norm(self, longest: float) -> Tensor:
        """Clip the gradient, and return the norm that it had."""
        return self.root.clip_grad_norm_(longest)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        """Write beside the old checkpoint, and replace it when the new one is complete."""
        with replacing(self, Path(self.broadcast(filepath)), _WRITER, checkpoint) as fresh:
            super().save_checkpoint(checkpoint, fresh, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a directory, or the one before it where a process was killed while replacing it.

        Raises:
            ValueError: If the path is a file, or cannot be read safely.
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
    """Unshard the weights of a unit on every process, without those of inner units."""
    return FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False)


def _is_layer(module: nn.Module, recurse: bool, nonwrapped_numel: int, *, kinds: set[str]) -> bool:
    return recurse or type(module).__name__ in kinds


@register_adapter(FSDP1Strategy)
class FSDP1Adapter(StrategyAdapter[FSDP1Strategy]):
    """Adapter of :class:`FSDP1Strategy`, whose root module alone knows the whole gradient."""

    shards_weights = True
    flattens_weights = True
    writes_directories = True

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm of the whole gradient."""
        return self.strategy.clip_by_norm(math.inf)

    def clip(
        self,
        module: L.LightningModule,
        optimizer: Optimizer,
        value: float | None,
        algorithm: str | None,
    ) -> None:
        """Clip by the norm of the whole gradient, or by value."""
        if value and algorithm != "value":
            # Lightning refuses, because its precision plugin does not know the root of the shards.
            self.strategy.clip_by_norm(value)
        else:
            super().clip(module, optimizer, value, algorithm)

    def outside_of_steps(self) -> AbstractContextManager[None]:
        """Unshard embedding and output head, which are unsharded within a forward pass only."""
        return self.strategy.gathered_rest()

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all weights of a model on the first process, gathered unit by unit."""
        shards = self.strategy.gathered_shards(model)
        return gather_state_dict(model, shards, wanted=self.trainer.is_global_zero)


@register_adapter(FSDPStrategy)
class LightningFSDPAdapter(RefusedAdapter):
    """Refuses Lightning's FSDP1."""

    replacement, name = "FSDP1Strategy", "fsdp"
