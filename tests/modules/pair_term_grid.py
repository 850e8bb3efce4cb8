"""A method of a third party, with a term over pairs of tokens, in many cuts of a step.

It imports public names only. Run as a script, on two processes through real ddp:
``python pair_term_grid.py OUT``.
"""

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd import (
    Batch,
    DistillationData,
    LocalTeacher,
    Normalization,
    SequenceMean,
    StudentSpec,
    TeacherModule,
    make_divergence,
)
from lightning_kd.data import Example
from lightning_kd.fused import CrossEntropy, DivergenceTerm
from lightning_kd.modules import LossTerm, Scores
from lightning_kd.scoring import ScoredPositions
from tests.modules.partition_grid import Steps, without_float32_islands
from tests.support.harness import trainer
from tests.support.toys import letter_tokenizer, tiny_llama

WEIGHT = 0.3
CUTS = [(1, 1, 8), (1, 4, 2), (1, 8, 1), (2, 1, 4), (2, 4, 1)]


class SmoothKD(TeacherModule):
    """Forward KL, and the squared change of the log-likelihood from one label to the next."""

    terms = ("divergence", "roughness")

    @property
    def term_normalizations(self) -> Mapping[str, Normalization]:
        """The mean over rows of the mean over a row's pairs."""
        return {"roughness": SequenceMean()}

    def term_positions(self, name: str, batch: Batch) -> ScoredPositions:
        """Return the first position of each pair."""
        scored = self.positions(batch)
        return scored.subset(begins_pair(scored))

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return a term that the chunked pass evaluates, and one that is ready."""
        scored = scores.positions
        labels = [CrossEntropy(scored.targets)]
        (nll,) = self.logits_backend.per_token(scores.student, None, labels)
        changes = (nll[1:] - nll[:-1])[begins_pair(scored)[:-1]].square()
        pairs = self.term_positions("roughness", batch)
        return {
            "divergence": LossTerm(DivergenceTerm(make_divergence("forward_kl"))),
            "roughness": LossTerm(changes, WEIGHT, positions=pairs),
        }


def begins_pair(scored: ScoredPositions) -> Tensor:
    """Return True at each scored position whose right neighbour is scored too, ``(N,)``."""
    return (scored.mask & F.pad(scored.mask[:, 1:], (0, 1)))[scored.mask]


class RaggedLetters(DistillationData):
    """Rows of 1 to 5 labels: some have no pair."""

    def __init__(self, **base: Any) -> None:
        super().__init__(tokenizer=letter_tokenizer(), **base)

    def rows(self, split: str) -> "RaggedLetters":
        return self

    def __len__(self) -> int:
        return 12

    def example(self, row: int, pass_: int) -> Example:
        generator = torch.Generator().manual_seed(row)
        prompt, completion = 1 + row % 4, row * 7 % 5
        ids = torch.randint(2, 18, (prompt + completion,), generator=generator).tolist()
        return Example([*ids, 1], prompt, f"prompt {row}", "")


def module(method: type[TeacherModule] = SmoothKD, **options: Any) -> TeacherModule:
    """A method on fresh models in float64, each step with a plain gradient."""
    return method(
        student=StudentSpec.of(tiny_llama(0).double()),
        teacher=LocalTeacher.of(tiny_llama(1).double()),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        **options,
    )


def run(
    built: TeacherModule, cut: tuple[int, int, int], *callbacks: Any
) -> tuple[list[float], list[Tensor]]:
    """The losses and gradients of two optimizer steps of eight rows."""
    world, accumulate, batch_size = cut
    steps = LossesAndGradients()
    fit = trainer(
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=accumulate,
        precision="64-true",
        max_steps=2,
        max_epochs=-1,
        callbacks=[*callbacks, steps],
    )
    fit.fit(built, datamodule=RaggedLetters(batch_size=batch_size))
    return steps.losses, steps.gradients


class LossesAndGradients(Steps):
    """The losses too, before a logger rounds them."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        if trainer.global_step > self.before:
            self.losses.append(pl_module._step_sums.read().means["loss"])


def main() -> None:
    """The cuts over two processes; the first writes them down."""
    warnings.simplefilter("ignore")
    without_float32_islands()
    results = {cut: run(module(), cut) for cut in CUTS if cut[0] == 2}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        torch.save(results, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
