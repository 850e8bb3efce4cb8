"""How long a row a model takes."""

from collections.abc import Mapping

from transformers import PreTrainedModel

_STRETCHING = {"linear", "dynamic", "yarn", "longrope"}
"""Scalings of rotary positions that say by which factor they lengthen the model's."""


def position_limit(model: PreTrainedModel) -> int | None:
    """Longest row that a model was made for, in tokens; None if its config sets no limit.

    That is ``max_position_embeddings``. Beyond it a table of positions (GPT-2) ends, and rotary
    positions are computed that the model has never seen; a scaling of them raises the limit.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return max(limit, *(_stretched(limit, scaling) for scaling in (parameters, *nested)))


def _stretched(limit: int, scaling: Mapping[str, object]) -> int:
    factor = scaling.get("factor")
    if scaling.get("rope_type") not in _STRETCHING or not isinstance(factor, int | float):
        return limit
    original = scaling.get("original_max_position_embeddings")
    return int(factor * (original if isinstance(original, int) else limit))


def allow_positions(model: PreTrainedModel, count: int, role: str) -> None:
    """Let a model with rotary positions take longer rows than it was trained on.

    Raises:
        ValueError: If its positions are not rotary, so that there are no more of them.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "rope_parameters"):
        raise ValueError(
            f"max_positions is {count}, but the {role} has no rotary positions: its "
            f"{position_limit(model)} positions are all there are"
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
        limit = position_limit(model)
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
