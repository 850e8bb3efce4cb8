"""Models as users hand them over: by name, by configuration, or as objects."""

import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_kd.models.model_spec import ModelSpec
from lightning_kd.models.student_spec import StudentSpec

if TYPE_CHECKING:
    ModelLike = str | os.PathLike[str] | Mapping[str, Any] | PretrainedConfig | PreTrainedModel
    StudentLike = StudentSpec | ModelLike
else:
    # What a command line and its help offer: all that can be written there.
    StudentLike = StudentSpec

_Spec = TypeVar("_Spec", bound=ModelSpec)


def student_of(given: object) -> StudentSpec:
    """Return the spec of a student, given as such, by name, by configuration or as a model.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> student_of("Qwen/Qwen3-0.6B").name_or_path
        'Qwen/Qwen3-0.6B'
    """
    if isinstance(given, StudentSpec):
        return given
    spec = spec_of(given, StudentSpec, "student")
    if spec is None:
        raise ValueError(
            f"student is a {kind_of(given)}; give the name or directory of a model, its configuration "
            "(with model_type), a model of transformers or peft, or StudentSpec(...)"
        )
    return spec


def spec_of(given: object, kind: type[_Spec], role: str) -> _Spec | None:
    """Return the spec of a model that is given by name, by configuration or as an object.

    Args:
        given: A name or directory, fields of a configuration with ``model_type``, a configuration
            of transformers, or a model; it is used, not copied.
        kind: Class of the spec.
        role: Of the model, for messages.

    Returns:
        None if it is none of these.

    Raises:
        ValueError: If the model is compiled as a whole.
    """
    match given:
        case str() | os.PathLike():
            return kind(os.fspath(given))
        case PretrainedConfig():
            return kind(config={"model_type": given.model_type, **given.to_dict()})
        case Mapping() if "model_type" in given:
            return kind(config=dict(given))
        case Mapping() if given.keys() & {"name_or_path", "config"}:
            return _of_options(given, kind, role)
        case nn.Module() if hasattr(given, "_orig_mod"):
            raise ValueError(
                f"the {role} is a model that torch.compile has wrapped, whose weights have other names "
                "and whose output head is out of reach. Give the model itself, and compile its layers "
                "in place: for layer in model.model.layers: layer.compile()"
            )
        case nn.Module() if isinstance(getattr(given, "config", None), PretrainedConfig):
            # Of a class of one's own, only its forward pass can tell.
            known = type(given).__module__.startswith("transformers.")
            if known and cast(PreTrainedModel, given).get_output_embeddings() is None:
                raise ValueError(
                    f"the {role} is a {type(given).__name__}, which has no output head; load it with "
                    "AutoModelForCausalLM"
                )
            return kind.of(given)
    return None


def _of_options(given: Mapping[str, Any], kind: type[_Spec], role: str) -> _Spec:
    """Return the spec of the options that a configuration file would have."""
    known = inspect.signature(kind).parameters
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ValueError(f"{role} has the options {unknown}; there are {sorted(known)}")
    return kind(**given)


def kind_of(given: object) -> str:
    """Return what a value is, in a word; of a class, that it is one."""
    return f"class ({given.__name__})" if isinstance(given, type) else type(given).__name__
