"""Counts of optimizer steps before they are taken, for terms with a normalization of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.modules.distillation_module import DistillationModule
from lightning_kd.normalization import Normalization, divisor


def step_counts(
    module: DistillationModule, batches: Sequence[Batch], normalization: Normalization
) -> Tensor:
    """Counts of the optimizer steps that consecutive micro-batches make, ``(steps,)``, float64.

    Args:
        module: Of the fit; all ranks call it together.
        batches: This rank's micro-batches of one or several steps.
        normalization: Counts.
    """
    counts = [normalization.count(module.positions(batch).tokens_per_row) for batch in batches]
    steps = torch.stack(counts).reshape(-1, module.trainer.accumulate_grad_batches).sum(-1)
    return module.sum_over_ranks(steps)


def set_count_ratio(
    module: DistillationModule, batches: Sequence[Batch], own: Normalization
) -> None:
    """Give every row the ``count_ratio`` of its step, for a term with a normalization of its own.

    Args:
        module: Of the fit; all ranks call it together.
        batches: This rank's micro-batches of one or several steps; they are changed in place.
        own: The term's normalization.
    """
    of_module, of_term = (
        divisor(step_counts(module, batches, each)) for each in (module.normalization, own)
    )
    ratios = of_module / of_term
    for number, batch in enumerate(batches):
        ratio = ratios[number // module.trainer.accumulate_grad_batches]
        batch["count_ratio"] = ratio.expand(len(batch["row"]))
