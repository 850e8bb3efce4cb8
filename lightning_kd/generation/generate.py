"""The one call that generates completions, with any engine."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.generation.checkpoint_config import say_what_is_ignored
from lightning_kd.generation.completions import Completions
from lightning_kd.generation.engine import (
    Engine,
    check_completions,
    check_engine,
)
from lightning_kd.generation.options import GenerationOptions
from lightning_kd.generation.prompts import Prompts, check_seeds
from lightning_kd.generation.sampler import CachedSampler
from lightning_kd.generation.transformers_engine import TransformersEngine
from lightning_kd.models.positions import check_length
from lightning_kd.tokenization import end_of_sequence_ids, padding_id


def engine_for(
    options: GenerationOptions,
    engine: Engine | None,
    *,
    mixture: bool = False,
    teacher: bool = False,
) -> Engine:
    """Return an engine that supports the options.

    Args:
        options: Length and sampling.
        engine: The one that was chosen. Defaults to :class:`TransformersEngine` for beam search and
            to :class:`CachedSampler` otherwise.
        mixture: Whether a mixture of two models is sampled from.
        teacher: Whether there is a teacher to generate with.

    Raises:
        ValueError: If the engine is none, or the options need what it does not have.
    """
    if engine is None:
        engine = TransformersEngine() if options.num_beams > 1 else CachedSampler()
    check_engine(engine, options, mixture=mixture, teacher=teacher)
    return engine


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    options: GenerationOptions,
    *,
    seeds: Sequence[int],
    engine: Engine | None = None,
    mixed_with: tuple[PreTrainedModel, float] | None = None,
    width: int | None = None,
) -> Completions:
    """Complete a batch of prompts; the global random state and the model's mode stay as they were.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Gives the EOS; those of the model's generation config end a completion too.
        prompt_ids: Prompts padded on the left, ``(B, P)``.
        prompt_mask: 1 on real tokens, ``(B, P)``.
        options: Length and sampling.
        seeds: One for each row.
        engine: What generates. Defaults to that of :func:`engine_for`.
        mixed_with: Another model and its share in the distribution that is sampled from; 0 for an
            engine that asks a teacher in another way.
        width: Tokens from here on are never generated: those that a teacher does not know.

    Raises:
        ValueError: If the engine does not support the options, a prompt is empty or not padded on the
            left, there is not one seed for each row, or prompts and completions could be longer than
            the models' positions.
    """
    share = 0.0 if mixed_with is None else mixed_with[1]
    beside = mixed_with is not None
    engine = engine_for(options, engine, mixture=share > 0, teacher=beside)
    models = [(model, 1 - share), *([] if mixed_with is None else [mixed_with])]
    longest = int(prompt_mask.sum(-1).max()) + options.max_new_tokens
    for each, _ in models:
        check_length({type(each).__name__: each}, longest, "prompts and max_new_tokens")
        say_what_is_ignored(each)
    check_seeds(seeds, len(prompt_ids))
    prompts = Prompts(
        prompt_ids,
        prompt_mask,
        eos_ids=frozenset(end_of_sequence_ids(model, tokenizer)),
        pad_id=padding_id(tokenizer),
        width=width,
    )
    completions = engine.generate(prompts, options, seeds=seeds, models=models)
    return check_completions(
        type(engine).__name__,
        completions,
        len(prompt_ids),
        options,
        eos_ids=prompts.eos_ids,
        width=width,
        log_probs=engine.gives_log_probs,
    )
