"""Import paths of classes that a user wrote: where they are found, and why one gives no class."""

import ast
import inspect
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import ModuleType

KEPT = "own_modules.txt"
"""File beside the ``config.yaml`` of a run: the directories in which it found modules, one a line."""

FOUND_WHERE = (
    "a package of your own is found beside a file of --config, where the run found it whose "
    "config.yaml that is, in the working directory, where it is installed (pip install -e .) or "
    "where PYTHONPATH has its directory (PYTHONPATH=. lightning-kd ...)"
)

_DOTTED = re.compile(r"(?<![\w./-])([A-Za-z_]\w*)(?:\.\w+)+")

_PARSING = Lock()
"""Python 3.11 fails where two threads build syntax trees at once."""


class OwnModules(MetaPathFinder):
    """Finder of modules that a command line names, in some directories, behind all other finders.

    It finds nothing else there: a directory ``wandb`` in the working directory is no package.

    Args:
        directories: The first that has a module gives it.
        names: Modules and packages, without what is in them.
    """

    def __init__(self, directories: Sequence[str], names: frozenset[str]) -> None:
        self.directories, self.names = directories, names

    @classmethod
    def of_arguments(cls, arguments: Sequence[str]) -> "OwnModules":
        """Look for modules that a command line and its configs name.

        Beside the configs, the last first, and where the run found them that wrote one; then in the
        working directory.
        """
        words = [word for a in arguments for word in (a, a.partition("=")[2])]
        files = [Path(word) for word in words if word.endswith((".yaml", ".yml"))]
        files = [file for file in files if file.is_file()]
        beside = [place for file in reversed(files) for place in _of_config(file)]
        texts = [*words, *(file.read_text(errors="replace") for file in files)]
        names = {name for text in texts for name in named_modules(text)}
        return cls(list(dict.fromkeys([*beside, str(Path.cwd())])), frozenset(names))

    def install(self) -> Iterator[str]:
        """Begin to find modules; yield what to say of those that are hidden by installed ones."""
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, OwnModules)]
        yield from map(self._hidden, sorted(self.names))
        sys.meta_path.append(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module by its name."""
        if path is not None or fullname not in self.names:
            return None
        return PathFinder.find_spec(fullname, self.directories)

    def used(self) -> list[str]:
        """Return the directories from which modules have been imported."""
        imported = {name: sys.modules[name].__spec__ for name in self.names & sys.modules.keys()}
        return [
            directory
            for directory in self.directories
            if any(
                spec is not None and _same(PathFinder.find_spec(name, [directory]), spec)
                for name, spec in imported.items()
            )
        ]

    def files(self, names: Iterable[str]) -> dict[str, list[Path]]:
        """Return the files of a user's own modules, and of those that they import, by module.

        Own is what lies neither in Python's library nor among installed packages: beside a config, in
        the working directory, on PYTHONPATH, or where ``pip install -e`` has left it.

        Args:
            names: Modules and packages, without what is in them. Those that are not own have no files.

        Returns:
            The file of each module; of a package, all of Python.
        """
        found: dict[str, list[Path]] = {}
        waiting = [(name, self.directories) for name in names]
        while waiting:
            name, directories = waiting.pop()
            if name in found or name == __package__:
                continue
            files = _own_files(_anywhere(name) or PathFinder.find_spec(name, directories))
            if files:
                found[name] = files
            for file in files:
                beside = [*directories, str(file.parent)]
                waiting += [(other, beside) for other in sorted(_imported(file) - found.keys())]
        return found

    def _hidden(self, name: str) -> str:
        own, installed = PathFinder.find_spec(name, self.directories), _anywhere(name)
        if own is None or own.origin is None or installed is None or installed.origin == own.origin:
            return ""
        return (
            f"{name} is the installed module {installed.origin}, and {own.origin} is not read; rename "
            "yours to have it read"
        )


def named_modules(text: str) -> set[str]:
    """Return the modules and packages that a text has import paths of.

    Example:
        >>> named_modules("my_lab.chi_squared.ChiSquared")
        {'my_lab'}
    """
    return {*_DOTTED.findall(text)}


def own_directories() -> list[str]:
    """Return the directories from which this process has imported modules that its command named."""
    finders = [finder for finder in sys.meta_path if isinstance(finder, OwnModules)]
    return [directory for finder in finders for directory in finder.used()]


def _of_config(file: Path) -> list[str]:
    """Return the directory of a config, and those where its run found modules, if it is a run's."""
    directory = file.resolve().parent
    kept = directory / KEPT
    known = kept.read_text().splitlines() if kept.is_file() else []
    return [str(directory), *(line for line in known if line.strip())]


def _anywhere(name: str) -> ModuleSpec | None:
    """Return where a module is found by all finders."""
    with suppress(ImportError, ValueError):
        return find_spec(name)
    return None


def _own_files(spec: ModuleSpec | None) -> list[Path]:
    """Return the files of a module; none where it is not a user's own."""
    if spec is None:
        return []
    below = spec.submodule_search_locations
    places = list(below) if below is not None else [spec.origin] if spec.has_location else []
    places = [place for place in places if place is not None and not _is_installed(place)]
    if below is not None:
        return sorted(file for place in places for file in Path(place).rglob("*.py"))
    return [Path(place) for place in places if os.path.isfile(place)]


def _is_installed(place: str) -> bool:
    ways = {os.path.abspath(place), os.path.realpath(place)}
    return any(way.startswith(f"{known}{os.sep}") for way in ways for known in _installed_places())


@cache
def _installed_places() -> set[str]:
    """Return the directories of Python's own library and of installed packages."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    places = [*map(sysconfig.get_path, names), *site.getsitepackages(), site.getusersitepackages()]
    return {way for place in places for way in (place, os.path.realpath(place))}


def _imported(file: Path) -> set[str]:
    """Return the modules and packages that a file imports, without what is in them."""
    try:
        with _PARSING:
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return set()
    nodes = [*ast.walk(tree)]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    return {name.partition(".")[0] for name in found}


def _same(one: ModuleSpec | None, other: ModuleSpec) -> bool:
    places = [list(spec.submodule_search_locations or ()) for spec in (one, other) if spec]
    return one is not None and one.origin == other.origin and places[0] == places[1]


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
        found_module = import_module(module)
        names = {known: getattr(found_module, known, None) for known in dir(found_module)}
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
