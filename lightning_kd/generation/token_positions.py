"""Where models take the positions of tokens from: what may stand in front of a row.

Most models of transformers are told positions, as ``position_ids``. The others count the columns of
their key-value cache, which are those of a row alone only where nothing stands in front of it, or they
have no positions but distances between columns. Numbers do not always show which: in bfloat16, a small
RoFormer that is not trained yet gives the same logits in the wrong place.
"""

import inspect
from collections.abc import Collection

from transformers import PreTrainedModel

from lightning_kd.models.adapters import without_adapters

_DISTANCES_OF_COLUMNS = {"bloom", "mpt"}
"""Types of model without ``position_ids`` whose keys know no position: attention is told distances."""

_DISTANCES_OF_KEYS = {"roformer"}
"""Those whose keys know the column that they were read in, and whose attention sees distances alone."""


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
    """Refuse a model that has no key-value cache to give and take.

    Raises:
        ValueError: If its forward pass takes none.
    """
    if "past_key_values" not in accepted_arguments(model):
        raise no_cache(model)


def no_cache(model: PreTrainedModel) -> ValueError:
    """Return the error for a model without a key-value cache."""
    return ValueError(
        f"{type(model).__name__} keeps no key-value cache; choose engine: "
        "TransformersEngine for its completions"
    )


def check_padding(model: PreTrainedModel) -> None:
    """Refuse padded prompts of a model that takes padding for tokens.

    Raises:
        ValueError: If it counts columns and tells a token's place from their number.
    """
    if not _is_one_of(model, _DISTANCES_OF_COLUMNS | _DISTANCES_OF_KEYS):
        raise ValueError(
            f"{type(model).__name__} takes no position_ids: it counts the columns of the batch, and "
            "prompts that are padded would be completed as if they began later; give prompts of one "
            "length (of predict: data.batch_size 1), or take a model whose forward pass has "
            "position_ids"
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
