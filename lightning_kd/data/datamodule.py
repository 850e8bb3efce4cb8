"""What every data module shares: the tokenizer, the loaders, and steps instead of epochs."""

import math
from abc import abstractmethod
from typing import Literal, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_kd.data.collate import Collator
from lightning_kd.data.loader import EvaluationLoader, RolloutPlan, Rows, TrainingLoader
from lightning_kd.models.vocabulary import load_tokenizer
from lightning_kd.seeding import run_seed

Split = Literal["train", "validation", "test", "predict"]
_SPLITS_OF: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


@runtime_checkable
class PlansRollouts(Protocol):
    """A callback that decides how training comes back to what was written on the way."""

    def rollout_plan(self, trainer: L.Trainer) -> RolloutPlan:
        """The plan of a trainer's run."""
        ...


class DistillationData(L.LightningDataModule):
    """Rows of each split, as batches of :class:`~lightning_kd.types.Batch`.

    A data module derives from this class and writes :meth:`rows`.

    Args:
        tokenizer: Directory or hub name, or a tokenizer. It needs an EOS.
        batch_size: Rows of a micro-batch on one process.
        eval_batch_size: Rows of an evaluation batch; ``batch_size`` when not given.
        num_workers: Processes that prepare batches ahead; the rows do not depend on it.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        *,
        tokenizer: str | PreTrainedTokenizerBase,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(
                f"batch_size is {batch_size} and eval_batch_size {eval_batch_size}; "
                "they must be 1 or more"
            )
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 0 or more")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.eval_batch_size = eval_batch_size or batch_size
        self._tokenizer = tokenizer
        self._rows: dict[Split, Rows | None] = {}

    @abstractmethod
    def rows(self, split: Split) -> Rows | None:
        """The rows of a split, or None where it was not given."""

    def files(self, split: Split) -> dict[str, str]:
        """Names and digests of the files that a split is read from; none where it is generated."""
        return {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for.

        Raises:
            ValueError: If there is none, or it has no EOS.
        """
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token; completions could not end")
        return self._tokenizer

    def setup(self, stage: str) -> None:
        """Read and tokenize the splits of a stage.

        Raises:
            ValueError: If a split that the stage needs was not given.
        """
        stage = TrainerFn(stage).value
        for split in _SPLITS_OF[stage]:
            self.read(split, optional=stage == "fit" and split == "validation")
        if stage == "fit":
            self._count_steps()
            if self._rows["validation"] is None:
                # An empty loader in its place would make Lightning warn at every run.
                self._attached_trainer().limit_val_batches = 0

    def read(self, split: Split, *, optional: bool = False) -> None:
        """Read and tokenize a split, once.

        Raises:
            ValueError: If it was not given, and is not optional.
        """
        if split not in self._rows:
            self._rows[split] = self.rows(split)
        if self._rows[split] is None and not optional:
            raise ValueError(f"{type(self).__name__} was not given data.{split}, which is needed")

    def train_dataloader(self) -> TrainingLoader:
        """The whole run as one stream."""
        return self.stream(self._plan())

    def stream(self, plan: RolloutPlan) -> TrainingLoader:
        """The training rows of the whole run, in the windows of a plan."""
        rows, trainer = self._ready("train"), self._attached_trainer()
        return TrainingLoader(
            rows,
            self._collator,
            batch_size=self.batch_size,
            micro_batches=trainer.max_steps * trainer.accumulate_grad_batches,
            seed=run_seed(),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=self.num_workers,
            plan=plan,
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
        rows, trainer = self._ready(split), self._attached_trainer()
        return EvaluationLoader(
            rows,
            self._collator,
            batch_size=self.eval_batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=self.num_workers,
        )

    def _ready(self, split: Split) -> Rows:
        rows = self._rows.get(split)
        if rows is None:
            raise ValueError(
                f"there are no {split} rows: they were not given, or setup was not called"
            )
        return rows

    def _attached_trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise ValueError("the loaders follow the trainer: pass datamodule=... to trainer.fit")
        return self.trainer

    def _plan(self) -> RolloutPlan:
        trainer = self._attached_trainer()
        planners = [c for c in trainer.callbacks if isinstance(c, PlansRollouts)]  # type: ignore[attr-defined]
        if len(planners) > 1:
            raise ValueError(f"{len(planners)} callbacks write completions; give only one")
        return planners[0].rollout_plan(trainer) if planners else RolloutPlan()

    def _count_steps(self) -> None:
        """Turn epochs into optimizer steps: for Lightning, the whole run is one epoch.

        A position in one long stream is all the state that an exact resume needs; a position in an
        epoch and a count of epochs can disagree.
        """
        trainer, rows, plan = self._attached_trainer(), self._rows["train"], self._plan()
        if trainer.max_steps != -1:
            return
        assert rows is not None
        samples = len(rows) * plan.group_size * plan.passes
        global_batch = self.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(
                "give trainer.max_steps or trainer.max_epochs: one pass over "
                f"{len(rows)} rows is {math.ceil(samples / global_batch)} steps"
            )
        steps = math.ceil(epochs * samples / global_batch)
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit_loop.max_epochs = 1
        rank_zero_info(f"{epochs} epochs over {len(rows)} rows are {steps} optimizer steps")
