"""The parser of the trainer's commands, without running them."""

import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lightning_kd.cli.distillation_cli import DistillationCLI
from lightning_kd.cli.messages import shorten


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

    def build(self) -> Mapping[str, Any]:
        """Build what the configuration that was parsed last says, without weights and rows.

        Modules and data of a user's own are left out: their constructors may load anything, and what
        an earlier run is to leave is not there yet. What else than a value fails is left to the run.

        Returns:
            What was built, by the names of the options; nothing where that failed.

        Raises:
            ValueError: If a constructor refuses a value.
        """
        config = self.config.clone()
        for name in ("model", "data"):
            if not config[self.subcommand][name].class_path.startswith("lightning_kd."):
                del config[self.subcommand][name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself will say it
            try:
                built = self.parser.instantiate_classes(config)[self.subcommand]
            except ValueError as error:
                raise ValueError(shorten(str(error))) from error
            except Exception:
                return {}
        by_name: Mapping[str, Any] = vars(built)  # nested, as dict(built) is not
        return by_name
