"""What completions that a server has written are held to."""

from collections.abc import Collection

from lightning_kd.generation import Completions, GenerationOptions, check_completions


def check_completions_of(
    source: str,
    completions: Completions,
    options: GenerationOptions,
    *,
    rows: int,
    end_ids: Collection[int] | None,
    width: int | None,
) -> None:
    """Validate completions, and that each of them ends or is as long as it may be.

    Args:
        source: Who has written them, for messages.
        completions: What came.
        options: Length and sampling.
        rows: Number of prompts.
        end_ids: Tokens that end a completion; None where they are not known.
        width: Tokens from here on must not be generated; None for no limit.

    Raises:
        ValueError: If they are not what was asked for.
    """
    check_completions(
        source,
        completions,
        rows,
        options,
        eos_ids=end_ids or (),
        other_ends=end_ids is None,
        width=width,
    )
    lengths = completions.mask.sum(-1)
    whole = completions.ended | (lengths == options.max_new_tokens)
    short = (lengths == 0) | ~whole
    if short.any():
        row = int(short.nonzero()[0, 0])
        raise ValueError(
            f"{source} returned {int(lengths[row])} tokens for row {row}, which do not end; a "
            f"completion ends, or has max_new_tokens, {options.max_new_tokens}"
        )
