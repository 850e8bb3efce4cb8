"""Modules whose checkpoints tell how they were made: ``hparams`` and ``load_from_checkpoint``."""

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import FrameType
from typing import Any, Self

import lightning as L
import torch
from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE, _PATH
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from transformers import PreTrainedModel

from lightning_kd.checkpoints import RUN_KEY, AtomicCheckpointIO
from lightning_kd.models import StudentSpec
from lightning_kd.models.architecture import architecture_of, model_of
from lightning_kd.models.given import student_of
from lightning_kd.rebuilding import from_plain, missing, plain_arguments
from lightning_kd.resuming import Resumable

_OBJECTS, _STUDENT = "objects", "student"
_ONLY_TO_TRAIN = ("optimizer", "lr_scheduler")
_NEEDED_LATER = "tokenizer"


class RestorableModule(Resumable, L.LightningModule):
    """A module whose constructor arguments are its ``hparams``, as plain data.

    Loggers show them, and :meth:`load_from_checkpoint` reads them. What plain data cannot tell (a
    model in memory, a function without a name) is not among them.
    """

    student: PreTrainedModel
    """The model that trains, once ``configure_model`` has built it."""

    student_spec: StudentSpec

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Save constructor arguments as ``hparams``; it is done for you, once, for all of them.

        Args:
            args: Names of arguments, or one mapping of further values. Defaults to all arguments.
            ignore: Names of arguments that are left out.
            frame: Has no effect, as the arguments are known without it.
            logger: Whether loggers show them.
        """
        told, self._objects = plain_arguments(
            self.constructor_arguments(), _given_hyperparameters.get() or {}
        )
        names = [name for name in args if isinstance(name, str)]
        chosen = {name: told[name] for name in names or told if name in told}
        for values in args:
            if not isinstance(values, str):
                chosen = (chosen if names else {}) | dict(values)
        left_out = [ignore] if isinstance(ignore, str) else list(ignore or ())
        self._log_hyperparams = logger
        self._set_hparams({n: value for n, value in chosen.items() if n not in left_out})
        self.remove_ignored_hparams(left_out)
        self._hparams_initial = deepcopy(self._hparams)

    def restoration(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside ``hparams`` for the module to be made from it."""
        if not hasattr(self, "student"):  # a run that was broken off before it was built
            return {_OBJECTS: self._objects}
        return {_OBJECTS: self._objects, _STUDENT: architecture_of(self.student)}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is a descriptor
        cls,
        checkpoint_path: _PATH,
        map_location: _MAP_LOCATION_TYPE = None,
        hparams_file: _PATH | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **given: Any,
    ) -> Self:
        """Return a module with the weights of a checkpoint, made with the arguments it was saved with.

        The student is ready at once; a teacher is loaded when a trainer needs it.

        Args:
            checkpoint_path: A checkpoint that a trainer has saved from this class, in one file.
            map_location: Where its weights go. Defaults to the CPU.
            hparams_file: Not supported: the checkpoint has the arguments.
            strict: Whether all weights must be those of the student, and no others. Defaults to true.
            weights_only: Never false: nothing in a checkpoint is executed.
            given: Constructor arguments in place of the saved ones. What a checkpoint cannot hold must
                be among them: a teacher that was handed over as an object, for one.

        Raises:
            ValueError: If an argument is needed, which is named, or the checkpoint is another method's.
        """
        if hparams_file is not None or weights_only is False:
            raise ValueError(
                "hparams_file and weights_only=False are not supported: the checkpoint has the "
                "arguments as plain data; give others by name, load_from_checkpoint(path, alpha=0.5)"
            )
        checkpoint = AtomicCheckpointIO().load_checkpoint(
            checkpoint_path, map_location or "cpu", weights_only=True
        )
        about = checkpoint.get(RUN_KEY, {})
        check_method(about, cls.__name__)
        if _STUDENT not in about:
            raise ValueError(
                f"{checkpoint_path} was not written by this version of the library, and does not say "
                f"how its module was made: build {cls.__name__}(...) yourself, and give "
                "ckpt_path to the trainer"
            )
        saved: dict[str, Any] = dict(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        weights: dict[str, torch.Tensor] = checkpoint["state_dict"]
        spec = None
        if "student" not in given and "student" in saved:
            spec = student_of(from_plain(saved["student"]))
        loads = "student" in given or (spec is not None and spec.quantization is not None)
        if not loads:
            dtype = next(
                (w.dtype for w in weights.values() if w.is_floating_point()), torch.float32
            )
            built = model_of(about[_STUDENT], spec, dtype)
            given = {"student": StudentSpec.of(built) if spec is None else spec, **given}
        module = cls(**cls._arguments_from(saved, about[_OBJECTS], given))
        if loads:
            built = module.student_spec.build(module.tokenizer)
        module.student = built
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(weights, strict=strict is not False)
        return module.to(next(iter(weights.values())).device) if weights else module

    @classmethod
    def _arguments_from(
        cls, saved: dict[str, Any], objects: Sequence[str], given: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the constructor's arguments: those that were given, and the others as saved.

        Raises:
            ValueError: If one is unknown.
        """
        known = inspect.signature(cls.__init__).parameters
        required = [
            n for n, p in known.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY
        ]
        lacking = {*required, *objects} - {*saved, *given, *_ONLY_TO_TRAIN, _NEEDED_LATER}
        if lacking:
            names = ", ".join(sorted(lacking))
            raise ValueError(
                f"the checkpoint does not hold {names}, which was handed over as an object: give "
                f"load_from_checkpoint(..., {', '.join(f'{n}=...' for n in sorted(lacking))})"
            )
        functions = {n: missing(n) for n in _ONLY_TO_TRAIN if n in objects}
        return {
            **{name: from_plain(value) for name, value in saved.items() if name not in given},
            **functions,
            **given,
        }


def check_method(about: Mapping[str, Any], own: str) -> None:
    """Validate that a checkpoint was written by a method.

    Args:
        about: What the checkpoint says of its run.
        own: Name of the method.

    Raises:
        ValueError: If it was another one.
    """
    method = about.get("method", "something else")
    if method != own:
        raise ValueError(
            f"the checkpoint was written by {method}, this is {own}. To go on from its weights, give "
            "the directory that the run exported as model.student.name_or_path"
        )
