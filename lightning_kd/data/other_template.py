"""Prompts of chats as the template of a teacher with another tokenizer renders them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import TEACHER_PROMPT
from lightning_kd.data.rendering import render_chats
from lightning_kd.data.rows import RawRows
from lightning_kd.tokenization import TokenizerLike, tokenizer_of


def check_other_template(tokenizer: TokenizerLike | None, extra_columns: Sequence[str]) -> None:
    """Refuse two sources of a teacher's prompts.

    Raises:
        ValueError: If there are two.
    """
    if tokenizer is not None and TEACHER_PROMPT in extra_columns:
        raise ValueError(
            f"extra_columns has {TEACHER_PROMPT}, which the template of teacher_tokenizer renders; "
            "give one of the two"
        )


def with_other_template(
    chats: RawRows, column: str, given: TokenizerLike | None, arguments: Mapping[str, Any]
) -> RawRows:
    """Return conversations with the prompts that another tokenizer's template renders beside them.

    Args:
        chats: The conversations.
        column: Where they are.
        given: The tokenizer; None for none, which leaves them as they are.
        arguments: Further variables of the template.

    Raises:
        ValueError: If the tokenizer has no template.
    """
    if given is None:
        return chats
    tokenizer = tokenizer_of(given)
    if not tokenizer.chat_template:
        raise ValueError(
            "data.teacher_tokenizer has no chat template to render prompts with; give the prompts as "
            f"the teacher reads them in a column {TEACHER_PROMPT} of data.extra_columns"
        )
    return OtherTemplate(chats, column, tokenizer, arguments)


class OtherTemplate:
    """Conversations with their prompts as another tokenizer's template renders them.

    Args:
        chats: The conversations.
        column: Where they are.
        tokenizer: Has the template.
        arguments: Further variables of the template.
    """

    def __init__(
        self,
        chats: RawRows,
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any],
    ) -> None:
        self._chats, self._column = chats, column
        self._tokenizer, self._arguments = tokenizer, arguments

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield the columns, and that of the prompts."""
        for columns in self._chats.iter(batch_size):
            rendered = render_chats(columns[self._column], self._tokenizer, self._arguments)
            prompts = [chat.text[: chat.prompt] for chat in rendered]
            yield columns | {TEACHER_PROMPT: prompts}
