"""What a step has not measured is not logged at that step."""

from collections.abc import Collection

import lightning as L


def forget_values(trainer: L.Trainer, names: Collection[str]) -> None:
    """Leave out of what is logged next the values of an earlier step.

    Lightning keeps what a module has logged until the epoch ends, and logs it again at each step in
    between: a metric that only some steps have, as those of completions that the student wrote, would
    stand at the others with a value of before.

    Args:
        trainer: The trainer, in training.
        names: Of the values.
    """
    kept = trainer._results
    for value in () if kept is None else kept.values():
        if value.meta.name in names:
            value.has_reset = True
