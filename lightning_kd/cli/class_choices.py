"""The classes that an unknown name on the command line may stand for."""

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches

import lightning_kd.callbacks
import lightning_kd.evaluation
import lightning_kd.public

NO_CLASS = "Expected a dot import path string: "
"""What jsonargparse says of a word that is the name of no class."""


def classes_to_choose(message: str) -> list[str]:
    """Return a line with the public classes that an unknown name may stand for, the nearest first.

    Example:
        >>> import lightning_kd
        >>> classes_to_choose('''Subtypes: [<class 'lightning_kd.generation.engine.Engine'>]
        ...     - Expected a dot import path string: CacheSampler''')
        ['did you mean CachedSampler? choose CachedSampler or ...']
    """
    given = re.search(rf"{NO_CLASS}(\S+)", message)
    if given is None:
        return []
    subtypes = re.sub(r"\[\[.*?\]", "[", message)  # what a callable takes is not what it makes
    named = re.findall(r"\b((?:[a-z_]\w*\.)+)([A-Z]\w*)\b", subtypes)
    if re.search(r'Parser key "(?:\w+\.)*optimizer"', message):
        named.append(("torch.optim.optimizer.", "Optimizer"))
    found: set[type] = set()
    named = [(module, name) for module, name in named if not module.startswith("collections.")]
    bases = [getattr(sys.modules.get(module[:-1]), name, None) for module, name in named]
    for base in bases:
        waiting = [base]
        while waiting:
            each = waiting.pop()
            if isinstance(each, type) and each not in found:
                found.add(each)
                waiting += each.__subclasses__()
    # What Lightning and torch derive theirs from does nothing by itself.
    theirs = {
        base for base in bases if not getattr(base, "__module__", "").startswith("lightning_kd")
    }
    names = sorted({c.__name__ for c in found - theirs if _is_choice(c)})
    if not names:
        return []
    near = get_close_matches(given[1], names, n=1)
    hint = f"did you mean {near[0]}? choose" if near else "choose"
    return [f"{hint} {' or '.join(names)}, or your own by its path"]


def class_comes_first(message: str, arguments: Sequence[str]) -> list[str]:
    """Return lines for an option of a class that is not named before it.

    Example:
        >>> import lightning_kd
        >>> print(*class_comes_first(
        ...     "Expected an instantiatable class, but lightning_kd.generation.Engine is abstract; "
        ...     "Given value: NestedArg(key='slots', val='4')", ["--model.engine.slots", "4"]
        ... ))  # doctest: +ELLIPSIS
        --model.engine.slots is an option of a class: name it before, --model.engine CLASS choose ...
    """
    found = re.search(r"but ([\w.]+) is abstract[\s\S]*?NestedArg\(key='([\w.]+)'", message)
    if found is None:
        return []
    options = (argument.split("=")[0] for argument in arguments)
    full = next((o for o in options if o.endswith(f".{found[2]}")), found[2])
    before = full.removesuffix(f".{found[2]}")
    named = f"{full} is an option of a class: name it before, {before} CLASS"
    return [named, *classes_to_choose(f"{NO_CLASS}. <class '{found[1]}'>")]


def _is_choice(cls: type) -> bool:
    """Return whether a class is public, not only a base of others, and of this library or below it."""
    package = cls.__module__.partition(".")[0]
    members = (getattr(cls, name, None) for name in dir(cls))
    if cls.__name__.startswith(("_", "Base")) or any(
        getattr(member, "__isabstractmethod__", False) for member in members
    ):
        return False
    if package == "lightning_kd":
        public = (lightning_kd.public, lightning_kd.callbacks, lightning_kd.evaluation)
        return any(getattr(part, cls.__name__, None) is cls for part in public)
    if cls.__module__.startswith("lightning.pytorch.demos."):
        return False
    below = {"lightning", "torch"}
    return package in below and cls.__bases__[0].__module__.partition(".")[0] in below
