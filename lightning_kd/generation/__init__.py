"""Completions: writing them, and masking them where they end."""

from lightning_kd.generation.completions import Completions, completion_mask
from lightning_kd.generation.hf import GenerationOptions, end_of_sequence_ids, generate

__all__ = [
    "Completions",
    "GenerationOptions",
    "completion_mask",
    "end_of_sequence_ids",
    "generate",
]
