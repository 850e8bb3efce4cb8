"""Data modules for chats."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_kd.data.datamodule import Split
from lightning_kd.data.encoding import Encoded, LengthLimit, TruncationPolicy, encode_chats
from lightning_kd.data.objects import RowsLike
from lightning_kd.data.rows import EncodedRows
from lightning_kd.data.sources import WHERE, load_rows
from lightning_kd.data.text import TextData
from lightning_kd.data.workers import WORKER_TIMEOUT, Rows


class ChatData(TextData):
    """Rows with a list of messages, rendered by the tokenizer's chat template.

    The last message, which must be the assistant's, is the completion; all before it is the prompt.
    Names of special tokens in a text are read as those tokens; what a completion has behind its
    first EOS is left out, counted and logged. The template is rendered within limits on time and
    memory (:class:`~lightning_kd.data.rendering.RenderLimits`).

    The other options are those of :class:`~lightning_kd.data.text.TextData`.

    Args:
        messages_column: Column with the messages: a list of ``{role, content}``.
        max_length: Longest prompt and completion together, in tokens.
        max_prompt_length: Longest prompt, in tokens.
        truncation: What happens to longer rows, as in :class:`PromptCompletionData`.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        *,
        messages_column: str = "messages",
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        truncation: TruncationPolicy = "error",
        train: RowsLike | None = None,
        validation: RowsLike | None = None,
        test: RowsLike | None = None,
        predict: RowsLike | None = None,
        subset: str | None = None,
        extra_columns: list[str] | None = None,
        tokenizer: str | PreTrainedTokenizerBase,
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
        self.messages_column = messages_column
        self.limit = LengthLimit(max_length, max_prompt_length, truncation)

    def rows(self, split: Split) -> Rows | None:
        """Chats of a split."""
        path = self.paths[split]
        if path is None:
            return None
        columns: dict[str, type] = {
            self.messages_column: list,
            **dict.fromkeys(self.extra_columns, str),
        }
        raw = load_rows(path, columns, split=split, subset=self.subset)

        def encode(columns: dict[str, list[Any]]) -> list[Encoded]:
            chats = [json.loads(text) for text in columns[self.messages_column]]
            return encode_chats(chats, self.tokenizer, columns[WHERE])

        return EncodedRows(raw, encode, self.limit, self.extra_columns)
