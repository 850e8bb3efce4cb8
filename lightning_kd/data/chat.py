"""Data modules for chats."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import datasets
from transformers import PreTrainedTokenizerBase

from lightning_kd.batch import TEACHER_END, TEACHER_PROMPT
from lightning_kd.data.chat_encoding import encode_chat_prompts, encode_chats
from lightning_kd.data.conversations import (
    COLUMNS,
    MESSAGES,
    SHAREGPT,
    SYSTEM,
    TOOLS,
    Chat,
    TrainOn,
    read_chats,
    text_of_content,
)
from lightning_kd.data.datamodule import Split
from lightning_kd.data.encoding import Encoded
from lightning_kd.data.limits import LengthLimit, TruncationPolicy
from lightning_kd.data.objects import RowsLike
from lightning_kd.data.other_template import check_other_template, with_other_template
from lightning_kd.data.rows import Encode, EncodedRows
from lightning_kd.data.sources import WHERE, load_rows
from lightning_kd.data.teacher_prompts import OPTION, TeacherPrompts, check_teacher_length
from lightning_kd.data.template_variables import check_variables
from lightning_kd.data.text import TextData
from lightning_kd.data.workers import WORKER_TIMEOUT, Rows
from lightning_kd.option_checks import check_choice
from lightning_kd.tokenization import TokenizerLike

_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "chat_template"}


class ChatData(TextData):
    """Rows with a list of messages, rendered by the tokenizer's chat template.

    The last message, the assistant's, is the completion; all before it is the prompt, with what the
    template puts before an answer. Names of special tokens in a text are read as those tokens; what
    a completion has behind its first EOS is left out, counted and logged. The template is rendered
    within limits on time and memory (:class:`~lightning_kd.data.rendering.RenderLimits`).

    A message is ``{role, content}``, with whatever else the template reads (``tool_calls``,
    ``reasoning_content``), a content text or a list of ``{type: text, text}``. Without the column
    ``messages`` a row may have ``prompt`` and ``completion``, lists of messages, or
    ``conversations``, ShareGPT's ``{from, value}``. A column ``tools`` goes to the template.

    The other options are those of :class:`~lightning_kd.data.text.TextData`.

    Args:
        messages_column: Column with the messages.
        train_on: Answers of the assistant that are trained on: ``last``; ``all`` of a chat, in one
            row; ``each``, in a row of its own with all that was before it, as a model would give it;
            or ``none``, where only a model answers.
        chat_template_kwargs: Further variables of the template, such as ``{enable_thinking: false}``.
        teacher_tokenizer: Tokenizer of a teacher with other tokens (a directory or a hub name), whose
            chat template renders each prompt once more, with the same further variables; the token that
            ends a turn there is what the EOS of an answer stands for.
        eos_token: Token that ends an answer, in place of the tokenizer's EOS, where the template
            ends turns with another one, as Gemma's does with ``<end_of_turn>``.
        teacher_prompt_template: Text of the last message of the user as the teacher reads it:
            ``{prompt}`` is the message's own, ``{name}`` the column of that name, which tells more:
            ``"{prompt} Solution: {solution}"``. Not with ``train_on: all``.
        max_length: Longest prompt and completion together, in tokens.
        max_prompt_length: Longest prompt, in tokens.
        truncation: What happens to longer rows, as in :class:`PromptCompletionData`.
        max_teacher_length: Longest prompt of the teacher and completion together, in tokens; never
            cut. Defaults to ``max_length``.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        *,
        messages_column: str = MESSAGES,
        train_on: TrainOn = "last",
        chat_template_kwargs: dict[str, Any] | None = None,
        teacher_tokenizer: TokenizerLike | None = None,
        eos_token: str | None = None,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        truncation: TruncationPolicy = "error",
        teacher_prompt_template: str | list[str] | None = None,
        max_teacher_length: int | None = None,
        train: RowsLike | None = None,
        validation: RowsLike | None = None,
        test: RowsLike | None = None,
        predict: RowsLike | None = None,
        subset: str | None = None,
        extra_columns: list[str] | None = None,
        tokenizer: TokenizerLike,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        super().__init__(
            train=train,
            validation=validation,
            test=test,
            predict=predict,
            subset=subset,
            extra_columns=extra_columns,
            tokenizer=tokenizer,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            worker_timeout=worker_timeout,
        )
        check_choice("train_on", train_on, get_args(TrainOn))
        refused = sorted(_RESERVED & (chat_template_kwargs or {}).keys())
        if refused:
            raise ValueError(
                f"chat_template_kwargs has {refused[0]!r}, which is given to the template for each "
                "row; leave it out"
            )
        self.messages_column, self.train_on = messages_column, train_on
        self.chat_template_kwargs, self.eos_token = chat_template_kwargs or {}, eos_token
        if teacher_prompt_template is not None and train_on == "all":
            raise ValueError(
                f"train_on is all, which learns several answers of a row, and {OPTION} changes what "
                "stands before the last one alone; set data.train_on: each or last"
            )
        self.teacher_prompts = TeacherPrompts.of(teacher_prompt_template, "prompt", known=())
        self.limit = LengthLimit(max_length, max_prompt_length, truncation, max_teacher_length)
        check_teacher_length(self.limit, self.teacher_prompts)
        self.teacher_tokenizer = teacher_tokenizer
        check_other_template(teacher_tokenizer, self.extra_columns)
        self.roles: frozenset[str] = frozenset()
        """Who speaks in the splits that have been read."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with ``eos_token`` as its EOS.

        Raises:
            ValueError: If there is none, or it has no such token.
        """
        tokenizer = super().tokenizer
        if self.eos_token in {None, tokenizer.eos_token}:
            return tokenizer
        if self.eos_token not in tokenizer.get_vocab():
            raise ValueError(
                f"data.eos_token is {self.eos_token!r}, which is no token of the tokenizer; its EOS is "
                f"{tokenizer.eos_token!r}"
            )
        self._tokenizer = copy.deepcopy(tokenizer)  # one that was handed over stays as it is
        self._tokenizer.eos_token = self.eos_token
        return self._tokenizer

    def rows(self, split: Split) -> Rows | None:
        """Chats of a split."""
        path = self.paths[split]
        if path is None:
            return None
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; use one that has, or prompt columns"
            )
        check_variables(self.tokenizer, self.chat_template_kwargs)
        # Any type: a column that stands beside the messages may hold something else, as an id.
        others = [TOOLS, *(COLUMNS if self.messages_column == MESSAGES else ())]
        others += [SYSTEM] if self.messages_column in {MESSAGES, SHAREGPT} else []
        optional: dict[str, type] = {self.messages_column: object, **dict.fromkeys(others, object)}
        told = None if split == "predict" else self.teacher_prompts
        needed = set() if told is None else {*told.template.required}
        columns = [*self.extra_columns, *(() if told is None else told.columns)]
        extra: dict[str, type] = {
            name: str for name in columns if name in needed or name in self.extra_columns
        }
        optional |= {name: str for name in columns if name not in extra}
        raw = load_rows(
            path,
            extra,
            optional={name: kind for name, kind in optional.items() if name not in extra},
            split=split,
            subset=self.subset,
        )
        train_on = "none" if split == "predict" else self.train_on
        columns = list(dict.fromkeys(columns))
        chats = ChatRows(raw, self.messages_column, train_on, columns)
        encode: Encode = self._encode
        if told is not None:
            told.template.check_columns(raw, [*extra, "prompt"], split)
            encode = told.beside(encode, self._encode_teacher_prompts)
        other, kept = self.teacher_tokenizer, self.extra_columns
        rows = with_other_template(chats, CHAT, other, self.chat_template_kwargs)
        kept = kept if other is None else [*kept, TEACHER_PROMPT, TEACHER_END]
        encoded = EncodedRows(rows, encode, self.limit, kept)
        self.roles |= chats.roles
        return encoded

    def _encode(self, columns: Mapping[str, list[Any]]) -> list[Encoded]:
        return encode_chats(columns[CHAT], self.tokenizer, self.chat_template_kwargs)

    def _encode_teacher_prompts(self, columns: dict[str, list[Any]]) -> list[list[int]]:
        assert self.teacher_prompts is not None  # rows() asks for them where there are some
        places = [_asked(chat) for chat in columns[CHAT]]
        asked = [
            text_of_content(chat.messages[place].get("content"))
            for chat, place in zip(columns[CHAT], places, strict=True)
        ]
        chats = []
        told = self.teacher_prompts.texts(columns, asked)
        for chat, place, text in zip(columns[CHAT], places, told, strict=True):
            messages = list(chat.prompt)
            messages[place] = messages[place] | {"content": text}
            chats.append(replace(chat, messages=messages, trained=()))
        return encode_chat_prompts(chats, self.tokenizer, self.chat_template_kwargs)


