"""A loader of the user's own, in windows of rollouts."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.data.plan import RolloutPlan
from lightning_kd.data.window import Window
from lightning_kd.own_batches import with_prompts

_ROWS = 2**24
"""Numbers of rows that are kept for a batch: more than one has."""


class WindowedLoader:
    """The batches of another loader, with prompts, in the windows of a plan.

    An epoch is one of the other loader's. A run that goes on in the middle of one skips what was
    trained on: it goes on exactly where the other loader's order is the same in each run (a seeded
    generator, or none).

    Args:
        loader: Gives batches of ``input_ids``, ``attention_mask`` and, if it likes, ``labels``.
        plan: Windows and passes.
        tokenizer: For padding and texts.
        accumulate: Micro-batches of an optimizer step.
        rank: This process.
        world_size: All of them.

    Raises:
        ValueError: If the loader has no length, or windows cannot be made of its batches.
    """

    def __init__(
        self,
        loader: Iterable[Mapping[str, Any]],
        plan: RolloutPlan,
        tokenizer: PreTrainedTokenizerBase,
        *,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.loader, self.plan, self.tokenizer = loader, plan, tokenizer
        self.rank, self.world_size = rank, world_size
        self.batches = 0
        """Batches that this rank has been handed in the run."""
        self._in_epoch = 0
        self._goes_on = False
        self._window: Window | None = None
        self._place = 0
        try:
            length = len(loader)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(
                f"on_policy needs a loader that has a length, and this {type(loader).__name__} has "
                "none; use a map-style data set, or a data module of this library"
            ) from error
        self._length = length
        own = plan.micro_batches == accumulate and plan.passes == 1
        if plan.group_size > 1 or (not own and length % plan.micro_batches):
            what = (
                f"group_size is {plan.group_size}"
                if plan.group_size > 1
                else f"windows have {plan.micro_batches} micro-batches, and the loader gives {length}"
            )
            raise ValueError(
                f"{what}: with a loader of your own each prompt has one completion, and windows of "
                "several steps or passes divide an epoch. Use a data module of this library, such as "
                "PromptCompletionData"
            )

    @property
    def rollout_plan(self) -> RolloutPlan:
        """The plan: completions are generated."""
        return self.plan

    @property
    def sampler(self) -> Any:
        """The other loader's, which Lightning tells each epoch."""
        return getattr(self.loader, "sampler", None)

    @property
    def batch_sampler(self) -> Any:
        """The other loader's, which Lightning tells each epoch."""
        return getattr(self.loader, "batch_sampler", None)

    def __len__(self) -> int:
        """Return the micro-batches of an epoch, on this rank, in all passes."""
        return self._length * self.plan.passes

    def __iter__(self) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch, or the rest of one."""
        if not self._goes_on:
            self._in_epoch = 0
        self._goes_on = False
        size = self.plan.micro_batches
        first, begun = divmod(self._in_epoch, size * self.plan.passes)
        given = islice(iter(self.loader), first * size, None)
        before = self.batches - self._in_epoch
        for number in range(first, -(-self._length // size)):
            these = list(islice(given, size))
            start = before // self.plan.passes + number * size
            numbered = [self._numbered(batch, start + place) for place, batch in enumerate(these)]
            window = Window(start, len(numbered), iter(numbered))
            for place in [*range(len(numbered))] * self.plan.passes:
                if begun > 0:
                    begun -= 1
                    continue
                self._window, self._place = window, place
                self.batches, self._in_epoch = self.batches + 1, self._in_epoch + 1
                yield window[place]

    def window_of(self, batch: Batch) -> tuple[Window, int]:
        """Return the window of the batch that was handed out last, and its place there."""
        assert self._window is not None  # a batch was handed out
        return self._window, self._place

    @property
    def ends_window(self) -> bool:
        """Whether the last batch ended its window, in its last pass."""
        in_window = self._in_epoch % self.plan.window
        return in_window == 0 or self._in_epoch == len(self)

    def state_dict(self) -> dict[str, int]:
        """Return how many batches have been handed out."""
        return {"batches": self.batches, "in_epoch": self._in_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind these."""
        self.batches, self._in_epoch = state["batches"], state["in_epoch"]
        self._goes_on = self._in_epoch < len(self)

    def _numbered(self, batch: Mapping[str, Any], number: int) -> Batch:
        return with_prompts(batch, self.tokenizer, (number * self.world_size + self.rank) * _ROWS)
