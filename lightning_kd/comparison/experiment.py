"""An experiment: runs that differ in what they are given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_kd.comparison.metrics import USUAL_COSTS, Metric


@dataclass(frozen=True)
class Layer:
    """Options that are laid over others, as ``--config`` files are."""

    files: Sequence[str] = ()
    """Configuration files, in front of the options."""
    options: Mapping[str, Any] = field(default_factory=dict)
    test: Mapping[str, Any] = field(default_factory=dict)
    """Options of the test, over those of the run."""


@dataclass(frozen=True)
class Variant:
    """A run of an experiment, whatever the seed."""

    name: str
    layer: Layer
    label: str
    """What tables and pictures call it."""
    once: bool = False
    """Whether it is trained once for all budgets."""
    shown: bool = True
    """Whether it is tested, and in tables and pictures; the others read one that is not."""
    seed_times: int = 1
    seed_plus: int = 0
    """The seed of the run is ``seed_times * seed + seed_plus``."""


@dataclass(frozen=True)
class Claim:
    """An ordering of two runs in a metric, written down before they are made."""

    run: str
    beats: str
    metric: str
    source: str = ""
    """Who says so."""


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in what they are given, and how they are compared."""

    name: str
    title: str
    variants: Sequence[Variant]
    questions: Sequence[str] = ()
    placeholders: Mapping[str, Any] = field(default_factory=dict)
    """Defaults by name; None where the command line must give a value."""
    explained: Mapping[str, str] = field(default_factory=dict)
    tokenizers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of ``lightning-kd tokenizer`` by name; learned before all runs."""
    common: Layer = Layer()
    budgets: Mapping[str, Layer] = field(default_factory=dict)
    quick: Layer | None = None
    metrics: Sequence[Metric] = ()
    """Columns of the table; empty for all that the test gives."""
    curves: Sequence[Metric] = ()
    costs: Sequence[str] = USUAL_COSTS
    pairs: Sequence[tuple[str, str]] = ()
    claims: Sequence[Claim] = ()
    file: str = ""
    """Where it was read; empty for one that was put together."""

    @property
    def runs_of_a_seed(self) -> int:
        """How many runs are made with each seed."""
        return sum(1 if variant.once else max(1, len(self.budgets)) for variant in self.variants)

    @property
    def all_files(self) -> list[str]:
        """Files that any run is read from."""
        quick = [self.quick] if self.quick else []
        layers = [self.common, *(v.layer for v in self.variants), *self.budgets.values(), *quick]
        own = [self.file] if self.file else []
        return list(dict.fromkeys([*own, *(file for layer in layers for file in layer.files)]))
