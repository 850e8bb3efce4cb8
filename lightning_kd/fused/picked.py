"""Some of the positions of a model's logits."""

from dataclasses import replace

from torch import Tensor

from lightning_kd.fused.lazy_logits import LazyHeadLogits, LazyLogits, MaterializedLogits


def picked(logits: LazyLogits, chosen: Tensor) -> LazyLogits:
    """Return a model's logits at some of their positions, with the gradients that they have.

    Args:
        logits: As a backend has read them from one model.
        chosen: True at the positions, ``(N,)``.

    Raises:
        ValueError: If they are those of several models.

    Example:
        >>> import torch
        >>> logits = MaterializedLogits(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> picked(logits, torch.tensor([False, True])).logits
        tensor([[3., 4.]])
    """
    match logits:
        case MaterializedLogits():
            return MaterializedLogits(logits.logits[chosen])
        case LazyHeadLogits():
            factors = tuple((states[chosen], weight) for states, weight in logits.factors)
            return replace(logits, factors=factors)
    raise ValueError(
        f"positions of {type(logits).__name__} cannot be picked; give logits that a backend has read "
        "from one model"
    )
