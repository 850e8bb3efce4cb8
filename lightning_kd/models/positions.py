"""Limits of a model's positions."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from lightning_kd.models.context import context_length
from lightning_kd.models.rotary import own_length


def allow_positions(model: PreTrainedModel, count: int, role: str) -> None:
    """Allow a model with rotary positions longer rows than it was trained on.

    Raises:
        ValueError: If its positions are not rotary, so that there are no more of them.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "rope_parameters"):
        raise ValueError(
            f"max_positions is {count}, but the {role} has no rotary positions: its "
            f"{context_length(model.config)} positions are all there are"
        )
    config.max_position_embeddings = count


def check_split(models: Mapping[str, PreTrainedModel], length: int, split: str) -> None:
    """Refuse a split's rows as :func:`check_length` does, and say what else their length does.

    Raises:
        ValueError: If they are longer than the positions of a model.
    """
    check_length(models, length, f"{split} rows")
    for role, model in models.items():
        own = own_length(model)
        if own is not None and length > own:
            rank_zero_warn(
                f"{split} rows take up to {length} tokens, and beyond {own} the {role}'s rotary "
                "embeddings follow the longest row of a micro-batch (dynamic NTK, longrope): loss and "
                "gradient depend on which rows are together. They do not with a batch_size of 1 or "
                f"rows of at most {own} tokens"
            )


def check_length(models: Mapping[str, PreTrainedModel], length: int, what: str) -> None:
    """Refuse rows that are longer than the positions of a model.

    Args:
        models: Those that read the rows, by role.
        length: Tokens of the longest row.
        what: The rows, for the message.

    Raises:
        ValueError: If they are longer.
    """
    for role, model in models.items():
        limit = context_length(model.config)
        if limit is not None and length > limit:
            way_out = (
                "; to go beyond what it was trained on, set max_positions of the model (or "
                "max_position_embeddings in a config that starts at random)"
                if hasattr(model.config.get_text_config(), "rope_parameters")
                else ""
            )
            raise ValueError(
                f"{what} take up to {length} tokens, but the {role} has {limit} positions "
                f"(max_position_embeddings). Shorten them with the data's max_length or "
                f"block_length, or with max_new_tokens{way_out}"
            )
