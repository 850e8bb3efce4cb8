"""Linear relations between gradients of the same samples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kd.batch import IGNORE_INDEX
from lightning_kd.callbacks.audit.replay import Gradient

_SKETCH = 4096


def relative_difference(gradient: Gradient, reference: Gradient) -> float:
    """Return the norm of the difference over that of the reference, or over its own if that is 0."""
    distance = _norm([a.double() - b.double() for a, b in zip(gradient, reference, strict=True)])
    return 0.0 if distance == 0 else distance / (_norm(reference) or _norm(gradient))


def sketch(gradient: Gradient) -> Tensor:
    """Return a random linear projection of a gradient, by random signs: ``(4096,)``, float64.

    Every linear relation between gradients also holds between their sketches, and norms are kept to
    about a percent; a whole gradient for each sample would take too much memory.
    """
    total = torch.zeros(_SKETCH, dtype=torch.float64)
    for index, part in enumerate(gradient):
        flat = part.double().flatten()
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % _SKETCH)).view(-1, _SKETCH)
        generator = torch.Generator().manual_seed(index)
        signs = torch.randint(0, 2, (len(flat),), generator=generator).double() * 2 - 1
        # Small parameters would all be added to the first elements: each gets another offset.
        total += (signs.to(flat.device) @ flat).cpu().roll(997 * index)
    return total


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether two sketches are equal up to a relative tolerance."""
    return float((a - b).norm()) <= tolerance * max(float(a.norm()), float(b.norm()))


def ratio(a: Tensor, b: Tensor, tolerance: float) -> float | None:
    """Return the factor ``r`` of ``a = r b``; None if ``a`` is no multiple of ``b``."""
    if float(b.norm()) == 0 or float(a.norm()) == 0:
        return None
    factor = float(a @ b) / float(b @ b)
    return factor if close(a, factor * b, tolerance) else None


def combination_weights(target: Tensor, parts: Tensor, tolerance: float) -> Tensor | None:
    """Return weights ``(n,)`` with which the parts sum to the target; None if there are none."""
    if float(parts.norm()) == 0:
        return None if float(target.norm()) > 0 else torch.zeros(len(parts), dtype=torch.float64)
    fitted = torch.linalg.lstsq(parts.T, target[:, None], rcond=1e-9, driver="gelsd")
    weights = fitted.solution[:, 0]
    return weights if close(weights @ parts, target, tolerance) else None


def token_counts(samples: Sequence[Any]) -> list[tuple[str, list[float]]]:
    """Return the counts of each sample that a loss may be divided by, as far as batches hold them."""
    counts = []
    if all(isinstance(s, Mapping) and isinstance(s.get("labels"), Tensor) for s in samples):
        labels = [s["labels"] for s in samples]
        if all(label.ndim == 2 for label in labels):
            shifted = [float((label[:, 1:] != IGNORE_INDEX).sum()) for label in labels]
            counts.append(("scored", shifted))
        counts.append(("labels", [float((label != IGNORE_INDEX).sum()) for label in labels]))
    if all(isinstance(s, Mapping) and isinstance(s.get("attention_mask"), Tensor) for s in samples):
        attended = [float(s["attention_mask"].sum()) for s in samples]
        counts.append(("attended", attended))
        counts.append(("attended", [count - 1 for count in attended]))
    return counts


def _norm(gradient: Gradient) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
