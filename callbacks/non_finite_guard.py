"""Guard against steps with a non-finite gradient."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_kd.batch import Batch
from lightning_kd.collectives import any_process
from lightning_kd.option_checks import check_choice
from lightning_kd.strategies import adapter_of

Action = Literal["stop", "skip"]


class NonFiniteGuard(Callback):
    """Keep NaN and infinity out of the weights.

    Before each optimizer step the gradients are checked, on all ranks together. If one is not finite,
    the micro-batches of the step are saved as safetensors, one file for each micro-batch and rank, with
    what the teacher reads as ``teacher.input_ids`` and so on, and the step is skipped or the run
    stopped; weights and optimizer state remain those of the previous step. With a gradient scaler
    (``16-mixed``), the scaler handles overflows. DeepSpeed checks and skips by itself; steps that it
    skipped are handled after the step.

    Logs ``train/skipped_steps``, the number of steps skipped so far, once there are any.

    Args:
        action: ``stop`` ends the run with an error; ``skip`` skips the step and continues.
        max_skips: Consecutive steps that may be skipped; one more stops the run.
        dirpath: Directory for the batches. Defaults to ``non_finite`` in the logger's directory.

    Raises:
        ValueError: If a value is out of its range; in a run, if a gradient is not finite and the action
            is ``stop``.
    """

    def __init__(
        self, action: Action = "stop", *, max_skips: int = 10, dirpath: str | None = None
    ) -> None:
        check_choice("action", action, get_args(Action))
        if max_skips < 1:
            raise ValueError(f"max_skips is {max_skips}; it must be 1 or more")
        self.action: Action = action
        self.max_skips, self.dirpath = max_skips, dirpath
        self.skipped = 0
        self._consecutive = 0
        self._window: list[Batch] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the micro-batches of the step: their tensors are small."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window = []
        self._window.append(batch)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the gradients; remove them if one is not finite.

        Raises:
            ValueError: If the action is to stop.
        """
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled or adapter_of(trainer).scales_loss_before_backward:
            return
        own = not _finite([p.grad for p in pl_module.parameters() if p.grad is not None])
        if not any_process(own, trainer.strategy.root_device):
            self._consecutive = 0
            return
        self._act(trainer, trainer.global_step + 1)
        # Without gradients an optimizer changes nothing; with zeros it would apply decay and momentum.
        optimizer.zero_grad(set_to_none=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Log the number of skipped steps.

        Raises:
            ValueError: If DeepSpeed skipped a step, and the action is to stop.
        """
        adapter = adapter_of(trainer)
        half = trainer.precision_plugin.precision.startswith("16")
        if adapter.scales_loss_before_backward and not half:
            if adapter.skipped_last_step():
                self._act(trainer, trainer.global_step)
            else:
                self._consecutive = 0
        if self.skipped:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def _act(self, trainer: L.Trainer, step: int) -> None:
        directory = self._save(trainer, step)
        self._consecutive += 1
        if self.action == "stop" or self._consecutive > self.max_skips:
            raise ValueError(
                f"the gradient of optimizer step {step} is not finite; its batches are in "
                f"{directory}, and the weights are still those of step {step - 1}. Lower the "
                "learning rate, clip gradients, inspect the batches, or skip such steps with "
                "NonFiniteGuard(action='skip') (--non_finite.action skip)"
            )
        self.skipped += 1
        rank_zero_warn(
            f"optimizer step {step} was skipped: its gradient is not finite ({directory})"
        )

    def state_dict(self) -> dict[str, int]:
        """Return the number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of skipped steps."""
        self.skipped = state_dict["skipped"]

    def _save(self, trainer: L.Trainer, step: int) -> Path:
        log_dir = trainer.log_dir  # on every rank: the trainer broadcasts it
        directory = Path(self.dirpath or Path(log_dir or trainer.default_root_dir) / "non_finite")
        directory.mkdir(parents=True, exist_ok=True)
        for number, batch in enumerate(self._window):
            name = f"step{step}_rank{trainer.global_rank}_batch{number}.safetensors"
            save_file(_tensors(batch), directory / name)
        return directory


def _tensors(batch: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return all tensors of a batch, also those in a part of it, such as ``teacher.input_ids``."""
    found: dict[str, Tensor] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            found |= _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            found[prefix + name] = value.cpu().contiguous()
    return found


def _finite(gradients: list[Tensor]) -> bool:
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if not local:
        return True
    # The sum of squares may overflow where no element is infinite; the largest one cannot.
    return bool(torch.stack(torch._foreach_norm(local, ord=torch.inf)).isfinite().all())
