"""Report of the step and phase in which a run timed out."""

import re
import traceback

import lightning as L
from lightning.pytorch.callbacks import Callback

_TIMEOUT = re.compile(r"timed? ?out|connection (closed|reset)|connection was likely closed", re.I)

_PHASES = {
    "configure_model": "setting up the models",
    "_generate_window": "generating rollouts",
    "prepare_rollouts": "preparing rollouts",
    "training_step": "the forward pass",
    "backward": "the backward pass",
    "on_before_optimizer_step": "dividing the gradient",
    "configure_gradient_clipping": "clipping the gradient",
    "save_checkpoint": "saving a checkpoint",
    "load_checkpoint": "loading a checkpoint",
    "validation_step": "validation",
    "on_validation_batch_end": "validation",
    "on_validation_epoch_end": "validation",
    "on_fit_end": "exporting the student",
}
"""Phase of the run by function; the innermost function counts."""


class TimeoutReport(Callback):
    """Add step and phase to the error of a process that waited for the others until a timeout.

    The timeout is the strategy's ``timeout`` (``--trainer.strategy FSDP2Strategy
    --trainer.strategy.timeout 0:05:00``, and likewise for ``DDPStrategy``).
    """

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Add a note to the error if it is a timeout or a lost connection."""
        if not isinstance(exception, RuntimeError) or not _TIMEOUT.search(str(exception)):
            return
        names = [frame.name for frame in traceback.extract_tb(exception.__traceback__)]
        phases = [_PHASES[name] for name in names if name in _PHASES]
        exception.add_note(
            f"Process {trainer.global_rank} of {trainer.world_size} waited for the others in "
            f"optimizer step {trainer.global_step + 1}, while {(phases or ['communicating'])[-1]}. "
            "One of them has ended, is stuck, or is slower than the strategy's timeout allows: look "
            "at the first error of the others, or raise the timeout"
        )
