"""Windows of rollouts and epochs: the order in which a run visits its data."""

from dataclasses import dataclass

_MOST_MICRO_BATCHES = 2**16


@dataclass(frozen=True)
class RolloutPlan:
    """Plan of rollouts: windows of micro-batches, passes over each, completions of each prompt.

    Attributes:
        micro_batches: Of a window, on each rank: what is written at once. Without rollouts, those of
            an optimizer step.
        passes: How often each window is trained on before the next.
        group_size: Samples of each prompt, one after the other.

    Raises:
        ValueError: If a value is not 1 or more.
    """

    micro_batches: int = 1
    passes: int = 1
    group_size: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("micro_batches", "passes", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.micro_batches > _MOST_MICRO_BATCHES:
            raise ValueError(
                f"a window has {self.micro_batches} micro-batches on each process "
                "(steps_per_window times accumulate_grad_batches), which are all held at once; at "
                f"most {_MOST_MICRO_BATCHES:,} are allowed"
            )

    @property
    def window(self) -> int:
        """Micro-batches that a rank trains on from the start of a window to its end."""
        return self.micro_batches * self.passes

    def place(self, position: int) -> tuple[int, int]:
        """Return the window at a position of the run, and the place of its micro-batch there.

        Example:
            >>> plan = RolloutPlan(micro_batches=2, passes=2)
            >>> [plan.place(position) for position in range(6)]
            [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
        """
        window, within = divmod(position, self.window)
        return window, within % self.micro_batches


@dataclass(frozen=True)
class Epochs:
    r"""Starts of epochs, in windows of samples.

    A pass takes :math:`P` samples and a window :math:`W`. Epoch :math:`e` begins with window
    :math:`\max(e, \lceil e P / W \rceil)`: an epoch ends with the window in which its pass is complete,
    and has at least one. So epochs differ by one window at most, and the first is none of the
    shorter ones.

    Attributes:
        samples: Of a pass over the data.
        window: Samples of a window, over all ranks.

    Example:
        >>> [Epochs(samples=10, window=4).start(epoch) for epoch in range(4)]
        [0, 3, 5, 8]
        >>> [Epochs(samples=3, window=8).start(epoch) for epoch in range(4)]
        [0, 1, 2, 3]
    """

    samples: int
    window: int

    def start(self, epoch: int) -> int:
        """The first window of an epoch."""
        return max(epoch, -(-epoch * self.samples // self.window))

    def of(self, window: int) -> int:
        """The epoch that a window is in.

        Example:
            >>> [Epochs(samples=10, window=4).of(window) for window in range(6)]
            [0, 0, 0, 1, 1, 2]
        """
        epoch = min(window, window * self.window // self.samples)
        while self.start(epoch + 1) <= window:
            epoch += 1
        return epoch
