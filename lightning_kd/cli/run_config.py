"""What a run leaves of the command that started it."""

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from lightning_kd.imports import KEPT, own_directories


class RunConfig(SaveConfigCallback):
    """Saves a run's ``config.yaml``, and beside it where its classes of one's own were found.

    Later commands with that ``config.yaml`` find them there too.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write both, once."""
        first = not self.already_saved
        super().setup(trainer, pl_module, stage)
        place, found = trainer.log_dir, own_directories()  # every process asks for the directory
        if first and trainer.is_global_zero and found and place is not None and "://" not in place:
            Path(place, KEPT).write_text("".join(f"{directory}\n" for directory in found))
