"""The parser of the trainer's commands, without running them."""

import io
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lightning_kd.cli.distillation_cli import DistillationCLI


class ParsingCLI(DistillationCLI):
    """Command line that parses and builds nothing."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse nothing yet."""
        self.config = Namespace(subcommand=None)  # type: ignore[no-untyped-call]

    def _parse_ckpt_path(self) -> None:
        """No checkpoint is read."""

    def _set_seed(self) -> None:
        """Nothing is random."""

    def before_instantiate_classes(self) -> None:
        """Nothing is built."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def whole_config(
        self, command: str, files: Sequence[str], layers: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the whole configuration that files and further options come to.

        Args:
            command: Of the trainer.
            files: Configuration files.
            layers: Options over them, the last one wins.

        Raises:
            ValueError: If the parser refuses them, with what it says.
        """
        with tempfile.TemporaryDirectory() as scratch:
            words = [command]
            for file in files:
                words += ["--config", file]
            for number, layer in enumerate(layers):
                place = Path(scratch, f"{number}.yaml")
                place.write_text(yaml.safe_dump(dict(layer), sort_keys=False))
                words += ["--config", str(place)]
            said = io.StringIO()
            try:
                with redirect_stderr(said):
                    self.read_arguments(words)
            except SystemExit as end:
                text = said.getvalue().strip().removeprefix("lightning-kd: error: ")
                raise ValueError(text) from end
        self.config[command].pop("config", None)
        self.__dict__.pop("config_dump", None)
        self.subcommand = command
        self._dump_config()
        whole: dict[str, Any] = self.config_dump
        return {name: value for name, value in whole.items() if name != "ckpt_path"}
