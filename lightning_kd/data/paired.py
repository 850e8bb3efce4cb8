"""Two streams in step: prompts to complete, and plain text beside them."""

from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import Batch, PairedBatch
from lightning_kd.data.datamodule import DistillationData
from lightning_kd.data.evaluation_loader import EvaluationLoader
from lightning_kd.data.loader import TrainingLoader
from lightning_kd.data.plain_text import PackedTextData
from lightning_kd.data.plan import RolloutPlan
from lightning_kd.data.window import Window
from lightning_kd.resuming import Resumable


class PairedLoader:
    """The batches of one loader, each with one of the other's: :class:`~lightning_kd.PairedBatch`.

    Epochs are the main loader's; text is taken at the same positions of the run.

    Args:
        main: Gives the batches, and its windows to what writes completions.
        text: As many batches.
    """

    def __init__(self, main: TrainingLoader, text: TrainingLoader) -> None:
        self.main, self.text = main, text
        self._follow()

    def __len__(self) -> int:
        """Micro-batches of the epoch."""
        return len(self.main)

    def __iter__(self) -> Iterator[PairedBatch]:
        """Yield the batches after the last one, to the end of the epoch."""
        self._follow()
        for batch, text in zip(self.main, self.text, strict=True):
            yield {**batch, "text": text}

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless the position is in it."""
        self.main.set_epoch(epoch)
        self._follow()

    def _follow(self) -> None:
        self.text.position, self.text.end = self.main.position, self.main.end

    def start_of(self, epoch: int) -> int:
        """The position at which an epoch begins."""
        return self.main.start_of(epoch)

    def epoch_of(self, position: int) -> int:
        """The epoch of the micro-batch that follows a position."""
        return self.main.epoch_of(position)

    def length_of(self, epoch: int) -> int:
        """Micro-batches of an epoch."""
        return self.main.length_of(epoch)

    @property
    def epoch(self) -> int:
        """The epoch that is iterated over."""
        return self.main.epoch

    @property
    def position(self) -> int:
        """Micro-batches of the run up to the last that was handed out."""
        return self.main.position

    @position.setter
    def position(self, position: int) -> None:
        """Go to a position, in both loaders."""
        self.main.position = self.text.position = position

    @property
    def samples_per_micro_batch(self) -> int:
        """Samples of a micro-batch of the main loader, over all ranks."""
        return self.main.samples_per_micro_batch

    @property
    def window_length(self) -> int:
        """Micro-batches of a window, in all of its passes."""
        return self.main.window_length

    def window_of(self, batch: Batch) -> tuple[Window, int]:
        """Return the main loader's window of a batch, without text, and the batch's place there."""
        return self.main.window_of(batch)

    @property
    def plan(self) -> RolloutPlan:
        """The main loader's plan."""
        return self.main.plan

    @property
    def ends_window(self) -> bool:
        """Whether the last batch ended its window, in its last pass."""
        return self.main.ends_window

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of both loaders."""
        return {"main": self.main.state_dict(), "text": self.text.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped.

        Raises:
            ValueError: If the state is another loader's.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                "the checkpoint was written without a second stream of text; start anew from the "
                "exported student"
            )
        self.main.load_state_dict(state["main"])
        self.text.load_state_dict(state["text"])
        self._follow()


class PromptsAndText(Resumable, L.LightningDataModule):
    """Prompts for a method and, beside each micro-batch, blocks of plain text for its language model.

    Evaluation and prediction are those of ``prompts``.

    Args:
        prompts: What the method is about.
        text: Plain text, with the same ``batch_size``.

    Raises:
        ValueError: If the batch sizes differ, or text does not come in blocks of one length; in a
            run, if the tokenizers differ.
    """

    def __init__(self, prompts: DistillationData, text: PackedTextData) -> None:
        super().__init__()
        if not isinstance(text, PackedTextData):
            raise ValueError(
                f"text is a {type(text).__name__}; it must be PackedTextData, whose blocks are of "
                "one length: every micro-batch of a step then has its share of the text's mean"
            )
        if prompts.batch_size != text.batch_size:
            raise ValueError(
                f"prompts have batch_size {prompts.batch_size}, text has {text.batch_size}; they "
                "must be equal, so that every cut of a step has its share of both"
            )
        self.prompts, self.text = prompts, text

    @property
    def batch_size(self) -> int:
        """Rows of a micro-batch on one process."""
        return self.prompts.batch_size

    @batch_size.setter
    def batch_size(self, rows: int) -> None:
        """Set it for both."""
        self.prompts.batch_size = self.text.batch_size = rows

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the prompts."""
        return self.prompts.tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Read both, without a trainer too."""
        self.prompts.trainer = self.trainer
        self.prompts.setup(stage)
        if stage is None or TrainerFn(stage) is TrainerFn.FITTING:
            self.check_tokenizers()
            self.text.trainer = self.trainer
            self.text.read("train")

    def check_tokenizers(self) -> None:
        """Validate that both streams have the same tokens.

        Raises:
            ValueError: If they have not.
        """
        ours, theirs = self.prompts.tokenizer, self.text.tokenizer
        vocabularies = ours.get_vocab(), theirs.get_vocab()
        if vocabularies[0] != vocabularies[1]:
            differ = {token for token, _ in vocabularies[0].items() ^ vocabularies[1].items()}
            raise ValueError(
                f"the tokenizer of data.text ({_name(theirs)}) is another one than that of "
                f"data.prompts ({_name(ours)}): {len(differ):,} tokens have other ids, such as "
                f"{min(differ)!r}, and one model reads both streams. Give both the same tokenizer"
            )

    @property
    def rollout_plan(self) -> RolloutPlan | None:
        """The plan that the prompts follow."""
        return self.prompts.rollout_plan

    def follow_plan(self, plan: RolloutPlan, *, given_by: str) -> None:
        """Cut the prompts into the windows of a plan; text goes on beside them.

        Raises:
            ValueError: If another callback has given one.
        """
        self.prompts.follow_plan(plan, given_by=given_by)

    def column(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yield the values of a further column of the prompts, each with its place."""
        yield from self.prompts.column(name)

    def longest(self) -> dict[str, tuple[int, int]]:
        """Tokens of the longest row and of the longest prompt of each split, and of the text."""
        text = self.text.longest().get("train")
        return self.prompts.longest() | ({} if text is None else {"text": text})

    def longest_of_teacher(self) -> dict[str, tuple[int, int]]:
        """Tokens of the longest row and prompt of each split that its teacher reads in another form."""
        return self.prompts.longest_of_teacher()

    def cut_prompts(self) -> dict[str, str]:
        """Place of a row of each split whose prompt is cut for the student and not for its teacher."""
        return self.prompts.cut_prompts()

    def train_dataloader(self) -> PairedLoader:
        """Both streams in step."""
        return PairedLoader(self.prompts.train_dataloader(), self.text.stream())

    def val_dataloader(self) -> EvaluationLoader:
        """Every validation row once."""
        return self.prompts.val_dataloader()

    def test_dataloader(self) -> EvaluationLoader:
        """Every test row once."""
        return self.prompts.test_dataloader()

    def predict_dataloader(self) -> EvaluationLoader:
        """Every row to complete, once."""
        return self.prompts.predict_dataloader()


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
