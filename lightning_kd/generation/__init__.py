"""Completions: engines that generate them, and masks of where they end."""

from lightning_kd.generation.completions import Completions, completion_mask
from lightning_kd.generation.continuous import ContinuousBatchingSampler
from lightning_kd.generation.decoder import evaluating
from lightning_kd.generation.engine import Engine, check_completions, check_log_probs
from lightning_kd.generation.generate import engine_for, generate
from lightning_kd.generation.options import GenerationOptions, SamplingOptions
from lightning_kd.generation.prompts import Prompts
from lightning_kd.generation.rollouts import Truncation, completion_texts, rollout_batch
from lightning_kd.generation.sampler import CachedSampler, sample
from lightning_kd.generation.speculative import SpeculativeSampler
from lightning_kd.generation.transformers_batching import TransformersContinuousBatching
from lightning_kd.generation.transformers_engine import TransformersEngine

__all__ = [
    "CachedSampler",
    "Completions",
    "ContinuousBatchingSampler",
    "Engine",
    "GenerationOptions",
    "Prompts",
    "SamplingOptions",
    "SpeculativeSampler",
    "TransformersContinuousBatching",
    "TransformersEngine",
    "Truncation",
    "check_completions",
    "check_log_probs",
    "completion_mask",
    "completion_texts",
    "engine_for",
    "evaluating",
    "generate",
    "rollout_batch",
    "sample",
]
