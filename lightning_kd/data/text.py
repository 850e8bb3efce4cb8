"""Data modules for prompts and completions."""

from collections.abc import Sequence
from dataclasses import replace
from glob import has_magic
from pathlib import Path
from typing import Any

from lightning_kd.data.datamodule import DistillationData, Split
from lightning_kd.data.encoding import Encoded, encode_completions
from lightning_kd.data.generated import COMPLETION_IDS, ENDED, FINGERPRINT, PROMPT_IDS, given_ids
from lightning_kd.data.limits import LengthLimit, TruncationPolicy
from lightning_kd.data.objects import RowsLike, RowsSource, source_of
from lightning_kd.data.rows import Encode, EncodedRows
from lightning_kd.data.sources import TEXTS, WHERE, Kind, digests, load_rows, texts_of
from lightning_kd.data.teacher_prompts import TeacherPrompts, check_teacher_length
from lightning_kd.data.templates import PromptTemplate
from lightning_kd.data.workers import WORKER_TIMEOUT, Rows
from lightning_kd.tokenization import TokenizerLike, encode_prompts


class TextData(DistillationData):
    """Data modules that read text from files or a hub.

    The other options are those of :class:`~lightning_kd.data.DistillationData`.

    Args:
        train: A ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt`` file, a glob of files, a
            directory of ``datasets``, or a hub name; in Python also a ``datasets.Dataset``, or a list
            of dicts.
        validation: The same, for validation.
        test: The same, for ``test``.
        predict: The same, for ``predict``.
        subset: Configuration of a hub data set.
        extra_columns: Further columns of text that go along with each row: for reward functions, or
            to route rows to teachers.
    """

    may_change_on_resume = frozenset({"validation", "test", "predict"})

    def __init__(
        self,
        *,
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
            tokenizer=tokenizer,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            worker_timeout=worker_timeout,
        )
        self.paths: dict[Split, RowsSource | None] = {
            "train": source_of(train, "train"),
            "validation": source_of(validation, "validation"),
            "test": source_of(test, "test"),
            "predict": source_of(predict, "predict"),
        }
        self._digests: dict[Split, dict[str, str]] = {}
        self.subset = subset
        self.extra_columns = extra_columns or []

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments that a resumed run must not change; files by their contents."""
        settings, train = super().resume_settings(), self.paths["train"]
        rows = train is not None and not isinstance(train, str)
        if rows or (train and (has_magic(train) or Path(train).expanduser().exists())):
            del settings["train"]  # the loader compares a digest of each file, or of the rows
        return settings

    def files(self, split: Split) -> dict[str, str]:
        """Names and digests of the local files of a split, or a digest of its rows."""
        path = self.paths[split]
        if path is None:
            return {}
        if isinstance(path, str):
            return digests(path, split)
        if split not in self._digests:
            self._digests[split] = digests(path, split)
        return self._digests[split]


class PromptCompletionData(TextData):
    """Rows with a prompt and its completion; the loss is on the completion and its EOS.

    Prompt and completion are tokenized apart, so that what is trained on is what generation
    continues from. Names of special tokens in a text are read as those tokens; what a completion has
    behind its first EOS is left out, counted and logged.

    Rows that ``predict`` wrote (:class:`~lightning_kd.callbacks.JsonlPredictions`) are taken as they
    are: the columns ``prompt_ids`` and ``completion_ids`` instead of the texts, no template around
    the prompt again, and no EOS where the completion was cut at its longest.

    The other options are those of :class:`~lightning_kd.data.text.TextData`.

    Args:
        prompt_column: Column of the prompt.
        completion_column: Column of the completion, or of a list of them: the loss is on the first,
            and metrics of completions take the best of all. ``predict`` does without. None for
            prompts that only a model completes: nothing of the data itself is then trained on.
        references_column: Column of the texts, one or a list, that metrics of completions compare
            with in validation and test. Defaults to the completions.
        ended_column: Column that is true or false, where there is one: an EOS is appended to
            completions that ended, and to none that were cut. Without it all have ended. None
            leaves a column of this name alone.
        use_token_ids: Whether rows with the columns ``prompt_ids`` and ``completion_ids`` are
            trained on these. They must be of the same tokenizer, by ``tokenizer_fingerprint``; with
            another one, false tokenizes the texts.
        prompt_template: Text around the prompt, which takes the place of ``{prompt}``; ``{name}``
            is the column of that name. Of a list, the first whose columns all have text in the row,
            as ``["{instruction}: {input}", "{instruction}"]``. Other braces stand for themselves.
        teacher_prompt_template: What the teacher reads before the completion in place of the prompt,
            with columns that tell it more: ``"{question} Solution: {answer} Again: {question}"``.
        max_length: Longest prompt and completion together, in tokens.
        max_prompt_length: Longest prompt, in tokens.
        truncation: What happens to longer rows: ``error``, ``drop`` (the row), ``left`` (cut the
            beginning of the prompt) or ``right`` (cut the end of the completion). Counted and logged.
        max_teacher_length: Longest prompt of the teacher and completion together, in tokens; never
            cut. Defaults to ``max_length``.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        *,
        prompt_column: str = "prompt",
        completion_column: str | None = "completion",
        references_column: str | None = None,
        ended_column: str | None = ENDED,
        use_token_ids: bool = True,
        prompt_template: str | list[str] = "{prompt}",
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
        self.prompt_column, self.completion_column = prompt_column, completion_column
        self.references_column = references_column
        self.ended_column, self.use_token_ids = ended_column, use_token_ids
        templates = [prompt_template] if isinstance(prompt_template, str) else prompt_template
        self.template = PromptTemplate(tuple(templates), prompt_column)
        self.teacher_prompts = TeacherPrompts.of(
            teacher_prompt_template, prompt_column, known=self.template.columns
        )
        self.limit = LengthLimit(max_length, max_prompt_length, truncation, max_teacher_length)
        check_teacher_length(self.limit, self.teacher_prompts)

    def rows(self, split: Split) -> Rows | None:
        """Return prompts and completions of a split, or prompts alone."""
        path = self.paths[split]
        if path is None:
            return None
        completed = self.completion_column is not None and split != "predict"
        told = None if split == "predict" else self.teacher_prompts
        templates = [self.template] if told is None else [self.template, told.template]
        required: dict[str, Kind] = dict.fromkeys(
            [*(name for each in templates for name in each.required), *self.extra_columns], str
        )
        optional: dict[str, Kind] = {FINGERPRINT: str, self.prompt_column: str}
        optional |= dict.fromkeys([name for each in templates for name in each.columns], str)
        if self.use_token_ids:
            optional[PROMPT_IDS] = list
        if self.completion_column is not None and completed:
            required[self.completion_column] = self._kind(self.completion_column)
            optional |= {COMPLETION_IDS: list} if self.use_token_ids else {}
            optional |= {} if self.ended_column is None else {self.ended_column: bool}
        elif self.completion_column is not None:
            optional[self.completion_column] = self._kind(self.completion_column)
        if self.references_column is not None and split in {"validation", "test"}:
            required[self.references_column] = self._kind(self.references_column)
        raw = load_rows(
            path,
            required,
            optional={name: kind for name, kind in optional.items() if name not in required},
            split=split,
            subset=self.subset,
        )
        self.template.check_columns(raw, required, split)
        encode: Encode = self._encode if completed else self._encode_prompts
        if told is not None:
            told.template.check_columns(raw, required, split)
            encode = told.beside(encode, self._encode_teacher_prompts)
        return EncodedRows(raw, encode, self.limit, self.extra_columns)

    def _encode_teacher_prompts(self, columns: dict[str, list[Any]]) -> list[list[int]]:
        assert self.teacher_prompts is not None  # rows() asks for them where there are some
        texts = self.teacher_prompts.texts(columns, columns[self.prompt_column])
        return encode_prompts(texts, self.tokenizer)

    def _encode(self, columns: dict[str, list[Any]]) -> list[Encoded]:
        ended = columns.get(self.ended_column or "", [None] * len(columns[WHERE]))
        given = given_ids(columns, COMPLETION_IDS, self.tokenizer)
        prompts = self._encode_prompts(columns)
        completions = encode_completions(
            _unless([row.completion_text for row in prompts], given),
            self.tokenizer,
            [value != "false" for value in ended],
        )
        rows = []
        for number, (row, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids, after_eos = given[number], ""
            if ids is None:
                ids, after_eos = completion.ids, completion.after_eos
            if not ids:
                raise ValueError(
                    f"{columns[WHERE][number]}: the completion has no tokens and did not end, so "
                    "there is nothing to train on; leave the row out"
                )
            rows.append(replace(row, completion=ids, after_eos=after_eos, tokenized_apart=True))
        return rows

    def _encode_prompts(self, columns: dict[str, list[Any]]) -> list[Encoded]:
        # What predict wrote has the template in it already.
        texts = [
            columns[self.prompt_column][row] or ""
            if fingerprint
            else self.template.fill({name: columns[name][row] for name in self.template.columns})
            for row, fingerprint in enumerate(columns[FINGERPRINT])
        ]
        completions = self._texts(columns, self.completion_column)
        references = self._texts(columns, self.references_column)
        given = given_ids(columns, PROMPT_IDS, self.tokenizer)
        encoded = encode_prompts(_unless(texts, given), self.tokenizer)
        return [
            Encoded(
                encoded[row] if ids is None else ids,
                [],
                text,
                (completions[row] or [""])[0],
                references=_references(completions[row], references[row]),
                remarks=[SEVERAL] if len(completions[row]) > 1 else [],
            )
            for row, (ids, text) in enumerate(zip(given, texts, strict=True))
        ]

    def _kind(self, column: str) -> Kind:
        """Return the type of a column of texts: one text where it is also read as another column."""
        others = {self.prompt_column, *self.template.columns, *self.extra_columns}
        others |= set() if self.teacher_prompts is None else {*self.teacher_prompts.columns}
        return str if column in others else TEXTS

    def _texts(self, columns: dict[str, list[Any]], column: str | None) -> list[list[str]]:
        """Return the texts of each row in a column; none where there is no such column."""
        cells = columns.get(column or "", [None] * len(columns[WHERE]))
        return [texts_of(cell, self._kind(column or "")) for cell in cells]


SEVERAL = "have several completions, and the loss is on the first"


def _references(completions: list[str], references: list[str]) -> list[str] | None:
    """Return what a completion is compared with; None for the completion alone."""
    if references:
        return references
    return None if len(completions) == 1 else completions


def _unless(texts: Sequence[str], given: Sequence[list[int] | None]) -> list[str]:
    """Return the texts, without those that came with their tokens."""
    return [text if ids is None else "" for text, ids in zip(texts, given, strict=True)]
