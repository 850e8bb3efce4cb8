"""What the test of each run measures: by which formula, and under which names."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch.nn import Parameter

from lightning_kd.callbacks import BLiMP, CompletionSamples, OwnCompletions
from lightning_kd.callbacks.evaluations import EvaluationCallback
from lightning_kd.comparison.experiment import Experiment
from lightning_kd.comparison.options import flat
from lightning_kd.evaluation import MeanScore
from lightning_kd.modules import DistillationModule
from lightning_kd.modules.evaluated_names import evaluated_names, loss_terms
from lightning_kd.modules.optimization import with_schedule

_NO_FORMULA = frozenset(
    {"student", "tokenizer", "optimizer", "lr_scheduler", "logits_backend", "generation", "engine"}
)
"""Options of a module that its loss is the same with."""


@dataclass(frozen=True)
class Measures:
    """What a test logs, as far as it can be known before it."""

    of_method: Collection[str]
    """Names whose formula is the method's own."""
    names: Collection[str] | None = None
    """All names; None where they are not known."""
    begins: Sequence[str] = ()
    """How further names begin."""


def measures(built: Mapping[str, Any], stage: str) -> Measures:
    """Return what a test logs.

    Args:
        built: Its module, and the callbacks of its trainer, as far as they were built.
        stage: What names begin with: ``test`` or ``val``.
    """
    module, callbacks = built.get("model"), _callbacks(built)
    if not isinstance(module, DistillationModule):
        return Measures({f"{stage}/loss"})
    terms = loss_terms(module) - {*module.eval_distribution.names}
    of_method = {f"{stage}/{name}" for name in {"loss", *terms}}
    if not all(map(_is_known, [module, *callbacks])):
        return Measures(of_method)
    own = evaluated_names(module)
    own |= {name for c in callbacks if isinstance(c, EvaluationCallback) for name in c.names()}
    begins = [f"{stage}/blimp"] if any(isinstance(c, BLiMP) for c in callbacks) else []
    return Measures(of_method, {f"{stage}/{name}" for name in own}, begins)


def _callbacks(built: Mapping[str, Any]) -> list[Any]:
    given = built["trainer"]["callbacks"] if "trainer" in built else None
    return given if isinstance(given, list) else [] if given is None else [given]


def _is_known(part: Any) -> bool:
    """Return whether all names are known that a module or a callback logs in a test."""
    if isinstance(part, CompletionSamples):
        return all(isinstance(metric, MeanScore) for metric in part.metrics)
    if isinstance(part, EvaluationCallback):
        return isinstance(part, BLiMP | OwnCompletions)
    return type(part).__module__.startswith(("lightning_kd.", "lightning.pytorch."))


def check_optimizer(module: Any) -> None:
    """Validate the options of an optimizer and a schedule, which are made when weights are there.

    Raises:
        ValueError: If one of them is refused.
    """
    if type(module).__module__.startswith("lightning_kd.") and isinstance(
        module, DistillationModule
    ):
        optimizer = module.make_optimizer([Parameter(torch.zeros(1, 1))])
        if module._lr_scheduler is not None:
            with_schedule(optimizer, module._lr_scheduler(optimizer))


def check_measures(
    experiment: Experiment, tests: Sequence[tuple[str, Mapping[str, Any], Measures]]
) -> None:
    """Validate that the tests of the runs of one table give its metrics, each by one formula.

    Args:
        experiment: Has the metrics.
        tests: Label of each run that is shown, with the whole configuration of its test and what it
            measures.

    Raises:
        ValueError: If one does not give a metric, or two give others under its name.
    """
    for metric in experiment.metrics:
        for label, _, given in tests:
            _check_given(metric.name, label, given)
        depending = [(label, test) for label, test, m in tests if metric.name in m.of_method]
        for label, test in depending[1:]:
            _check_formula(metric.name, depending[0], (label, test))


def check_curves(experiment: Experiment, trainings: Sequence[tuple[str, Measures | None]]) -> None:
    """Validate that a validation of some run gives each curve of validations.

    Args:
        experiment: Has the curves.
        trainings: Label of each run that is shown, with what its validations measure.

    Raises:
        ValueError: If none gives one.
    """
    known = [m for _, m in trainings if m is not None and m.names is not None]
    if not known or len(known) < len(trainings):
        return
    names = {name for m in known for name in m.names or ()}
    begins = tuple(begin for m in known for begin in m.begins)
    for curve in experiment.curves:
        name = curve.name
        if name.startswith("val/") and name not in names and not name.startswith(begins):
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"curves: no run will log {name}; {hint}their validations can log "
                f"{', '.join(sorted(names))}"
            )


def _check_given(name: str, label: str, given: Measures) -> None:
    known = given.names
    if known is None or name in known or name.startswith(tuple(given.begins)):
        return
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"metrics: the test of {label} will give no {name}; {hint}it can give "
        f"{', '.join(sorted([*known, *(f'{begin}...' for begin in given.begins)]))}, and with "
        "callbacks more (test: {trainer: {callbacks: ...}}, docs/evaluation.md)"
    )


def _check_formula(
    name: str, one: tuple[str, Mapping[str, Any]], other: tuple[str, Mapping[str, Any]]
) -> None:
    first, second = formula(one[1]), formula(other[1])
    if first == second:
        return
    stage = name.partition("/")[0]
    option = next(key for key in first | second if first.get(key) != second.get(key))
    what = [
        f"{label} ({found.get(option)})"
        if option == "class"
        else f"{label} ({option}: {found.get(option)})"
        for (label, _), found in ((one, first), (other, second))
    ]
    raise ValueError(
        f"metrics: {name} of {what[0]} and {what[1]} are different formulas; measure all runs by one "
        f"(test: {{model: {{class_path: SFT}}}} under common), or take {stage}/bits_per_byte or "
        f"{stage}/perplexity, which are the same in all"
    )


def formula(test: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the loss of a module depends on: its class, and the options that are in it.

    Example:
        >>> options = {"student": {}, "normalization": "token"}
        >>> formula({"model": {"class_path": "lightning_kd.SFT", "init_args": options}})
        {'class': 'SFT', 'normalization': 'token'}
    """
    model = test["model"]
    options = {n: v for n, v in model["init_args"].items() if n not in _NO_FORMULA}
    return {"class": model["class_path"].rpartition(".")[2], **flat(options)}
