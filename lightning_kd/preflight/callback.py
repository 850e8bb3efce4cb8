"""The report of a check at the start of a run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_kd.modules import DistillationModule
from lightning_kd.preflight.collect import ROWS, collect
from lightning_kd.preflight.findings import judge
from lightning_kd.preflight.report import Report
from lightning_kd.preflight.rows import begins_anew


class Preflight(Callback):
    """Say in at most five lines what a run is about to do, and what would ruin it.

    ``lightning-kd check`` says more. It speaks when the data has been read and before weights are
    loaded, on the first process, and never ends a run.

    Args:
        enabled: Whether it speaks.
        rows: Training rows that are looked at one by one.

    Raises:
        ValueError: If ``rows`` is not positive.
    """

    def __init__(self, *, enabled: bool = True, rows: int = ROWS) -> None:
        if rows < 1:
            raise ValueError(f"preflight.rows is {rows}; it must be 1 or more")
        self.enabled, self.rows = enabled, rows

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say it, before a run fits."""
        module_of_data: L.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
        data: Any = module_of_data or trainer.fit_loop._data_source.instance
        if stage != "fit" or not (self.enabled and trainer.is_global_zero):
            return
        if isinstance(data, L.LightningModule | None) or not isinstance(
            pl_module, DistillationModule
        ):
            return
        own = module_of_data is None
        iterate = own and begins_anew(data)
        if own and not iterate:
            rank_zero_info(
                f"Training rows: not looked at, as this would take them from the {type(data).__name__} "
                "or change their order (lightning_kd.check does)"
            )
        with isolate_rng():
            facts = collect(pl_module, data, trainer, rows=self.rows, iterate=iterate)
        # What is refused, the run itself says in a moment.
        findings = [finding for finding in judge(facts) if finding.name != "refused"]
        for line in Report(facts, tuple(findings)).short():
            rank_zero_info(line)
