"""Log-likelihoods of texts under the student, the work divided among the processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.data.collate import Collator
from lightning_kd.data.encoding import Example
from lightning_kd.fused import ChunkedPass, CrossEntropy, evaluate_no_grad
from lightning_kd.modules import DistillationModule
from lightning_kd.scoring import ScoredPositions
from lightning_kd.strategies import adapter_of
from lightning_kd.tokenization import padding_id


@torch.no_grad()
def log_likelihoods(
    module: DistillationModule, texts: Sequence[Sequence[int]], batch_size: int
) -> Tensor:
    """Return the log-likelihood of each text's tokens behind the first: ``(texts,)``, float64.

    Texts of one length are in one batch. All processes call it together, each with all texts, and get
    all results, on the CPU.

    Args:
        module: Has the student, in evaluation mode.
        texts: Tokens of each, two or more.
        batch_size: Texts of a batch.
    """
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    world, rank = module.trainer.world_size, module.trainer.global_rank
    scores = torch.zeros(len(texts), dtype=torch.float64)
    collate = Collator(padding_id(module.tokenizer))
    for first in range(0, len(batches), world):
        # Where batches run out, the last one is run again: models in shards are run by all together.
        numbers = batches[min(first + rank, len(batches) - 1)]
        batch = collate([(n, n, Example(list(texts[n]))) for n in numbers])
        found = _scored(module, batch)
        if first + rank < len(batches):
            scores[torch.tensor(numbers)] = found.cpu()
    return module.sum_over_ranks(scores.to(module.device)).cpu()


def _scored(module: DistillationModule, batch: Batch) -> Tensor:
    """Return the log-likelihood of each row, ``(B,)``."""
    moved: Batch = module.trainer.strategy.batch_to_device(batch, module.device)
    positions = ScoredPositions.from_labels(moved["labels"])
    with adapter_of(module.trainer).outside_of_steps():
        logits = module.logits_backend.read(module.student, moved, positions)
        nats = evaluate_no_grad(ChunkedPass(logits, None, [CrossEntropy(positions.targets)]))[0]
    rows = nats.new_zeros(len(positions.mask), dtype=torch.float64)
    return -rows.index_add(0, positions.rows, nats.double())
