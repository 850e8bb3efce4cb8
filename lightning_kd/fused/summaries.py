"""Short answers made of full distributions, a chunk of positions at a time."""

from collections.abc import Iterator, Sequence
from math import log

import torch
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.fused.answers import FullDistribution
from lightning_kd.fused.chunked_pass import CHUNK_BYTES
from lightning_kd.fused.sparse_answers import TopKAndToken
from lightning_kd.fused.teacher_rows import DistributionRows


def top_k_of(
    answer: FullDistribution,
    targets: Tensor,
    k: int,
    *,
    temperatures: Sequence[float] = (1.0,),
) -> TopKAndToken:
    """Return the k most likely tokens of a distribution, and what the rest and the label have.

    Args:
        answer: The distribution.
        targets: The token that follows each position, ``(N,)``; ``IGNORE_INDEX`` where there is none.
        k: Tokens at each position.
        temperatures: Those at which the tail's probability is told.

    Raises:
        ValueError: If the vocabulary has fewer tokens than k.

    Example:
        >>> from lightning_kd.fused import MaterializedLogits
        >>> logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
        >>> answer = FullDistribution((MaterializedLogits(logits),))
        >>> short = top_k_of(answer, torch.tensor([3]), 2)
        >>> short.token_ids, short.log_probs.exp(), short.tail_log_probs[1.0].exp()
        (tensor([[1, 2]]), tensor([[0.5000, 0.2500]]), tensor([0.2500]))
        >>> short.label_log_probs.exp()
        tensor([0.1250])
    """
    width = answer.logits[0].shape[1]
    if not 1 <= k <= width:
        raise ValueError(f"k is {k}; the teacher knows {width} tokens, so give 1 to {width}")
    ids, values, labels = [], [], []
    tails: dict[float, list[Tensor]] = {t: [] for t in temperatures if k < width}
    for rows, distribution in distributions_of(answer):
        log_probs = distribution.log_probs(1.0)
        best = log_probs.topk(k, -1)
        ids.append(best.indices)
        values.append(best.values)
        known = targets[rows] != IGNORE_INDEX
        own = log_probs.gather(-1, targets[rows].where(known, 0)[:, None])[:, 0]
        labels.append(own.masked_fill(~known, 0.0))
        for temperature, parts in tails.items():
            tempered = distribution.log_probs(temperature)
            tail = tempered.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
            parts.append(tail.clamp_min(log(torch.finfo(tail.dtype).tiny)))
    return TopKAndToken(
        torch.cat(ids),
        torch.cat(values),
        {temperature: torch.cat(parts) for temperature, parts in tails.items()},
        label_log_probs=torch.cat(labels),
    )


def distributions_of(answer: FullDistribution) -> Iterator[tuple[slice, DistributionRows]]:
    """Yield the distributions of all positions, a chunk at a time; at least one chunk.

    Args:
        answer: A full distribution.
    """
    count, width = answer.logits[0].shape
    size = max(1, CHUNK_BYTES // (width * 4 * (1 + len(answer.logits))))
    for start in range(0, max(1, count), size):
        rows = slice(start, min(start + size, count))
        yield rows, answer.computed(rows)
