"""Data modules for prompts and completions, chats, and plain text."""

import json
from typing import Any

from lightning_kd.data.datamodule import DistillationData, Split
from lightning_kd.data.encoding import (
    Encoded,
    LengthLimit,
    TruncationPolicy,
    encode_chats,
    encode_completions,
    encode_prompts,
)
from lightning_kd.data.loader import Rows
from lightning_kd.data.rows import EncodedRows, PackedRows, pack
from lightning_kd.data.sources import WHERE, digests, load_rows
from lightning_kd.seeding import run_seed


class TextData(DistillationData):
    """Data modules that read text from files or a hub.

    Args:
        train: A ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt`` file, a glob of files, a
            directory of ``datasets``, or a hub name.
        validation: The same, for validation.
        test: The same, for ``test``.
        predict: The same, for ``predict``.
        subset: Configuration of a hub data set.
        extra_columns: Further columns of text that go along with each row: for reward functions, or
            to route rows to teachers.
        base: The options of :class:`~lightning_kd.data.DistillationData`.
    """

    def __init__(
        self,
        *,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        subset: str | None = None,
        extra_columns: list[str] | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.paths: dict[Split, str | None] = {
            "train": train,
            "validation": validation,
            "test": test,
            "predict": predict,
        }
        self.subset = subset
        self.extra_columns = extra_columns or []

    def files(self, split: Split) -> dict[str, str]:
        """Names and digests of the local files of a split."""
        path = self.paths[split]
        return {} if path is None else digests(path)


class PromptCompletionData(TextData):
    """Rows with a prompt and its completion; the loss is on the completion and its EOS.

    Prompt and completion are tokenized apart, so that what is trained on is what generation
    continues from.

    Args:
        prompt_column: Column of the prompt.
        completion_column: Column of the completion; ``predict`` does without. None for prompts that
            only a model completes: nothing of the data itself is then trained on.
        prompt_template: Text around the prompt, which takes the place of ``{prompt}``.
        max_length: Longest prompt and completion together, in tokens.
        max_prompt_length: Longest prompt, in tokens.
        truncation: What happens to longer rows: ``error``, ``drop`` (the row), ``left`` (cut the
            beginning of the prompt) or ``right`` (cut the end of the completion). Counted and logged.
        base: The options of :class:`TextData`.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        *,
        prompt_column: str = "prompt",
        completion_column: str | None = "completion",
        prompt_template: str = "{prompt}",
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        truncation: TruncationPolicy = "error",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if "{prompt}" not in prompt_template:
            raise ValueError(f"prompt_template {prompt_template!r} lacks the place of {{prompt}}")
        self.prompt_column, self.completion_column = prompt_column, completion_column
        self.prompt_template = prompt_template
        self.limit = LengthLimit(max_length, max_prompt_length, truncation)

    def rows(self, split: Split) -> Rows | None:
        """Prompts and completions of a split; where these are not asked for, prompts alone."""
        path = self.paths[split]
        if path is None:
            return None
        completed = self.completion_column is not None and split != "predict"
        columns = [self.prompt_column, *self.extra_columns]
        reference = [] if self.completion_column is None else [self.completion_column]
        raw = load_rows(
            path,
            dict.fromkeys([*columns, *reference] if completed else columns, str),
            optional=() if completed else tuple(reference),
            split=split,
            subset=self.subset,
        )
        encode = self._encode if completed else self._encode_prompts
        return EncodedRows(raw, encode, self.limit, self.extra_columns)

    def _encode(self, columns: dict[str, list[Any]]) -> list[Encoded]:
        completions = encode_completions(columns[self.completion_column or ""], self.tokenizer)
        return [
            (prompt, completion, prompt_text, text)
            for (prompt, _, prompt_text, text), completion in zip(
                self._encode_prompts(columns), completions, strict=True
            )
        ]

    def _encode_prompts(self, columns: dict[str, list[Any]]) -> list[Encoded]:
        # replace, not format: the text of a row is never a format string.
        texts = [
            self.prompt_template.replace("{prompt}", text) for text in columns[self.prompt_column]
        ]
        references = columns.get(self.completion_column or "") or [""] * len(texts)
        return [
            (prompt, [], text, reference or "")
            for prompt, text, reference in zip(
                encode_prompts(texts, self.tokenizer), texts, references, strict=True
            )
        ]


class ChatData(TextData):
    """Rows with a list of messages, rendered by the tokenizer's chat template.

    The last message, which must be the assistant's, is the completion; all before it is the prompt.

    Args:
        messages_column: Column with the messages: a list of ``{role, content}``.
        max_length: Longest prompt and completion together, in tokens.
        max_prompt_length: Longest prompt, in tokens.
        truncation: What happens to longer rows, as in :class:`PromptCompletionData`.
        base: The options of :class:`TextData`.

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
        **base: Any,
    ) -> None:
        super().__init__(**base)
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


class PackedTextData(TextData):
    """Plain text, joined and cut into blocks of equal length; every token is trained on.

    Args:
        block_length: Tokens of a block.
        text_column: Column of the text; a ``.txt`` file is one document.
        base: The options of :class:`TextData`.
    """

    def __init__(self, *, block_length: int = 128, text_column: str = "text", **base: Any) -> None:
        super().__init__(**base)
        self.block_length, self.text_column = block_length, text_column

    def rows(self, split: Split) -> Rows | None:
        """Blocks of a split; training blocks start elsewhere in each pass."""
        path = self.paths[split]
        if path is None:
            return None
        raw = load_rows(path, {self.text_column: str}, split=split, subset=self.subset)
        tokens = pack(raw, self.text_column, self.tokenizer)
        return PackedRows(tokens, self.block_length, run_seed() if split == "train" else None)
