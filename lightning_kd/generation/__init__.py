"""Completions: writing them, and masking them where they end."""

from lightning_kd.generation.completions import Completions, completion_mask
from lightning_kd.generation.decoder import evaluating
from lightning_kd.generation.generate import generate
from lightning_kd.generation.options import GenerationOptions, SamplingOptions
from lightning_kd.generation.rollouts import Truncation, completion_texts, rollout_batch
from lightning_kd.generation.sampler import sample

__all__ = [
    "Completions",
    "GenerationOptions",
    "SamplingOptions",
    "Truncation",
    "completion_mask",
    "completion_texts",
    "evaluating",
    "generate",
    "rollout_batch",
    "sample",
]
