"""A Trainer around a module, for tests that look at one optimizer step."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_kd.batch import Batch, copy_of
from lightning_kd.data import DistillationData, Example
from lightning_kd.modules import DistillationModule
from tests.support.toys import letter_tokenizer


class Listed:
    """An iterable that Lightning takes for a loader; a list it would take for many."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning takes the last batch of an epoch without asking for one more.
        self.position %= max(1, len(self.batches))
        for batch in self.batches[self.position :]:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class BatchList(L.LightningDataModule):
    """Ready batches, with the letters' tokenizer."""

    def __init__(self, batches: Sequence[Batch], evaluate: Sequence[Batch] = ()) -> None:
        super().__init__()
        self.tokenizer = letter_tokenizer()
        # Of its own: some modules under test change what they are given.
        self.batches = [copy_of(batch) for batch in batches]
        self.evaluate = [copy_of(batch) for batch in evaluate]

    def train_dataloader(self) -> Listed:
        return Listed(self.batches)

    def val_dataloader(self) -> Listed:
        return Listed(self.evaluate)

    def test_dataloader(self) -> Listed:
        return Listed(self.evaluate)

    def predict_dataloader(self) -> Listed:
        return Listed(self.evaluate)


class Letters(DistillationData):
    """Ragged prompts and completions of letters, through the library's own loader.

    Args:
        rows: How many.
        told: Whether the teacher reads more before each prompt.
        base: Options of every data module.
    """

    def __init__(self, rows: int = 12, *, told: bool = False, **base: Any) -> None:
        super().__init__(tokenizer=letter_tokenizer(), **base)
        self.size, self.told = rows, told

    def rows(self, split: str) -> "Letters":
        return self

    def __len__(self) -> int:
        return self.size

    def example(self, row: int, pass_: int) -> Example:
        generator = torch.Generator().manual_seed(row)
        prompt, completion = (
            torch.randint(2, 18, (1 + (row * factor) % 5,), generator=generator).tolist()
            for factor in (3, 7)
        )
        text = letter_tokenizer().decode(completion)
        more = [2 + row % 16] * (1 + row % 3) if self.told else None
        return Example(
            [*prompt, *completion, 1],
            len(prompt),
            f"prompt {row}",
            text,
            teacher_prompt=None if more is None else [*more, *prompt],
        )


def trainer(**settings: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_epochs": 1,
    }
    return L.Trainer(**(defaults | settings))


class GradientProbe(Callback):
    """Keeps the gradient as the optimizer gets it."""

    gradient: torch.Tensor

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.gradient = torch.cat(
            [p.grad.flatten() for p in pl_module.student.parameters() if p.grad is not None]
        ).clone()


def fit_one_step(
    module: DistillationModule, micro_batches: Sequence[Batch], **settings: Any
) -> tuple[float, torch.Tensor]:
    """The logged loss and the gradient of one optimizer step over ``micro_batches``."""
    probe = GradientProbe()
    fit = trainer(
        accumulate_grad_batches=len(micro_batches), max_steps=1, callbacks=[probe], **settings
    )
    fit.fit(module, datamodule=BatchList(micro_batches))
    return fit.callback_metrics["train/loss"].item(), probe.gradient
