"""Names of metrics that a run is told to watch."""

from difflib import get_close_matches

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_kd.loops.fit import checkpoint_callbacks, early_stoppings
from lightning_kd.schedules import AdaptiveShare


class MonitorChecks(Callback):
    """Check after the sanity check, before the first step, that what is monitored is logged.

    The sanity check is a validation of a few batches: all that a validation logs has been logged then.
    """

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for each monitor of validation among what was logged."""
        logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        for what, monitor in watchers(trainer):
            check_monitor(what, monitor, logged)


def check_monitor(what: str, monitor: str, logged: list[str]) -> None:
    """Refuse a monitor of validation that no validation logs.

    Args:
        what: What watches it.
        monitor: Its name. One that is neither of validation nor lacks ``val/`` may still come.
        logged: What a validation logs.

    Raises:
        ValueError: If it is not there.

    Example:
        >>> check_monitor("EarlyStopping", "val/los", ["val/loss"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: EarlyStopping monitors val/los, which is not logged; did you mean val/loss? ...
    """
    prefixed = f"val/{monitor}"
    if monitor in logged or not (monitor.startswith("val/") or prefixed in logged):
        return
    near = [prefixed] if prefixed in logged else get_close_matches(monitor, logged, n=1)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    raise ValueError(f"{what} monitors {monitor}, which is not logged; {hint} {', '.join(logged)}")


def watchers(trainer: L.Trainer) -> list[tuple[str, str]]:
    """Return what decides by a metric in a run, each with the name of the metric."""
    found = [(type(c).__name__, c.monitor) for c in early_stoppings(trainer)]
    found += [(type(c).__name__, c.monitor or "") for c in checkpoint_callbacks(trainer)]
    shares = [getattr(c, "lmbda", None) for c in trainer.callbacks]  # type: ignore[attr-defined]
    found += [("on_policy.lmbda", s.monitor) for s in shares if isinstance(s, AdaptiveShare)]
    scheduled = [c for c in trainer.lr_scheduler_configs if c.reduce_on_plateau]
    return found + [("model.lr_scheduler", str(config.monitor)) for config in scheduled]
