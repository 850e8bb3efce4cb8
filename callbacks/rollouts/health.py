"""Health of a student that learns from its own completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kd.batch import Batch, Rollout
from lightning_kd.callbacks.rollouts.lengths import LengthHistory
from lightning_kd.callbacks.rollouts.log_probs import LogProbDifference
from lightning_kd.callbacks.rollouts.runaway import RunawayWarning
from lightning_kd.evaluation import Overlap
from lightning_kd.generation import Completions, GenerationOptions
from lightning_kd.modules import DistillationModule, TeacherModule
from lightning_kd.scoring import ScoredPositions

_OVERLAP_K = 16
"""Tokens that the most likely ones are compared by, as far as the teacher tells them."""

_FEWEST_WINDOWS = 4
"""Windows that have two halves with a mean each."""


@dataclass(frozen=True)
class HealthOptions:
    """Options of what is logged and warned of when a student learns from its own completions.

    Attributes:
        overlap_k: The k of ``top_k_overlap`` and of the overlap masses, at logged steps; 0 leaves them
            out. Defaults to 16 where the teacher tells so many tokens; another number is refused
            where it does not.
        windows: Windows of the student's completions that ``length_trend`` is computed from; the
            warning compares their halves.
        truncation_limit: Share of completions without an EOS above which a warning says that lengths
            run away; 1 never warns of it.

    Raises:
        ValueError: If a value is out of its range.
    """

    overlap_k: int | None = None
    windows: int = 20
    truncation_limit: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, ok, expected in (
            ("overlap_k", self.overlap_k is None or self.overlap_k >= 0, "0 (none) or more"),
            ("windows", self.windows >= _FEWEST_WINDOWS, f"{_FEWEST_WINDOWS} or more"),
            ("truncation_limit", 0 <= self.truncation_limit <= 1, "a share, in [0, 1]"),
        ):
            if not ok:
                raise ValueError(f"health.{name} is {getattr(self, name)!r}; it must be {expected}")


class RolloutHealth:
    """Trend of lengths, overlap with the teacher and each teacher's share, for one run at a time.

    Also how far the log-probabilities of training are from those that were recorded in sampling.

    Args:
        options: What is looked at.
        generation: How completions are sampled.
    """

    def __init__(self, options: HealthOptions, generation: GenerationOptions) -> None:
        self.options, self.generation = options, generation
        self.forget_run()

    def forget_run(self) -> None:
        """Begin a run."""
        self._history = LengthHistory(self.options.windows)
        longest = self.generation.max_new_tokens
        self._runaway = RunawayWarning(self.options.truncation_limit, longest)
        self._log_probs = LogProbDifference(self.generation)

    def check(self, module: DistillationModule) -> None:
        """Validate that the teacher can tell the most likely tokens that are asked for.

        Raises:
            ValueError: If it cannot.
        """
        k = self.options.overlap_k
        if not k:
            return
        if not isinstance(module, TeacherModule):
            raise ValueError(
                f"on_policy.health.overlap_k is {k}, and {type(module).__name__} has no teacher to "
                "compare with; leave it out"
            )
        if module.answer_kind not in {"full_distribution", "top_k", "top_k_and_token"}:
            raise ValueError(
                f"on_policy.health.overlap_k is {k}, and the teacher answers {module.answer_kind}, "
                "which does not tell its most likely tokens; leave it out"
            )
        if k > module.width:
            raise ValueError(
                f"on_policy.health.overlap_k is {k}, and {module.width} tokens are compared; lower it"
            )

    def compare(self, module: DistillationModule, on_policy: bool) -> None:
        """Have what is known at the tokens of a step measured, if the student has generated them."""
        self._log_probs.prepare(module, on_policy)
        k = self.options.overlap_k
        overlap = Overlap(_OVERLAP_K if k is None else k, is_required=k is not None)
        module.train_distribution.overlap = overlap if on_policy and overlap.k > 0 else None

    def add(
        self, module: DistillationModule, generated: Completions, window: int, step: int
    ) -> None:
        """Add a window that the student has generated, and warn if lengths run away.

        All ranks call this together.

        Args:
            module: The module that is trained.
            generated: This rank's completions.
            window: Number of the window.
            step: Optimizer steps before it.
        """
        self._log_probs.begin(step)
        self._history.add(module, generated, window, step)
        self._runaway.look(self._history)

    def compare_log_probs(self, module: DistillationModule, batch: Batch) -> None:
        """Compare a micro-batch that has been trained on with what was recorded in sampling.

        All ranks call this together.
        """
        self._log_probs.add(module, batch)

    def metrics(
        self, module: DistillationModule, rollouts: Sequence[Rollout], on_policy: bool
    ) -> Mapping[str, Tensor]:
        """Return the values of a window to log, by name; all ranks call this together.

        Args:
            module: The module that is trained.
            rollouts: This rank's micro-batches of the window; none if nothing was generated.
            on_policy: Whether the student has generated it.
        """
        values = {} if not rollouts else teacher_shares(module, rollouts)
        trend = self._history.trend()
        if on_policy and trend is not None:
            values["length_trend"] = torch.tensor(trend, dtype=torch.float64)
        return values | dict(self._log_probs.metrics()) if on_policy else values

    def state_dict(self) -> dict[str, Any]:
        """Return the same on all ranks, for a checkpoint."""
        return {
            "history": self._history.state_dict(),
            "runaway": self._runaway.state_dict(),
            "log_probs": self._log_probs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._history.load_state_dict(state["history"])
        self._runaway.load_state_dict(state["runaway"])
        if "log_probs" in state:
            self._log_probs.load_state_dict(state["log_probs"])


def teacher_shares(module: DistillationModule, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Return each teacher's share of the scored tokens of all ranks, by name.

    Args:
        module: A module; with one teacher for all rows there are no shares.
        rollouts: This rank's micro-batches.

    Returns:
        ``teacher_share/<name>`` for every teacher, also one without a token; nothing if no token is
        scored at all.
    """
    if not isinstance(module, TeacherModule):
        return {}
    counts: dict[str, Tensor] = {}
    for batch in rollouts:
        routed = module.teacher.routes(batch)
        if routed is None:
            return {}
        names, numbers = routed
        tokens = ScoredPositions.from_labels(batch["labels"]).tokens_per_row.double()
        for number, name in enumerate(names):
            own = tokens[numbers == number].sum()
            counts[name] = counts.get(name, torch.zeros_like(own)) + own
    everywhere = module.sum_over_ranks(torch.stack(list(counts.values())))
    total = everywhere.sum()
    if total == 0:
        return {}
    shares = (everywhere / total).unbind()
    return {f"teacher_share/{name}": share for name, share in zip(counts, shares, strict=True)}
