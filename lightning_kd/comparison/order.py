"""Which run of an experiment comes before which."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from lightning_kd.comparison.experiment import Experiment, Variant
from lightning_kd.comparison.placeholders import placeholders


def ordered_runs(experiment: Experiment, values: Mapping[str, Any]) -> list[Variant]:
    """Return the runs, each after those whose students it reads, and otherwise as in the file.

    Raises:
        ValueError: If a placeholder stands for nothing, or runs read each other.
    """
    by_name = {variant.name: variant for variant in experiment.variants}
    known = {*by_name, *values, "seed"}
    whole = [experiment.common, *experiment.budgets.values()]
    whole += [experiment.quick] if experiment.quick else []

    def needs(variant: Variant) -> list[str]:
        layers = [*whole, variant.layer]
        trained = [*placeholders([layer.options for layer in layers])]
        tested = [*placeholders([layer.test for layer in layers])] if variant.shown else []
        for name in trained:
            _check_known(variant, name, known)
        for name in tested:
            _check_known(variant, name, known | {"student"})
        if variant.name in trained:
            raise ValueError(f"run {variant.name} starts from its own student, {{{variant.name}}}")
        # Its own name in a test, as of the teacher that all are measured with, is its own student.
        found = dict.fromkeys([*trained, *tested])
        return [name for name in found if name in by_name and name != variant.name]

    order: list[Variant] = []

    def visit(variant: Variant, above: Sequence[str]) -> None:
        if variant.name in above:
            raise ValueError(f"runs read each other: {' <- '.join([*above, variant.name])}")
        for name in needs(variant):
            if by_name[name] not in order:
                visit(by_name[name], [*above, variant.name])
        budgeted = [name for name in needs(variant) if not by_name[name].once]
        if experiment.budgets and variant.once and budgeted:
            raise ValueError(
                f"run {variant.name} is trained once for all budgets, but reads {budgeted[0]}, "
                "which is trained for each"
            )
        if variant not in order:
            order.append(variant)

    for variant in experiment.variants:
        visit(variant, [])
    return order


def _check_known(variant: Variant, name: str, known: set[str]) -> None:
    if name in known:
        return
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {{{near[0]}}}? " if near else ""
    raise ValueError(
        f"run {variant.name}: {{{name}}} stands for nothing; {hint}name a run, or declare it under "
        f"placeholders (there are {', '.join(sorted(known))})"
    )
