"""Warning of completions whose lengths run away."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_kd.callbacks.rollouts.lengths import LengthHistory, WindowLengths

_RISE = 1.25
"""Growth of the mean length that is no noise."""

_ENDLESS = 0.9
"""Share of completions that are cut in a run that has never learned to end."""

_HALF = 0.5
"""Share of empty completions, and of the longest mean that has been, that is a collapse."""

_HELP = (
    "See the table in docs/on_policy.md (Health). This is said once, until it has been well for as "
    "many windows."
)


@dataclass(frozen=True)
class _Half:
    """Means over half of the remembered windows."""

    length: float
    text: float
    truncated: float
    empty: float

    @classmethod
    def of(cls, windows: Sequence[WindowLengths]) -> "_Half":
        return cls(*(fmean(getattr(w, mean.name) for w in windows) for mean in fields(cls)))


class RunawayWarning:
    """Warns, once for each time that it begins, of completions that never end or that are empty.

    It looks at the newer half of the remembered windows, once there are as many as are remembered:

    - *too long*: more completions than the limit are cut, and their mean length is a quarter above
      the least that half as many windows had in this run, or nine in ten of all remembered are cut;
    - *too short*: most have no token before their EOS, or their mean is one such token or fewer and
      half of the most that it was in this run, or less.

    All ranks remember the same numbers, so they decide alike.

    Args:
        limit: Share of completions without EOS above which it may warn; 1 never warns of them.
        longest: Longest completion, for the message.
    """

    def __init__(self, limit: float, longest: int) -> None:
        self.limit, self.longest = limit, longest
        self._least: float | None = None
        self._most = 0.0
        self._seen: dict[str, int] = {}

    def look(self, history: LengthHistory) -> None:
        """Warn if it is time to; all ranks call this alike, after each window."""
        if not history.is_full:
            return
        windows = list(history.last)
        middle = len(windows) // 2
        older, newer = _Half.of(windows[:middle]), _Half.of(windows[-middle:])
        self._least = min(older.length, older.length if self._least is None else self._least)
        self._most = max(self._most, older.text)
        cut = fmean(each.truncated for each in windows)
        rises = newer.length >= _RISE * self._least
        if newer.truncated > self.limit and (rises or cut > max(self.limit, _ENDLESS)):
            self._warn("long", windows, self._too_long(newer, middle))
        if newer.empty > _HALF or (newer.text <= 1 and newer.text <= _HALF * self._most):
            self._warn("short", windows, self._too_short(newer, middle))

    def state_dict(self) -> dict[str, Any]:
        """Return what has been seen, for a checkpoint."""
        return {"least": self._least, "most": self._most, "seen": dict(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, which has warned of what goes on."""
        self._least, self._most = state["least"], state["most"]
        self._seen = dict(state["seen"])

    def _warn(self, kind: str, windows: Sequence[WindowLengths], message: str) -> None:
        before = self._seen.get(kind)
        # It goes on as long as one of the remembered windows has seen it.
        if before is None or before < windows[0].window:
            rank_zero_warn(f"{message} {_HELP}")
        self._seen[kind] = windows[-1].window

    def _too_long(self, newer: _Half, count: int) -> str:
        return (
            f"completions run away: rollout/truncation_rate is {newer.truncated:.2f} over the last "
            f"{count} windows that the student has generated (on_policy.health.truncation_limit is "
            f"{self.limit:g}), and rollout/length_mean is {newer.length:.1f} tokens, after "
            f"{self._least:.1f} where it was least; max_new_tokens is {self.longest}. Check that the "
            "EOS is trained and that the teacher expects the same one, leave cut completions out of "
            "the loss (on_policy.truncated: mask), lower model.optimizer.lr, or take a reward that "
            "falls with the length (RLDistillation)."
        )

    def _too_short(self, newer: _Half, count: int) -> str:
        return (
            f"completions collapse: over the last {count} windows that the student has generated, "
            f"rollout/empty_rate is {newer.empty:.2f}, and a completion has {newer.text:.2f} tokens "
            f"before its EOS (rollout/length_mean is {newer.length:.2f} with it), after "
            f"{self._most:.1f} where it was most. Lower model.optimizer.lr, check that teacher and "
            "student have the same template and EOS, and train on cut completions too "
            "(on_policy.truncated: keep), without which short ones are favored."
        )
