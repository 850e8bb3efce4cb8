"""The products of linear layers with few rows, on a CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_kd.models.modes import in_place_of

LEAST_BYTES = 2**18
"""Size of a weight from which it pays to lay it out anew."""

_SIGNATURES = {
    "_reorder_linear_weight": "(Tensor self, int? batch_size=None) -> Tensor Y",
    "_linear_pointwise": "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm)"
    " -> Tensor Y",
}


@contextmanager
def packed_layers(*models: PreTrainedModel) -> Iterator[None]:
    """Let linear layers on a CPU multiply by a copy of their weights in oneDNN's layout for a while.

    Few rows times a large weight as it lies in memory takes up to six times as long. Laying it out
    anew takes as long as one to ten such products, and the memory of the weights once more while
    models generate. It is done for plain float32 layers of 256 KiB or more, the head among them,
    without autocast, where PyTorch has oneDNN; others stay as they are. The numbers are the same up
    to round-off. Within it, weights must not change and there are no gradients.

    Args:
        models: Whose layers.
    """
    with ExitStack() as stack:
        if _has_operators() and not torch.is_autocast_enabled("cpu"):
            for layer in (part for model in models for part in model.modules()):
                if _pays(layer):
                    stack.enter_context(in_place_of(layer, PackedProduct(layer)))
        yield


class PackedProduct:
    """The forward pass of a linear layer with the weights that it has now, without gradients.

    Args:
        layer: The layer, in float32 on a CPU.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self._bias = None if layer.bias is None else layer.bias.detach()

    def __call__(self, states: Tensor) -> Tensor:
        """Return ``states W^T + b``: ``(..., H) -> (..., V)``."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self._weight, self._bias, "none", [], ""
        )
        return product


def _pays(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        # A shard is a part of it, which has another shape.
        and layer.weight.shape == (layer.out_features, layer.in_features)
        and layer.weight.nbytes >= LEAST_BYTES
        # What has been put in the place of a layer's own pass stays there.
        and "forward" not in vars(layer)
    )


def _has_operators() -> bool:
    """Return whether this PyTorch has oneDNN, and its inductor's operators as they are known here."""
    return torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
        hasattr(torch.ops.mkldnn, name)
        and str(getattr(torch.ops.mkldnn, name).default._schema) == f"mkldnn::{name}{signature}"
        for name, signature in _SIGNATURES.items()
    )
