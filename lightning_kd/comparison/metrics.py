"""What a table shows of a run, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

COSTS = {
    "steps": "steps",
    "tokens": "tokens",
    "generated_tokens": "generated",
    "seconds": "training",
    "wall_seconds": "wall time",
    "peak_memory_mb": "memory",
}
"""What a run costs, and what a table calls it."""

USUAL_COSTS = ("steps", "tokens", "generated_tokens", "seconds")
"""Those that a table has by itself."""


@dataclass(frozen=True)
class Metric:
    """A number that runs log, and how it is shown."""

    name: str
    better: str = ""
    """``higher`` or ``lower``; empty where neither is."""
    title: str = ""
    percent: bool = False
    scale: str = "linear"
    """Of its axis: ``linear`` or ``log``."""

    @property
    def shown(self) -> str:
        """The title; the name where there is none."""
        return self.title or self.name

    def text(self, value: float) -> str:
        """Write a value.

        Example:
            >>> Metric("a", percent=True).text(0.954), Metric("b").text(0.06512)
            ('95.4 %', '0.06512')
        """
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


def read_metrics(given: Any, where: str) -> list[Metric]:
    """Read metrics: names, each with the direction that is better, or with all that is known of it.

    Args:
        given: What a file says.
        where: It stands.

    Raises:
        ValueError: If it is neither of these.

    Example:
        >>> read_metrics({"test/loss": "lower"}, "metrics")[0].better
        'lower'
    """
    if isinstance(given, list):
        given = dict.fromkeys(given)
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} holds names of metrics, not {given!r:.80}")
    return [_metric(name, said, f"{where}.{name}") for name, said in given.items()]


def _metric(name: Any, said: Any, where: str) -> Metric:
    options: dict[str, Any] = dict(said) if isinstance(said, Mapping) else {"better": said or ""}
    known = [each.name for each in fields(Metric)][1:]
    if not isinstance(name, str) or not options.keys() <= {*known}:
        raise ValueError(f"{where}: a metric has {', '.join(known)}, not {', '.join(options)}")
    for option, kind in get_type_hints(Metric).items():
        if option in options and not isinstance(options[option], kind):
            raise ValueError(
                f"{where}.{option} is {options[option]!r}; it must be a {kind.__name__}"
            )
    metric = Metric(name, **options)
    for option, value, choices in (
        ("better", metric.better, ("higher", "lower", "")),
        ("scale", metric.scale, ("linear", "log")),
    ):
        if value not in choices:
            raise ValueError(
                f"{where}.{option} is {value!r}; choose {' or '.join(filter(None, choices))}"
            )
    return metric
