"""Reads experiment files, and refuses what no experiment has."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

from lightning_kd.comparison.claims import check_claims, read_claims
from lightning_kd.comparison.experiment import Experiment, Layer, Variant
from lightning_kd.comparison.metrics import COSTS, USUAL_COSTS, read_metrics
from lightning_kd.comparison.yaml_files import load
from lightning_kd.option_checks import is_number

FIT_OPTIONS = ("data", "model", "non_finite", "on_policy", "preflight", "trainer")
"""Options of ``fit`` that an experiment may give; ``export.weights`` too."""

_LAYER = (*FIT_OPTIONS, "export", "config", "test")
_RUN = (*_LAYER, "once", "shown", "seed_everything", "label", "variations")
_FILE = (
    *("title", "questions", "placeholders", "tokenizers", "config", "common", "runs", "variations"),
    *("budgets", "quick", "metrics", "curves", "costs", "pairs", "claims"),
)
_NAME = re.compile(r"[A-Za-z0-9_][\w.,=+-]*")
_RESERVED = frozenset({"seed", "student"})
_OF_OUTPUT = re.compile(r"tokenizers|compare\.lock|report\.(json|md)|(curves|bars)(_.*)?\.png")
"""What a comparison itself writes beside the directories of its runs."""


def read_experiment(path: Path) -> Experiment:
    """Read an experiment file.

    Args:
        path: YAML; ``docs/comparing.md`` says what it holds.

    Raises:
        ValueError: If there is something in it that an experiment does not have.
    """
    said = _mapping(load(path), f"{path}")
    check_names(said, _FILE, f"{path}")
    common = _layer(said.get("common", {}), path, "common", _LAYER)
    common = replace(common, files=[*_files(said.get("config"), path, "config"), *common.files])
    runs = _mapping(said.get("runs", {}), f"{path}: runs")
    variants = [v for name, options in runs.items() for v in _variants(name, options, path)]
    variants += [
        Variant(name, Layer(options=options), name)
        for name, options in _varied(said.get("variations", {}), f"{path}: variations")
    ]
    budgets = {
        name: _layer(options, path, f"budgets.{name}", _LAYER)
        for name, options in _mapping(said.get("budgets", {}), f"{path}: budgets").items()
    }
    needs = _mapping(said.get("placeholders", {}), f"{path}: placeholders")
    quick = said.get("quick")
    made = Experiment(
        name=path.stem,
        title=str(said.get("title", path.stem)),
        variants=variants,
        questions=_texts(said.get("questions", []), f"{path}: questions"),
        placeholders={name: _default(value) for name, value in needs.items()},
        explained={name: _sentence(value) for name, value in needs.items()},
        tokenizers={
            name: _mapping(options, f"{path}: tokenizers.{name}")
            for name, options in _mapping(said.get("tokenizers", {}), f"{path}: tokenizers").items()
        },
        common=common,
        budgets=budgets,
        quick=None if quick is None else _layer(quick, path, "quick", _LAYER),
        metrics=read_metrics(said.get("metrics", {}), f"{path}: metrics"),
        curves=read_metrics(said.get("curves", {}), f"{path}: curves"),
        costs=_texts(said.get("costs", list(USUAL_COSTS)), f"{path}: costs"),
        pairs=_pairs(said.get("pairs", []), f"{path}: pairs"),
        claims=read_claims(said.get("claims", []), f"{path}: claims"),
        file=str(path),
    )
    _check(made, str(path))
    return made


def of_configs(paths: Sequence[Path]) -> Experiment:
    """Return the experiment that compares ordinary configurations, each under its file's name.

    Raises:
        ValueError: If two have one name.
    """
    for path in paths:
        load(path)
    variants = [Variant(path.stem, Layer([str(path)]), path.stem) for path in paths]
    name = "_".join(path.stem for path in paths)
    made = Experiment(name, ", ".join(path.stem for path in paths), variants)
    _check(made, "--configs")
    return made


def check_names(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Validate that all names are known.

    Raises:
        ValueError: If one is not, with the nearest.
    """
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{where}: there is no {name!r}; {hint}choose of {', '.join(known)}")


def _check(made: Experiment, where: str) -> None:
    names = [variant.name for variant in made.variants]
    if not names:
        raise ValueError(f"{where}: there are no runs; give runs, or variations of one")
    taken = [*names, *made.budgets, *made.placeholders, *made.tokenizers]
    for name in taken:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
            raise ValueError(
                f"{where}: {name!r} is no name; one has letters, digits and any of _ . , = + - and is "
                f"neither of {sorted(_RESERVED)}"
            )
        if taken.count(name) > 1:
            raise ValueError(
                f"{where}: {name} is the name of two runs, budgets, placeholders or tokenizers"
            )
    for name in [*names, *made.budgets]:
        if _OF_OUTPUT.fullmatch(name):
            raise ValueError(
                f"{where}: {name!r} is what a comparison itself writes into its --output, where a run "
                "and a budget have a directory of their name; choose another name"
            )
    check_names(dict.fromkeys(made.costs), tuple(COSTS), f"{where}: costs")
    _check_shown(made, where)
    check_claims(made, f"{where}: claims")
    stages = {metric.name.split("/")[0] for metric in made.metrics}
    if not stages <= {"test"} and not stages <= {"val"}:
        raise ValueError(
            f"{where}: metrics are all of the test split (test/...) or all of the validation split "
            f"(val/...), not {', '.join(metric.name for metric in made.metrics)}"
        )


