"""Prompts of chats as the template of a teacher with another tokenizer renders them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import TEACHER_END, TEACHER_PROMPT
from lightning_kd.data.conversations import Chat
from lightning_kd.data.rendering import render_chats
from lightning_kd.data.rows import RawRows
from lightning_kd.tokenization import TokenizerLike, tokenizer_of, tokens_of

log = logging.getLogger(__name__)

# Words that templates leave as they are, and have not in texts of their own.
_QUESTION, _ANSWER, _NEXT = "seventeen", "nineteen", "fourteen"
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

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield the columns, that of the prompts, and that of the token that ends a turn."""
        end: str | None = None
        for number, columns in enumerate(self._chats.iter(batch_size)):
            chats = columns[self._column]
            rendered = render_chats(chats, self._tokenizer, self._arguments)
            if number == 0:
                end = end_of_turn(self._tokenizer, self._arguments, chats[0])
            prompts = [chat.text[: chat.prompt] for chat in rendered]
            ends = [end or ""] * len(prompts)
            yield columns | {TEACHER_PROMPT: prompts, TEACHER_END: ends}


def end_of_turn(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], like: Chat | None = None
) -> str | None:
    """Return the special token with which a chat template ends an answer.

    It is the first one between the answer of a conversation and what a next turn begins with: what
    comes in either case, whether the conversation ends with the answer or a question follows.

    Args:
        tokenizer: Has the template.
        arguments: Further variables of the template.
        like: A conversation of the data, whose system message and tools are given to a template that
            does not render a question and an answer alone.

    Returns:
        Its name; None where the template ends answers without one, or, which is logged as a warning,
        does not tell it.
    """
    tried = [Chat([], _PROBE)]
    if like is not None:
        context = takewhile(lambda m: m["role"] in {"system", "developer"}, like.messages)
        tried.append(Chat([*context], _PROBE, tools=like.tools))
    reason = ""
    for chat in tried if tried[-1] != tried[0] else tried[:1]:
        try:
            return _end_behind(chat, tokenizer, arguments)
        except ValueError as error:
            reason = str(error)
    log.warning("%s. So the EOS of the student's answers is the teacher's EOS", reason)
    return None


def _end_behind(
    context: Chat, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
) -> str | None:
    said = (("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT))
    messages = [*context.messages, *({"role": role, "content": text} for role, text in said)]
    ended = Chat(messages[:-1], _PROBE, trained=(len(messages) - 2,), tools=context.tools)
    goes_on = Chat(messages, _PROBE, tools=context.tools)
    short, long = (chat.text for chat in render_chats([ended, goes_on], tokenizer, arguments))
    opening, _, answered = short.partition(_QUESTION)
    _, unchanged, behind = answered.rpartition(_ANSWER)
    _, still_unchanged, between = long.rpartition(_NEXT)[0].rpartition(_ANSWER)
    if not (unchanged and still_unchanged):
        raise ValueError(
            f"{_PROBE}: the answer {_ANSWER!r} is not in what is rendered, so that it is not known "
            "what ends it"
        )
    said_first = context.messages[0].get("content") if context.messages else None
    if said_first and isinstance(said_first, str) and _begins_nothing(behind, tokenizer):
        # What ends that message may end the answer, and what begins every turn is before it.
        before, found, _ = opening.rpartition(said_first)
        opening = before if found else opening
    opens, at_end, before_next = (
        _special_names(text, tokenizer) for text in (opening, behind, between)
    )
    end = _common_start(at_end, before_next)
    if end == before_next:  # also what begins a question, as where answers to come are always begun
        begins = _common_start(before_next[::-1], opens[::-1])
        end = end[: len(end) - len(begins)]
    if at_end and not end and at_end[0] != tokenizer.eos_token:
        raise ValueError(
            f"{_PROBE}: the first special token behind an answer is {at_end[0]}, which is not seen to "
            "end it: it may begin a next turn, or is missing where one follows"
        )
    return end[0] if end else None


def _common_start(one: Sequence[str], other: Sequence[str]) -> list[str]:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [name for name, _ in pairs]


def _begins_nothing(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether there is nothing but special tokens in a text."""
    for name in _special_names(text, tokenizer):
        text = text.replace(name, "")
    return not text.strip()


def _special_names(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    (ids,) = tokens_of([text], tokenizer)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in ids if number in special]
