"""Where models take the positions of tokens from: what may stand in front of a row.

Most models of transformers are told positions, as ``position_ids``. The others count the columns of
their key-value cache, which are those of a row alone only where nothing stands in front of it, or they
have no positions but distances between columns. Numbers do not always show which: in bfloat16, a small
RoFormer that is not trained yet gives the same logits in the wrong place.
"""

import inspect
from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.models.adapters import virtual_tokens, without_adapters

_DISTANCES_OF_COLUMNS = {"bloom", "mpt"}
"""Types of model without ``position_ids`` whose keys know no position: attention is told distances."""

_DISTANCES_OF_KEYS = {"roformer"}
"""Those whose keys know the column that they were read in, and whose attention sees distances alone."""

_STATES_WITHOUT_PADDING = {"falcon_mamba", "mamba", "mamba2"}
"""Those with a state in the place of keys, which passes over padding."""

_COUNT_PADDING = {"recurrent_gemma", "reformer"}
"""Types of model with ``position_ids`` to which padding makes a difference nevertheless."""

_OTHER_WHEN_GENERATING = {
    *("cpmant", "prophetnet", "rwkv", "xlm"),
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Types of model that give other scores token by token, in transformers, than in a pass over all tokens
as in training; those of RoBERTa because they number tokens from their padding's id on."""


def accepted_arguments(model: PreTrainedModel) -> Collection[str]:
    """Return the names that a model's forward pass takes; of one with adapters, those of the model.

    Example:
        >>> from transformers import BloomConfig, BloomForCausalLM
        >>> model = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
        >>> "position_ids" in accepted_arguments(model)
        False
    """
    return inspect.signature(without_adapters(model).forward).parameters.keys()


def check_cache(model: PreTrainedModel) -> None:
    """Refuse a model that has no key-value cache to give and take, or has adapters with one.

    Raises:
        ValueError: If its forward pass takes none, adapters put tokens in front of each row, or it must
            not read token by token.
    """
    check_steps(model)
    check_virtual_tokens(model)
    if "past_key_values" not in accepted_arguments(model):
        raise no_cache(model)


def no_cache(model: PreTrainedModel) -> ValueError:
    """Return the error for a model without a key-value cache."""
    return ValueError(
        f"{type(model).__name__} keeps no key-value cache; choose engine: "
        "TransformersEngine for its completions"
    )


def check_steps(model: PreTrainedModel) -> None:
    """Refuse a model that does not generate by the scores that it has in a training step.

    Raises:
        ValueError: If it gives others token by token.
    """
    if without_adapters(model).config.model_type in _OTHER_WHEN_GENERATING:
        raise ValueError(
            f"{type(model).__name__} gives other scores when transformers has it read token by token, "
            "as it generates, than in a pass over all tokens, as it trains: its completions would be "
            "another model's. Take another model, or train on the data's completions alone"
        )


def check_virtual_tokens(model: PreTrainedModel) -> None:
    """Refuse adapters whose tokens an engine with a cache of its own would leave out.

    Raises:
        ValueError: If there are such, as of prefix tuning.
    """
    kind = virtual_tokens(model)
    if kind is not None:
        raise ValueError(
            f"{type(model).__name__} has adapters of type {kind}, which put tokens in front of each "
            "row, and this engine would complete its prompts without them; choose engine: "
            "TransformersEngine, or LoRA"
        )


def check_padding(model: PreTrainedModel) -> None:
    """Refuse padded prompts of a model that takes padding for tokens.

    Raises:
        ValueError: If it counts columns and tells a token's place from their number, or has a state in
            which padding counts.
    """
    if without_adapters(model).config.model_type in _COUNT_PADDING:
        raise ValueError(
            f"{type(model).__name__} reads padding as tokens, so that padded prompts would be "
            "completed otherwise than alone; give prompts of one length (of predict: data.batch_size "
            "1), or take another model"
        )
    kinds = _DISTANCES_OF_COLUMNS | _DISTANCES_OF_KEYS | _STATES_WITHOUT_PADDING
    if not _is_one_of(model, kinds):
        raise ValueError(
            f"{type(model).__name__} takes no position_ids: it counts the columns of the batch, and "
            "prompts that are padded would be completed as if they began later; give prompts of one "
            "length (of predict: data.batch_size 1), or take a model whose forward pass has "
            "position_ids"
        )


def check_padded_scores(model: PreTrainedModel, logits: Tensor) -> None:
    """Refuse a model in float64 whose attention takes softmax in float32: padding makes it NaN.

    Raises:
        ValueError: If scores of padded prompts are NaN.
    """
    if logits.dtype == torch.float64 and bool(logits.isnan().any()):
        raise ValueError(
            f"{type(model).__name__} is in float64 and gives NaN for prompts that are padded, as "
            "models of transformers do whose attention (attn_implementation: eager, or the only one "
            "they have) takes its softmax in float32; generate in float32, or prompts of one length at "
            "a time"
        )


def check_late_rows(model: PreTrainedModel) -> None:
    """Refuse a model whose rows cannot begin where others have ended.

    Raises:
        ValueError: If its keys know the column that they were read in.
    """
    if not _is_one_of(model, _DISTANCES_OF_COLUMNS):
        raise ValueError(
            f"{type(model).__name__} takes no position_ids: it counts the columns of its key-value "
            "cache, and with ContinuousBatchingSampler a row stands behind what others have left "
            "there; choose engine: CachedSampler"
        )


def _is_one_of(model: PreTrainedModel, kinds: Collection[str]) -> bool:
    """Return whether a model takes ``position_ids``, or is of a type that needs none."""
    return (
        "position_ids" in accepted_arguments(model)
        or without_adapters(model).config.model_type in kinds
    )
