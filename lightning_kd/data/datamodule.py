"""Base of data modules: the tokenizer and the loaders."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.data.collate import Collator
from lightning_kd.data.evaluation_loader import EvaluationLoader
from lightning_kd.data.loader import TrainingLoader
from lightning_kd.data.loading_options import check_loading
from lightning_kd.data.plan import RolloutPlan
from lightning_kd.data.rows import EncodedRows
from lightning_kd.data.workers import WORKER_TIMEOUT, Rows
from lightning_kd.loops import prepare_trainer
from lightning_kd.resuming import Resumable
from lightning_kd.seeding import run_seed
from lightning_kd.tokenization import TokenizerLike, tokenizer_of

Split = Literal["train", "validation", "test", "predict"]
_SPLITS_OF: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}

_ROWS_AT_ONCE = 64
"""Rows of a batch of texts that nobody trains on."""


class DistillationData(Resumable, L.LightningDataModule):
    """Rows of each split, as batches of :class:`~lightning_kd.batch.Batch`.

    A data module derives from this class and writes :meth:`rows`.

    Args:
        tokenizer: Directory or hub name, or a tokenizer. It needs an EOS.
        batch_size: Rows of a micro-batch on one process.
        eval_batch_size: Rows of an evaluation batch. Defaults to ``batch_size``.
        num_workers: Processes that prepare batches ahead; the rows do not depend on it.
        worker_timeout: Longest wait for a batch of theirs, in seconds: one that hangs ends the run.

    Raises:
        ValueError: If a value is out of its range.
    """

    # The rows of a step are compared, not how many of them a process has.
    may_change_on_resume = frozenset(
        {"batch_size", "eval_batch_size", "num_workers", "worker_timeout"}
    )

    def __init__(
        self,
        *,
        tokenizer: TokenizerLike,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__()
        check_loading(batch_size, eval_batch_size, num_workers, worker_timeout)
        self.batch_size = batch_size
        self.num_workers, self.worker_timeout = num_workers, worker_timeout
        self.eval_batch_size = eval_batch_size or batch_size
        self._tokenizer = tokenizer
        self._rows: dict[Split, Rows | None] = {}
        self._rollout_plan: RolloutPlan | None = None
        self._planned_by = ""

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments that a resumed run must not change."""
        return super().resume_settings() | {"tokenizer": self.tokenizer}

    @abstractmethod
    def rows(self, split: Split) -> Rows | None:
        """Return the rows of a split, or None if it was not given."""

    def files(self, split: Split) -> dict[str, str]:
        """Return names and digests of the files of a split; none if it is generated."""
        return {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for.

        Raises:
            ValueError: If there is none, or it has no EOS.
        """
        self._tokenizer = tokenizer_of(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token; completions could not end")
        return self._tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the splits of a stage, or all that were given.

        Without a trainer too: its loaders are then those of one process, and of steps of one
        micro-batch.

        Raises:
            ValueError: If a split that the stage needs was not given, or limits of the trainer
                cannot be kept.
        """
        if stage is None:
            for split in get_args(Split):
                self.read(split, optional=True)
            return
        stage, trainer = TrainerFn(stage).value, self.trainer
        if stage == "fit":
            self._rollout_plan = None  # that of an earlier run
            if trainer is not None:
                prepare_trainer(trainer)
        for split in _SPLITS_OF[stage]:
            self.read(split, optional=stage == "fit" and split == "validation")
        if stage == "fit":
            self._limit_validation()

    def read(self, split: Split, *, optional: bool = False) -> None:
        """Read and tokenize a split, once.

        Raises:
            ValueError: If it was not given, and is not optional.
        """
        if split not in self._rows:
            self._rows[split] = self.rows(split)
        if self._rows[split] is None and not optional:
            raise ValueError(f"{type(self).__name__} was not given data.{split}, which is needed")

    def has(self, split: Split) -> bool:
        """Return whether a split was given and has been read."""
        return self._rows.get(split) is not None

    def texts(self, split: Split) -> Iterator[Batch]:
        """Yield every row of a split once, in its first pass, divided among the processes."""
        if not self.has(split):
            return
        rows, (rank, world_size) = self._ready(split), self._process
        for start in range(rank, len(rows), world_size * _ROWS_AT_ONCE):
            own = range(start, len(rows), world_size)[:_ROWS_AT_ONCE]
            yield self.batch_of(split, own)

    def place_of(self, split: Split, row: int) -> str:
        """Return the place of a row of a split in its file, or its number."""
        rows = self._ready(split)
        return rows.place_of(row) if isinstance(rows, EncodedRows) else f"{split}[{row}]"

    def read_rows(self, split: Split) -> Rows:
        """Return the rows of a split that has been read."""
        return self._ready(split)

    def batch_of(self, split: Split, numbers: Sequence[int]) -> Batch:
        """Return some rows of a split by their numbers, in their first pass, as one batch."""
        rows = self._ready(split)
        return self._collator([(row, row, rows.example(row, 0)) for row in numbers])

    def check_repeats(self, split: Split) -> None:
        """Validate that every pass over a split has the same texts.

        Raises:
            ValueError: If it has not, as packed text at random offsets.
        """
        if getattr(self._rows.get(split), "changes_with_pass", False):
            raise ValueError(
                f"the {split} texts of {type(self).__name__} are other ones in each pass, for blocks "
                "of packed text begin at random offsets, and a cache knows only texts that come again. "
                "Use DocumentData, or data.offsets: fixed"
            )

    @property
    def rollout_plan(self) -> RolloutPlan | None:
        """The windows, passes and groups of a run whose completions are generated on the way."""
        return self._rollout_plan

    def follow_plan(self, plan: RolloutPlan, *, given_by: str) -> None:
        """Cut the run's training rows into the windows of a plan.

        A callback that generates completions calls this in its ``setup`` for ``fit``: Lightning sets
        the data up before it, and builds the loaders after it.

        Args:
            plan: Windows, passes and groups.
            given_by: The callback, for errors.

        Raises:
            ValueError: If another callback has given one.
        """
        if self._rollout_plan is not None:
            raise ValueError(
                f"{self._planned_by} and {given_by} would both generate the completions of this run; "
                "give trainer.callbacks only one of them. If there is only one, the other was of an "
                f"earlier run: call super().setup(stage) in the setup of {type(self).__name__}"
            )
        self._rollout_plan, self._planned_by = plan, given_by

    def longest(self) -> dict[str, tuple[int, int]]:
        """Tokens of the longest row and of the longest prompt of each split, where they are known."""
        known = {split: getattr(rows, "max_lengths", None) for split, rows in self._rows.items()}
        return {split: longest for split, longest in known.items() if longest is not None}

    def longest_of_teacher(self) -> dict[str, tuple[int, int]]:
        """Tokens of the longest row and prompt of each split that its teacher reads in another form."""
        found = {
            split: getattr(rows, "max_teacher_lengths", None) for split, rows in self._rows.items()
        }
        return {split: longest for split, longest in found.items() if longest is not None}

    def cut_prompts(self) -> dict[str, str]:
        """Place of a row of each split whose prompt is cut for the student and not for its teacher."""
        cut = {split: getattr(rows, "cut_prompt", None) for split, rows in self._rows.items()}
        return {split: where for split, where in cut.items() if where is not None}

    def column(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yield the values of a further column of all rows that were read, each with its place.

        Raises:
            ValueError: If rows that may have further columns do not have it.
        """
        for rows in self._rows.values():
            if isinstance(rows, EncodedRows):
                yield from rows.column(name)

    def train_dataloader(self) -> TrainingLoader:
        """The training rows, an epoch at a time."""
        self._limit_validation()  # a search for a batch size has set its own
        return self.stream(self._rollout_plan)

    def stream(self, plan: RolloutPlan | None = None) -> TrainingLoader:
        """Return the training rows in the windows of a plan. Defaults to optimizer steps."""
        rows, (rank, world_size) = self._ready("train"), self._process
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return TrainingLoader(
            rows,
            self._collator,
            batch_size=self.batch_size,
            seed=run_seed(),
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            worker_timeout=self.worker_timeout,
            plan=plan or RolloutPlan(accumulate),
            files=self.files("train"),
        )

    def val_dataloader(self) -> EvaluationLoader:
        """Every validation row once."""
        return self._evaluation("validation")

    def test_dataloader(self) -> EvaluationLoader:
        """Every test row once."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Every row to complete, once."""
        return self._evaluation("predict")

    @property
    def _collator(self) -> Collator:
        pad = self.tokenizer.pad_token_id
        return Collator(self.tokenizer.eos_token_id if pad is None else pad)

    def _evaluation(self, split: Split) -> EvaluationLoader:
        rows, (rank, world_size) = self._ready(split), self._process
        return EvaluationLoader(
            rows,
            self._collator,
            batch_size=self.eval_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            worker_timeout=self.worker_timeout,
        )

    def _limit_validation(self) -> None:
        if self.trainer is not None and self._rows.get("validation", ...) is None:
            # An empty loader in its place would make Lightning warn at every run.
            self.trainer.limit_val_batches = 0

    def _ready(self, split: Split) -> Rows:
        rows = self._rows.get(split)
        if rows is None:
            raise ValueError(
                f"there are no {split} rows: they were not given, or setup was not called"
            )
        return rows

    @property
    def _process(self) -> tuple[int, int]:
        """This process among those of the run, and how many there are."""
        return (
            (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        )
