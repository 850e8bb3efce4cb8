"""LightningCLI over the modules, data and callbacks of this library."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info

# All that a configuration may name by its class name alone.
import lightning_kd.public  # noqa: F401
from lightning_kd.callbacks import (
    HFExport,
    JsonlPredictions,
    NonFiniteGuard,
    OnPolicyGeneration,
    ProgressBar,
)
from lightning_kd.checkpoints import AtomicCheckpointIO
from lightning_kd.cli.arguments import Text, as_text, missing_arguments
from lightning_kd.cli.check import CommandTrainer
from lightning_kd.cli.export import with_run_config
from lightning_kd.cli.messages import is_for_the_user
from lightning_kd.cli.models import settle_models
from lightning_kd.cli.named_configs import with_config_files
from lightning_kd.cli.output import what_is_left, whose_weights
from lightning_kd.cli.preparation import find_own_modules
from lightning_kd.cli.unused import check_used
from lightning_kd.named_checkpoints import (
    checkpoint_places,
    find_checkpoint,
    is_checkpoint,
    why_no_checkpoint,
)
from lightning_kd.preflight import Preflight
from lightning_kd.processes import wait_for
from lightning_kd.run_directories import claim_version, give_back

RUNS = "runs"
"""Default directory of runs."""

TRACEBACK = "LIGHTNING_KD_TRACEBACK"
"""Environment variable; where it is set, errors come with all that led to them."""

_HELP = {
    "ckpt_path": "A checkpoint; or last or best, of the run whose config.yaml is given with --config.",
    "config": "A YAML file, or the name of a config that comes along: gkd, overlays/ddp.",
}
"""Help of options that Lightning says less of."""


class DistillationCLI(LightningCLI):
    """LightningCLI in subclass mode, with the export and the predictions always at hand."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        typed = {*sys.argv[1:2]} & {*self.subcommands()} if options.get("args") is None else set()
        # It takes a moment to collect a command's options: those of the others are not needed.
        self._described = typed or {*self.subcommands()}
        self._claimed: list[Path] = []
        super().__init__(*arguments, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, and those of this library."""
        own = {"model", "datamodule"}
        return LightningCLI.subcommands() | {"cache": own, "check": own, "export": own}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse a command line, and refuse one that leaves out what a class needs."""
        if args is not None:
            super().parse_arguments(parser, args)
            return
        try:
            given = with_run_config(with_config_files(sys.argv[1:]))
            check_used(given)
        except ValueError as error:
            self.parser.error(str(error))
        if given != sys.argv[1:]:  # with a config, whose classes may lie elsewhere
            find_own_modules(given)
        self.read_arguments(given)

    def read_arguments(self, given: list[str]) -> None:
        """Parse a command and its options.

        Args:
            given: The words after the program's name.
        """
        self.config = self.parser.parse_args(as_text(settle_models(given)))
        for name, value in list(self.config.items()):
            if isinstance(value, Text):
                self.config[name] = str(value)
        missing = list(missing_arguments(self.config))
        if missing:
            self.parser.error("\n".join(missing))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has."""
        parser.add_lightning_class_args(HFExport, "export")
        parser.add_lightning_class_args(JsonlPredictions, "predictions")
        parser.add_lightning_class_args(NonFiniteGuard, "non_finite")
        parser.add_lightning_class_args(Preflight, "preflight")
        parser.add_argument(
            "--on_policy",
            type=OnPolicyGeneration | None,
            default=None,
            help="Which model generates the completions. Defaults to those of the data set.",
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        if subcommand not in self._described:
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        for action in parser._actions:
            action.help = _HELP.get(action.dest, action.help)
        if subcommand == "predict":
            # The completions go to a file as they come; memory need not hold them too.
            parser.set_defaults({"return_predictions": False})
        return parser

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint that is meant; the configuration is never overridden by what is in it.

        It is no part of the configuration that a run leaves: who uses that one means another.
        """
        options = self.config[self.config["subcommand"]]
        self._checkpoint = None
        if "ckpt_path" not in options:
            return
        self._checkpoint, options["ckpt_path"] = options["ckpt_path"], None
        if self._checkpoint in {"last", "best"}:
            try:
                self._checkpoint = str(
                    find_checkpoint(self._checkpoint, checkpoint_places(options))
                )
            except (OSError, ValueError) as error:
                self.parser.error(str(error))
        elif self._checkpoint not in {None, "hpc", "registry"}:
            if why := why_no_checkpoint(self._checkpoint):
                self.parser.error(f"--ckpt_path: {why}")
            if not is_checkpoint(self._checkpoint):
                self.parser.error(f"the checkpoint {self._checkpoint!r} does not exist")

    def before_instantiate_classes(self) -> None:
        """Set the default logger's directory to the trainer's ``default_root_dir``."""
        trainer = self._get(self.config, "trainer")
        root, options = trainer["default_root_dir"], _own_logger(trainer["logger"])
        if root is None or options is None or str(options["save_dir"]) == str(root):
            return
        if options["save_dir"] != RUNS:
            self.parser.error(
                f"trainer.default_root_dir is {str(root)!r}, but runs are written to "
                f"trainer.logger.save_dir, which is {str(options['save_dir'])!r}; give both the same"
            )
        options["save_dir"] = str(root)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """The trainer, with what every run has: rollouts where asked for, safe checkpoints."""
        trainer = self._get(self.config_init, "trainer")
        strategy, known = trainer["strategy"], StrategyRegistry.available_strategies()
        if isinstance(strategy, str) and strategy not in {"auto", *known}:
            self.parser.error(f"unknown strategy {strategy!r}; choose auto or one of {known}")
        if self.subcommand != "fit":
            # Its numbers are printed; a directory of a run is for what was trained.
            kept = [x for x in _listed(trainer["logger"]) if not _makes_directories(x)]
            kwargs["logger"], self.save_config_callback = kept, None
        plugins = _listed(trainer["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if self.subcommand == "export":
            export = self._get(self.config_init, "export")
            return CommandTrainer.for_export({**trainer, **kwargs}, export)
        on_policy = self._get(self.config_init, "on_policy")
        if self.subcommand == "cache":
            return CommandTrainer.of_options(trainer, self.model, on_policy=on_policy)
        callbacks = _listed(trainer["callbacks"])
        if trainer["enable_progress_bar"] is not False and not _has_progress_bar(callbacks):
            callbacks = [*callbacks, ProgressBar()]
        # Behind the others, so that a clock that starts with a step counts generation.
        kwargs["callbacks"] = [*callbacks, *_listed(on_policy)]
        return super().instantiate_trainer(**kwargs)

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is not None and not isinstance(seed, bool) and not 0 <= seed < 2**32:
            self.parser.error(f"seed_everything is {seed}; it must lie in [0, {2**32 - 1}]")
        super()._set_seed()

    def instantiate_classes(self) -> None:
        """Build everything; a value that a constructor refuses is an error of the command line."""
        try:
            super().instantiate_classes()
        except Exception as error:
            self._say(error, begun=False)
            raise

    def before_fit(self) -> None:
        """Give the run a directory of its own."""
        self._claimed = claim_version(self.trainer) or []

    def after_fit(self) -> None:
        """Say where everything is, and what to type next."""
        rank_zero_info(what_is_left(self.trainer))

    def before_validate(self) -> None:
        """Say whose weights are evaluated where no checkpoint is given."""
        said = whose_weights(self.model, self._get(self.config, "config") or [])
        if self._checkpoint is None and said:
            rank_zero_info(said)

    before_test = before_predict = before_validate

    def _run_subcommand(self, subcommand: str) -> None:
        launcher = self.trainer.strategy.launcher
        if isinstance(launcher, _MultiProcessingLauncher):
            # It only waits for the others, which save: they end before it does.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            super()._run_subcommand(subcommand)
            wait_for(launcher)
        except Exception as error:
            if not self.trainer.fit_loop.epoch_loop.batch_progress.total.ready:
                give_back(self._claimed)
            self._say(error, begun=hasattr(self.model, "micro_batch_loss"))
            raise

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self._checkpoint}

    def _say(self, error: Exception, *, begun: bool) -> None:
        """Say an error in a few lines, unless it is a defect that shows in the middle of training."""
        # A file or directory that is gone, or a full disk, is no defect wherever it shows.
        outside = isinstance(error, MisconfigurationException | OSError)
        meant = outside or is_for_the_user(error)
        if os.environ.get(TRACEBACK) or (begun and not meant):
            return
        text = "\n".join([str(error), *getattr(error, "__notes__", ())])
        if not meant and not isinstance(error, ValueError | ImportError):
            text = f"{type(error).__name__}: {text}\n({TRACEBACK}=1 shows where it comes from)"
        self.parser.error(text)


def _own_logger(logger: Any) -> Any:
    """Return the options of the logger that runs have by themselves; None where another is given."""
    if not getattr(logger, "class_path", "").endswith(".TensorBoardLogger"):
        return None
    return logger.init_args if logger.init_args["name"] == "" else None


def _makes_directories(logger: Any) -> bool:
    return isinstance(logger, bool | TensorBoardLogger | CSVLogger)


def _has_progress_bar(callbacks: list[Any]) -> bool:
    return any(isinstance(callback, AnyProgressBar) for callback in callbacks)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
