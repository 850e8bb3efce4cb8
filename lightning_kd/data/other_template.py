"""Prompts of chats as the template of a teacher with another tokenizer renders them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import TEACHER_END, TEACHER_PROMPT
from lightning_kd.data.conversations import Chat
from lightning_kd.data.rendering import render_chats
from lightning_kd.data.rows import RawRows
from lightning_kd.tokenization import TokenizerLike, tokenizer_of, tokens_of

log = logging.getLogger(__name__)

_QUESTION, _ANSWER = "What is two and two?", "Two and two is four."
_PROBE = "a question and its answer, by the template of data.teacher_tokenizer"


def check_other_template(tokenizer: TokenizerLike | None, extra_columns: Sequence[str]) -> None:
    """Refuse two sources of a teacher's prompts.

    Raises:
        ValueError: If there are two.
    """
    given = {TEACHER_PROMPT, TEACHER_END} & {*extra_columns}
    if tokenizer is not None and given:
        raise ValueError(
            f"extra_columns has {min(given)}, which the template of teacher_tokenizer renders; "
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
    """Conversations with their prompts, and the end of a turn, as another template renders them.

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
        self._end = end_of_turn(tokenizer, arguments)

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield the columns, that of the prompts, and that of the token that ends a turn."""
        for columns in self._chats.iter(batch_size):
            rendered = render_chats(columns[self._column], self._tokenizer, self._arguments)
            prompts = [chat.text[: chat.prompt] for chat in rendered]
            ends = [self._end or ""] * len(prompts)
            yield columns | {TEACHER_PROMPT: prompts, TEACHER_END: ends}


def end_of_turn(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str | None:
    """Return the special token with which a chat template ends an answer.

    It is the first one behind the answer of a conversation of two messages.

    Args:
        tokenizer: Has the template.
        arguments: Further variables of the template.

    Returns:
        Its name; None where the template ends answers without one, or does not render them.
    """
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        (chat,) = render_chats([Chat(messages, _PROBE, trained=(1,))], tokenizer, arguments)
    except ValueError as error:
        log.warning("%s. So the EOS of the student's answers is the teacher's EOS", error)
        return None
    (behind,) = tokens_of([chat.text.rpartition(_ANSWER)[2]], tokenizer)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((str(tokenizer.convert_ids_to_tokens(n)) for n in behind if n in special), None)
