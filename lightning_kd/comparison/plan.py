"""The runs of an experiment, one for each seed and budget, with all that each is given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.comparison.experiment import Experiment, Layer, Variant
from lightning_kd.comparison.order import ordered_runs
from lightning_kd.comparison.outputs import check_written
from lightning_kd.comparison.placeholders import fill, placeholders
from lightning_kd.comparison.refusals import (
    check_files,
    check_options,
    check_split,
    check_tested,
)
from lightning_kd.comparison.tested import (
    Measures,
    check_curves,
    check_measures,
    check_optimizer,
    measures,
)

Resolve = Callable[[str, Sequence[str], Sequence[Mapping[str, Any]]], dict[str, Any]]
"""Parses a command with configuration files and further options; returns the whole configuration."""

Build = Callable[[], Mapping[str, Any]]
"""Builds, of what was parsed last, all that needs neither weights nor rows."""


@dataclass(frozen=True)
class Job:
    """One training and its test."""

    variant: Variant
    budget: str
    """Empty where there are none, and for a run that all budgets share."""
    seed: int
    directory: Path
    fit: Mapping[str, Any]
    """The whole configuration of ``fit``."""
    test: Mapping[str, Any]
    """The whole configuration of the test."""
    stage: str
    """The command that measures: ``test`` or ``validate``."""
    fit_reads: Sequence[Path] = field(default_factory=list)
    """Directories of the runs whose students it trains from."""
    test_reads: Sequence[Path] = field(default_factory=list)
    """Directories of the runs whose students its test reads."""
    measures: Measures | None = None
    """What its test measures; None where nothing was built."""
    logs: Measures | None = None
    """The same of its validations in training."""

    @property
    def title(self) -> str:
        """What a line of progress calls it."""
        budget = f", {self.budget}" if self.budget else ""
        return f"{self.variant.label}{budget}, seed {self.seed}"

    @property
    def student(self) -> Path:
        """The exported student."""
        return student_of(self.directory)


def student_of(directory: Path) -> Path:
    """Return where a run's student goes."""
    return directory / "student"


def values_of(experiment: Experiment, given: Sequence[str]) -> dict[str, Any]:
    """Return what stands for each placeholder.

    Args:
        experiment: Has their names and defaults.
        given: ``NAME=VALUE``, as typed.

    Raises:
        ValueError: If a name is unknown or a value missing.
    """
    values = dict(experiment.placeholders)
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: give it as NAME=VALUE")
        if name not in values:
            near = get_close_matches(name, values, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"--set {text}: {experiment.name} has no placeholder {name!r}; {hint}it has "
                f"{', '.join(values) or 'none'}"
            )
        values[name] = _as_typed(value)
    missing = [name for name, value in values.items() if value is None]
    if missing:
        lines = [f"  --set {name}=...  {experiment.explained.get(name, '')}" for name in missing]
        raise ValueError("\n".join([f"{experiment.name} needs", *lines]))
    return values


def _as_typed(text: str) -> Any:
    """Return what YAML makes of a text; the text, where that would be written in another way.

    Example:
        >>> [_as_typed(text) for text in ("5", "true", "[1, 2]", "010", "1:30", "yes")]
        [5, True, [1, 2], '010', '1:30', 'yes']
    """
    value = yaml.safe_load(text)
    kept = value is None or isinstance(value, list | dict) or text in ("true", "false")
    return value if kept or str(value) == text else text


