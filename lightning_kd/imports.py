"""Import paths of classes that a user wrote, and why one of them gives no class."""

import inspect
from difflib import get_close_matches
from importlib import import_module

FOUND_WHERE = (
    "a package of your own is found where it is installed (pip install -e .) or where PYTHONPATH has "
    "its directory (PYTHONPATH=. lightning-kd ...)"
)


def why_no_class(path: str, base: str) -> str:
    """Return why an import path does not name a class that can be built.

    Args:
        path: Module and class, ``my_lab.chi_squared.ChiSquared``.
        base: Name of the class from which it must derive.

    Returns:
        The reason; empty where there is none.

    Example:
        >>> why_no_class("lightning_kd.Divergenec", "Divergence")
        'lightning_kd has no Divergenec; did you mean Divergence?'
        >>> why_no_class("lightning_kd.Divergence", "Divergence")
        'lightning_kd.Divergence does not define value; write it in your class'
    """
    module, _, name = path.rpartition(".")
    try:
        names = vars(import_module(module))
    except ModuleNotFoundError as error:
        lacking = error.name or module
        if f"{module}.".startswith(f"{lacking}."):
            return f"cannot import {path}: there is no module {lacking}; {FOUND_WHERE}"
        return f"cannot import {module}: {error}"
    except Exception as error:  # whatever a module of the user's raises
        return f"cannot import {module}: {type(error).__name__}: {error}"
    if name not in names:
        classes = [known for known, value in names.items() if inspect.isclass(value)]
        near = get_close_matches(name, classes, n=1)
        return f"{module} has no {name}" + (f"; did you mean {near[0]}?" if near else "")
    found = names[name]
    if not inspect.isclass(found) or base not in {cls.__name__ for cls in found.__mro__}:
        return f"{path} is not a class that derives from {base}"
    if inspect.isabstract(found):
        lacks = " and ".join(sorted(getattr(found, "__abstractmethods__", ())))
        return f"{path} does not define {lacks}; write it in your class"
    return ""
