"""Limits of a model's positions."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from lightning_kd.models.context import context_length


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
