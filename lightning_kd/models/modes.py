"""Evaluation mode, or another forward pass, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Put models in evaluation mode for a while; afterwards every part is in its earlier mode.

    In evaluation mode there is no dropout, and gradient checkpointing, which would switch the cache
    off, stands still.
    """
    modes = [(part, part.training) for model in models for part in model.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def in_place_of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's forward pass while the context is open."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
