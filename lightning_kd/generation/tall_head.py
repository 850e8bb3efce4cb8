"""The product of an output head with few rows, on a CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_kd.models.modes import in_place_of

LEAST_BYTES = 16 * 2**20
"""Size of a weight from which it pays; a smaller one stays in a processor's cache."""

MOST_ROWS = 32


@contextmanager
def tall_heads(*models: PreTrainedModel) -> Iterator[None]:
    r"""Let heads on a CPU multiply the other way round while models generate, without gradients.

    Few rows times a large weight, :math:`h W^\top`, takes several threads up to three times as long
    as :math:`(W h^\top)^\top`, which is the same number up to the order of the summands. So this is
    done for 2 to 32 rows, several threads, no autocast, and a plain float32 head of 16 MiB or more.

    Args:
        models: Whose heads; any other head stays as it is.
    """
    with ExitStack() as stack:
        for model in models:
            head = model.get_output_embeddings()
            if _pays(head):
                stack.enter_context(in_place_of(head, TallProduct(head)))
        yield


class TallProduct:
    """The forward pass of a linear layer, faster for few rows.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._buffer = layer.weight.new_empty(0)

    def __call__(self, states: Tensor) -> Tensor:
        """Return ``states W^T + b``: ``(..., H) -> (..., V)``."""
        weight, bias = self._layer.weight, self._layer.bias
        rows = states.reshape(-1, states.shape[-1])
        count, width = len(rows), len(weight)
        if not 2 <= count <= MOST_ROWS:
            return F.linear(states, weight, bias)
        # Kept, for a fresh one costs a page fault for each 4 KiB, at every token.
        if len(self._buffer) < count * width:
            self._buffer = rows.new_empty(count * width)
        product = torch.mm(weight, rows.t(), out=self._buffer[: count * width].view(width, count))
        logits = product.t().contiguous()
        if bias is not None:
            logits += bias
        return logits.view(*states.shape[:-1], width)


def _pays(head: object) -> bool:
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.device.type == "cpu"
        and head.weight.dtype == torch.float32
        and head.weight.nbytes >= LEAST_BYTES
        and torch.get_num_threads() > 1
        and not torch.is_autocast_enabled(
            "cpu"
        )  # which multiplies in fewer bits, whatever the rows
    )
