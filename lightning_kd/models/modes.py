"""Evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

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