def _check_shown(made: Experiment, where: str) -> None:
    """Validate that tables can tell runs apart, and have those whose differences are tested."""
    shown = [variant for variant in made.variants if variant.shown]
    labels = [variant.label for variant in shown]
    for variant in shown:
        if labels.count(variant.label) > 1:
            raise ValueError(
                f"{where}: {variant.label} is the label of two runs; give each its own"
            )
    names = [variant.name for variant in shown]
    check_names(dict.fromkeys(run for pair in made.pairs for run in pair), names, f"{where}: pairs")
    for one, other in made.pairs:
        if one == other:
            raise ValueError(f"{where}: pairs: {one} does not differ from itself; name two runs")
        if sum({one, other} == {*pair} for pair in made.pairs) > 1:
            raise ValueError(
                f"{where}: pairs: the difference of {one} and {other} stands there twice, and p-values "
                "would be corrected for one test too many; name it once"
            )


def _variants(name: Any, given: Any, path: Path) -> list[Variant]:
    """Return a run, or one for each of its variations."""
    where = f"runs.{name}"
    layer = _layer(given or {}, path, where, _RUN)
    options = dict(layer.options)
    flags = {"once": options.pop("once", False), "shown": options.pop("shown", True)}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {where}.{flag} is {value!r}; it is true or false")
    times, plus = _seed(options.pop("seed_everything", {}), f"{path}: {where}.seed_everything")
    label = str(options.pop("label", name))
    varied = _varied(options.pop("variations", {}), f"{path}: {where}.variations")
    made = Variant(
        name, replace(layer, options=options), label, **flags, seed_times=times, seed_plus=plus
    )
    return [
        replace(
            made,
            name=f"{name}-{value}",
            label=f"{label} {value}",
            layer=replace(layer, options=merged(options, more)),
        )
        for value, more in varied
    ] or [made]


def _seed(given: Any, where: str) -> tuple[int, int]:
    rule = {"times": 1, "plus": 0, **_mapping(given, where)}
    check_names(rule, ("times", "plus"), where)
    for name, value in rule.items():
        if not is_number(value, whole=True) or value < 0:
            raise ValueError(f"{where}.{name} is {value!r}; it is a whole number, 0 or more")
    return rule["times"], rule["plus"]


def _varied(given: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return a name and options for each combination of values."""
    choices: list[list[tuple[str, dict[str, Any]]]] = []
    for option, values in _mapping(given, where).items():
        check_names({option.split(".")[0]: None}, FIT_OPTIONS, where)
        if isinstance(values, list) and not any(isinstance(v, dict | list) for v in values):
            values = {str(value): value for value in values}
        named = _mapping(values, f"{where}.{option}, where a value has options,")
        choices.append([(str(name), _nested(option, value)) for name, value in named.items()])
    return [
        (",".join(name for name, _ in chosen), reduce(merged, (more for _, more in chosen)))
        for chosen in (product(*choices) if choices else ())
    ]


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested options of two mappings; those of the second win.

    Example:
        >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
        {'a': {'b': 3, 'c': 2}}
    """
    both = {**one, **other}
    for name in one.keys() & other.keys():
        if isinstance(one[name], Mapping) and isinstance(other[name], Mapping):
            both[name] = merged(one[name], other[name])
    return both


def _nested(option: str, value: Any) -> dict[str, Any]:
    for name in reversed(option.split(".")):
        value = {name: value}
    return dict(value)


def _layer(given: Any, path: Path, where: str, known: Sequence[str]) -> Layer:
    options = dict(_mapping(given, f"{path}: {where}"))
    check_names(options, known, f"{path}: {where}")
    check_names(_mapping(options.get("export", {}), where), ("weights",), f"{path}: {where}.export")
    files = _files(options.pop("config", None), path, f"{where}.config")
    test = _mapping(options.pop("test", {}), f"{path}: {where}.test")
    check_names(test, FIT_OPTIONS, f"{path}: {where}.test")
    return Layer(files, options, test)


def _files(given: Any, path: Path, where: str) -> list[str]:
    """Return configuration files, which an experiment file names from where it lies."""
    listed = [given] if isinstance(given, str) else given or []
    files = [str(path.parent / name) for name in _texts(listed, f"{path}: {where}")]
    for file in files:
        load(Path(file))
    return files


def _mapping(given: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} holds names and what belongs to each, not {given!r:.80}")
    return given


def _texts(given: Any, where: str) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{where} is a list of texts, not {given!r:.80}")
    return given


def _pairs(given: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(given, list) or not all(isinstance(p, list) and len(p) == 2 for p in given):
        raise ValueError(f"{where} is a list of two runs each, not {given!r:.80}")
    return [(str(one), str(other)) for one, other in given]


def _default(given: Any) -> Any:
    return given.get("default") if isinstance(given, Mapping) else None


def _sentence(given: Any) -> str:
    return str(given.get("help", "")) if isinstance(given, Mapping) else str(given)