def plan(
    experiment: Experiment,
    seeds: Sequence[int],
    output: Path,
    values: Mapping[str, Any],
    resolve: Resolve,
    *,
    build: Build | None = None,
    quick: bool = False,
) -> list[Job]:
    """Return the runs in the order in which they are made: a run comes after those that it reads.

    Args:
        experiment: The experiment.
        seeds: Each run is made with each of them.
        output: Directory of all runs.
        values: What stands for each placeholder.
        resolve: The parser, which refuses what no run could take.
        build: Refuses what constructors do; of the first seed alone, as the others differ in little.
        quick: Whether the smaller sizes are meant.

    Raises:
        ValueError: If a run could not be started as it is given.
    """
    if quick and experiment.quick is None:
        raise ValueError(f"--quick: {experiment.name} says no smaller sizes (quick:)")
    ordered = ordered_runs(experiment, values)
    jobs: list[Job] = []
    for seed in seeds:
        for variant in ordered:
            for budget in [""] if variant.once else experiment.budgets or [""]:
                last = experiment.quick if quick else None
                layers = [experiment.common, variant.layer]
                layers += [experiment.budgets[budget]] if budget else []
                jobs.append(
                    _job(
                        variant,
                        [*layers, *([last] if last else [])],
                        seed,
                        budget,
                        output,
                        {**values, "seed": seed},
                        _students(experiment, budget, seed, output),
                        resolve,
                        build if seed == seeds[0] else None,
                        _stage(experiment),
                    )
                )
    check_written((job.title, job.fit, job.test) for job in jobs)
    shown = [job for job in jobs if job.variant.shown and job.seed == seeds[0]]
    check_curves(experiment, [(job.variant.label, job.logs) for job in shown])
    for budget in [*experiment.budgets] or [""]:
        check_measures(
            experiment,
            [
                (job.variant.label, job.test, job.measures)
                for job in shown
                if job.measures is not None and job.budget in ("", budget)
            ],
        )
    return jobs


def directory_of(variant: Variant, budget: str, seed: int, output: Path) -> Path:
    """Return where everything of a run goes."""
    shared = variant.once or not budget
    return output / ("" if shared else budget) / variant.name / str(seed)


def _stage(experiment: Experiment) -> str:
    """Return the command that measures: ``test``, or ``validate`` where metrics begin with val/."""
    return "validate" if any(m.name.startswith("val/") for m in experiment.metrics) else "test"


def _students(experiment: Experiment, budget: str, seed: int, output: Path) -> dict[str, Any]:
    return {
        variant.name: str(student_of(directory_of(variant, budget, seed, output)))
        for variant in experiment.variants
    }


def _job(
    variant: Variant,
    layers: Sequence[Layer],
    seed: int,
    budget: str,
    output: Path,
    values: Mapping[str, Any],
    students: Mapping[str, str],
    resolve: Resolve,
    build: Build | None,
    stage: str,
) -> Job:
    directory = directory_of(variant, budget, seed, output)
    files = [file for layer in layers for file in layer.files]
    read = {**values, **students, "student": str(student_of(directory))}
    options = [fill(layer.options, read) for layer in layers if layer.options]
    tested = [fill(layer.test, read) for layer in layers if layer.test]
    own = _own(variant, seed, directory, output)
    where = f"run {variant.name}" + (f", budget {budget}" if budget else "")
    found, logs = None, None
    try:
        check_options(files, [*options, *tested])
        check_files(files, read)
        check_tested(tested)
        fit = resolve("fit", files, [*options, own])
        if build is not None:
            built = build()
            check_optimizer(built.get("model"))
            logs = measures(built, "val")
        start = {"model": {"init_args": {"student": _exported(fit, read["student"])}}}
        quiet = {"trainer": {"logger": False}, "on_policy": None}
        test = resolve(stage, files, [*options, own, start, *tested, quiet])
        check_split(test, stage)
        if build is not None:
            found = measures(build(), {"test": "test", "validate": "val"}[stage])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

    def of_others(parts: Sequence[Mapping[str, Any]]) -> list[Path]:
        named = {*placeholders(parts)} & students.keys() - {variant.name}
        return [Path(students[name]).parent for name in sorted(named)]

    return Job(
        variant,
        budget,
        seed,
        directory,
        fit,
        test,
        stage,
        of_others([layer.options for layer in layers]),
        of_others([layer.test for layer in layers]),
        found,
        logs,
    )


def _own(variant: Variant, seed: int, directory: Path, output: Path) -> dict[str, Any]:
    """Return the options that a comparison decides."""
    logger = {"save_dir": str(output), "name": str(directory.relative_to(output)), "version": ""}
    return {
        "seed_everything": variant.seed_times * seed + variant.seed_plus,
        "trainer": {
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {**logger, "default_hp_metric": False},
            },
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks+": [{"class_path": "TrainingCost"}],
        },
        "export": {"dirpath": str(student_of(directory))},
    }


def _exported(fit: Mapping[str, Any], student: str) -> dict[str, Any]:
    """Return what a student is loaded from after training; adapters are in its weights by then."""
    trained = fit["model"]["init_args"].get("student") or {}
    adapted = (trained.get("init_args") or trained).get("lora") is not None
    return {"name_or_path": student} | ({"lora": None} if adapted else {})
