"""The command ``lightning-kd check``."""

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_kd.cli.export import ExportingTrainer
from lightning_kd.preflight import Preflight, check


class CommandTrainer(ExportingTrainer):
    """Lightning's trainer, with the commands of this library that take all that a run takes."""

    def check_run(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Say what a run would do and what would ruin it, without training and without loading weights.

        Ends with 0 if there is no mismatch, with 1 if there is one, and with 2 if the run would be
        refused.

        Args:
            model: The method.
            datamodule: Its data.
            ckpt_path: As for ``fit``; that it exists is checked, its weights are not read.
            weights_only: As for ``fit``; nothing is loaded here.
        """
        (options,) = [c for c in self.callbacks if isinstance(c, Preflight)]  # type: ignore[attr-defined]
        report = check(model, datamodule, self, rows=options.rows)
        report.show()
        if report.exit_code:
            raise SystemExit(report.exit_code)

    check = check_run
    """The command; its options have this name."""
