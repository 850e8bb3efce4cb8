"""Language-model distillation in PyTorch Lightning.

:mod:`lightning_kd.public` lists what is here. It is imported when one of its names is first asked for,
so that importing the package takes no time: ``lightning-kd --help`` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_kd.version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_kd.public import *  # noqa: F403
    from lightning_kd.public import __all__ as __all__


def __getattr__(name: str) -> Any:
    """Return a public name, or a part of the package."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = import_module("lightning_kd.public")
    if hasattr(public, name):
        return getattr(public, name)
    if name in globals():  # a part that was imported with it
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
