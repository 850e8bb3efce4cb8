"""ZeRO: DeepSpeed's shards of optimizer (1), gradients (2) and weights (3)."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_kd.checkpoints import readable_checkpoint
from lightning_kd.strategies.adapter import RefusedAdapter, StrategyAdapter, register_adapter
from lightning_kd.strategies.directories import SavedStrategy, read_safely, replacing
from lightning_kd.strategies.gathered_shards import GatheredShards, gather_state_dict


class DeepSpeedStrategy(LightningDeepSpeedStrategy):
    """DeepSpeed, with checkpoints that are complete and read safely; ``deepspeed_stage_1`` to ``_3``.

    The options are those of Lightning's ``DeepSpeedStrategy``. An optimizer step has one micro-batch
    (``accumulate_grad_batches`` 1). DeepSpeed skips steps whose gradient is not finite.
    """

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build models unsharded and shard them later: transformers loads no weights into shards."""
        yield

    def init_deepspeed(self) -> None:
        """Start the engine, without the warning that our hook for clipping would not clip."""
        assert isinstance(self.config, dict)  # the constructor has made one, or read it
        # Where the optimizer is offloaded DeepSpeed would refuse all but its own.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping")
            super().init_deepspeed()

    def _saved_strategy(self) -> SavedStrategy:
        assert isinstance(self.config, dict)  # the constructor has made one, or read it
        stage: int = self.config.get("zero_optimization", {}).get("stage", 0)
        return {"strategy": "deepspeed", "stage": stage, "processes": self.world_size}

    def _auto_select_batch_size(self) -> int:
        # Lightning would build the loader of the training rows to know it; it is for a log line.
        return 1

    def gathered_shards(self, model: nn.Module) -> GatheredShards:
        """Yield the weights of a model one by one, with the context that unshards each of them."""
        import deepspeed

        for weight in model.parameters():
            yield deepspeed.zero.GatheredParameters([weight]), [weight]

    def last_gradient_norm(self) -> Tensor:
        """Return the norm of the last step's gradient before clipping; NaN if it is not computed."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return torch.as_tensor(math.nan if norm is None else norm)

    def skipped_last_step(self) -> bool:
        """Return whether the last optimizer step was skipped."""
        return not self.deepspeed_engine.was_step_applied()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        """Write beside the old checkpoint, and replace it when the new one is complete."""
        with replacing(
            self, Path(self.broadcast(filepath)), self._saved_strategy(), checkpoint
        ) as fresh:
            super().save_checkpoint(checkpoint, fresh, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a directory, or the one before it where a process was killed while replacing it.

        Raises:
            ValueError: If the directory cannot be read safely, or is of another model.
        """
        path = readable_checkpoint(Path(self.broadcast(checkpoint_path)))
        if not path.is_dir():
            raise ValueError(
                f"{path} is a file, and DeepSpeed reads the directories that it has written itself; "
                "--trainer.strategy fsdp2 reads the files of every other strategy"
            )
        assert self.lightning_module is not None  # the trainer has connected it
        if self.zero_stage_3 and self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            raise ValueError(
                f"DeepSpeed's third stage reads {path} for nothing but training; give the directory "
                "that the run exported as model.student.name_or_path instead"
            )
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        classes = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
        with read_safely(self, path, self._saved_strategy(), weights_only, classes):
            return super().load_checkpoint(path, weights_only)


def is_partitioned(weight: Tensor) -> bool:
    """Return whether this process has no more than its share of a weight."""
    return getattr(weight, "ds_numel", weight.numel()) != weight.numel()


def gathered_copy(weight: Tensor) -> Tensor:
    """Return a partitioned weight, gathered and without gradient; all processes call it together.

    Within the trainer's steps DeepSpeed gathers what is read by itself.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


@register_adapter(DeepSpeedStrategy)
class DeepSpeedAdapter(StrategyAdapter[DeepSpeedStrategy]):
    """Adapter of :class:`DeepSpeedStrategy`, which shows no gradient between backward and step.

    So the loss is divided before the backward pass. A step has one micro-batch, and its count is
    known in time.
    """

    scales_loss_before_backward = True
    writes_directories = True

    @property
    def shards_weights(self) -> bool:  # type: ignore[override]
        """True in stage 3."""
        return self.strategy.zero_stage_3

    def check(self) -> None:
        """Refuse steps of several micro-batches.

        Raises:
            ValueError: If a step has several micro-batches.
        """
        micro_batches = self.trainer.accumulate_grad_batches
        if micro_batches > 1:
            raise ValueError(
                f"accumulate_grad_batches is {micro_batches}: DeepSpeed divides by it twice, drops "
                "the last partial window, and shows no gradient before its step, so the loss could "
                "not be divided by the count of the whole step. Use accumulate_grad_batches: 1 with "
                "a larger data.batch_size or more processes, or --trainer.strategy fsdp2"
            )

    def scale_loss(
        self, total: Tensor, sum_scale: Callable[[], float], step_scale: Callable[[], Tensor]
    ) -> Tensor:
        """Divide the weighted sum by the count of its step."""
        return total * step_scale()

    def scale_gradients(
        self, gradients: Sequence[Tensor], step_scale: Callable[[], Tensor]
    ) -> None:
        """Do nothing: the loss is divided already."""

    def gradient_norm(self, gradients: Sequence[Tensor]) -> None:
        """Return None: the engine computes the norm in its step."""

    def gradient_norm_after_step(self) -> Tensor:
        """Return the norm before clipping; NaN if it is not computed."""
        return self.strategy.last_gradient_norm()

    def skipped_last_step(self) -> bool:
        """Return whether the engine skipped the last optimizer step."""
        return self.strategy.skipped_last_step()

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all weights of a model on the first process, gathered one by one."""
        shards = self.strategy.gathered_shards(model)
        return gather_state_dict(model, shards, wanted=self.trainer.is_global_zero)


@register_adapter(LightningDeepSpeedStrategy)
class LightningDeepSpeedAdapter(RefusedAdapter):
    """Refuses Lightning's DeepSpeed."""

    replacement, name = "DeepSpeedStrategy", "deepspeed_stage_2"
