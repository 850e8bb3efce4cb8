"""One run under four normalizations: ``python -m tests.benchmarks.normalization_figure OUT.png``.

The task: write a letter as often as a number says. Short answers are easy, long ones are hard to end,
so it matters how much a token of each weighs.
"""

import sys
import warnings
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure

from lightning_kd.batch import IGNORE_INDEX, Batch
from lightning_kd.callbacks import LossNormalizationDiagnostics
from lightning_kd.models import StudentSpec
from lightning_kd.modules import SFT
from lightning_kd.normalization import ConstantLength, Normalization
from tests.support.harness import BatchList, trainer
from tests.support.toys import tiny_llama

STEPS, ROWS, LONGEST = 200, 16, 12
EOS, FIRST_LETTER, FIRST_NUMBER, VOCABULARY = 1, 2, 10, 27
NORMALIZATIONS: dict[str, Normalization | str] = {
    "token": "token",
    "sequence": "sequence",
    "batch": "batch",
    "constant": ConstantLength(LONGEST + 1),
}


def task_batch(generator: torch.Generator) -> Batch:
    """Prompts of a letter and a number, completions of that many letters and the EOS."""
    ids = torch.zeros(ROWS, LONGEST + 3, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row in range(ROWS):
        letter = FIRST_LETTER + int(torch.randint(8, (), generator=generator))
        number = 1 + int(torch.randint(LONGEST, (), generator=generator))
        tokens = [letter, FIRST_NUMBER + number, *[letter] * number, EOS]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, 2 : len(tokens)] = ids[row, 2 : len(tokens)]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "row": torch.arange(ROWS),
    }


class Curve(Callback):
    """What was logged at each step."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.points.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def run(normalization: Normalization | str) -> list[dict[str, float]]:
    """The logs of a run, from the same start and over the same rows."""
    model = tiny_llama(0, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 / 8 if parameter.ndim > 1 else 1)
    generator = torch.Generator().manual_seed(0)
    module = SFT(
        student=StudentSpec.of(model),
        normalization=normalization,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    )
    curve = Curve()
    fit = trainer(
        max_steps=STEPS,
        gradient_clip_val=1.0,
        callbacks=[LossNormalizationDiagnostics(histograms_every=0), curve],
    )
    fit.fit(module, datamodule=BatchList([task_batch(generator) for _ in range(STEPS)]))
    return curve.points


def main() -> None:
    """Draw the picture."""
    warnings.simplefilter("ignore")
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {
        "train/loss": "the loss that is trained",
        "norm/loss_sequence": "the same runs, all by sequence",
        "train/grad_norm": "gradient norm before clipping",
    }
    for name, normalization in NORMALIZATIONS.items():
        points = run(normalization)
        for axis, tag in zip(axes, panels, strict=True):
            axis.plot([point[tag] for point in points], label=name, linewidth=1)
    for axis, title in zip(axes, panels.values(), strict=True):
        axis.set(title=title, xlabel="optimizer step", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
