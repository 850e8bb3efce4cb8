"""ZeRO: DeepSpeed's shards of optimizer (1), gradients (2) and weights (3)."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_kd.checkpoints import readable_checkpoint
from lightning_kd.strategies.directories import Writer, read_safely, replacing
from lightning_kd.strategies.pieces import Pieces


class DeepSpeedStrategy(LightningDeepSpeedStrategy):
    """DeepSpeed, with checkpoints that are complete and read safely; ``deepspeed_stage_1`` to ``_3``.

    The options are those of Lightning's ``DeepSpeedStrategy``. An optimizer step has one micro-batch
    (``accumulate_grad_batches`` 1). Steps whose gradient is not finite are left out by DeepSpeed.
    """

    def __init__(self, *options: Any, **named: Any) -> None:
        super().__init__(*options, **named)
        assert isinstance(self.config, dict)  # made, or read
        # Where the optimizer is offloaded DeepSpeed would refuse all but its own.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Models are built whole and sharded later: transformers loads weights into nothing less."""
        yield

    def init_deepspeed(self) -> None:
        """Start the engine, without the warning that our hook for clipping would not clip."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping")
            super().init_deepspeed()

    def _writer(self) -> Writer:
        assert isinstance(self.config, dict)  # the constructor has made one, or read it
        stage: int = self.config.get("zero_optimization", {}).get("stage", 0)
        return {"strategy": "deepspeed", "stage": stage, "processes": self.world_size}

    def _auto_select_batch_size(self) -> int:
        # Lightning would build the loader of the training rows to know it; it is for a log line.
        return 1

    def pieces(self, model: nn.Module) -> Pieces:
        """The weights of a model one by one, and what makes each of them whole."""
        import deepspeed

        for weight in model.parameters():
            yield deepspeed.zero.GatheredParameters([weight]), [weight]

    def last_gradient_norm(self) -> Tensor:
        """Of the optimizer step that was taken, before clipping; NaN where it is not computed."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return torch.as_tensor(math.nan if norm is None else norm)

    def skipped_last_step(self) -> bool:
        """Has the last optimizer step been left out?"""
        return not self.deepspeed_engine.was_step_applied()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        """Write beside the old checkpoint, and put the new one in its place when it is complete."""
        with replacing(self, Path(self.broadcast(filepath)), self._writer(), checkpoint) as fresh:
            super().save_checkpoint(checkpoint, fresh, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a directory; the one before it where a process was killed in between.

        Raises:
            ValueError: If it cannot be read safely, or is of another model.
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
        with read_safely(self, path, self._writer(), weights_only, classes):
            return super().load_checkpoint(path, weights_only)


def is_partitioned(weight: Tensor) -> bool:
    """Has DeepSpeed left nothing but its share of a weight on this process?"""
    return getattr(weight, "ds_numel", weight.numel()) != weight.numel()


def gathered_copy(weight: Tensor) -> Tensor:
    """All of a weight that has been released; every process asks for it, and none has a gradient.

    Within the trainer's steps DeepSpeed gathers what is read by itself.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()