def _asked(chat: Chat) -> int:
    """Return the number of the user's message that is answered."""
    places = [n for n, message in enumerate(chat.prompt) if message["role"] == "user"]
    if not places or chat.prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{chat.where}: {OPTION} changes the last message of the user before the answer, and there "
            "is none; leave the row out"
        )
    return places[-1]


CHAT = "__chat__"
"""Column of conversations, as they were read."""


class ChatRows:
    """Conversations of rows, of which each may hold several to train on.

    Args:
        raw: The rows.
        messages_column: Column with the messages.
        train_on: Answers that are trained on.
        extra: Columns that go along.
    """

    def __init__(
        self, raw: datasets.Dataset, messages_column: str, train_on: TrainOn, extra: list[str]
    ) -> None:
        self._raw, self._messages_column = raw, messages_column
        self._train_on, self._extra = train_on, extra
        self.roles: frozenset[str] = frozenset()
        """Who speaks in the rows that have been read."""

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Yield conversations, their places and the columns that go along."""
        for columns in self._raw.iter(batch_size):
            given = {n: column for n, column in columns.items() if n not in {WHERE, *self._extra}}
            found = list(read_chats(given, self._messages_column, columns[WHERE], self._train_on))
            self.roles |= {message["role"] for _, chat in found for message in chat.messages}
            yield {
                CHAT: [chat for _, chat in found],
                WHERE: [chat.where for _, chat in found],
                **{name: [columns[name][row] for row, _ in found] for name in self._extra},
            }
