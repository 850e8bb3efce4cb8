"""A teacher with a tokenizer of its own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from lightning_kd.alignment import Retokenizer
from lightning_kd.batch import TEACHER_END, TEACHER_PROMPT, Batch
from lightning_kd.collectives import refuse_together
from lightning_kd.devices import to_device
from lightning_kd.fused import (
    AlignedAnswer,
    AnswerKind,
    ChunkLogProbs,
    ChunkStartDistributions,
    FullDistribution,
    token_log_probs_of,
)
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.models.vocabulary import VocabularyPolicy
from lightning_kd.resuming import Plain
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers.composite import CompositeTeacher
from lightning_kd.teachers.contract import Ability, Teacher, checked_answer, choose_kind
from lightning_kd.teachers.given import TeacherLike, as_teacher
from lightning_kd.teachers.itself import self_teachers
from lightning_kd.teachers.local import LocalTeacher
from lightning_kd.teachers.retokenized_data import (
    ChatLike,
    WithoutLengths,
    check_chats,
    check_end,
    cure_of_length,
)
from lightning_kd.teachers.retokenized_rows import (
    aligned_rows,
    check_longest,
    check_rows,
    chunk_numbers,
    own_batch,
)
from lightning_kd.teachers.routed import RoutedTeacher
from lightning_kd.tokenization import TokenizerLike, padding_id, tokenizer_of

_OF_TOKENS: tuple[AnswerKind, ...] = ("token_log_probs", "top_k_and_token", "full_distribution")
"""Kinds that tell how likely a given token is."""


class RetokenizingTeacher(CompositeTeacher):
    """A teacher that is asked about the text, in the tokens of its own tokenizer.

    What is scored of a row (its completion) becomes bytes by the tokens of the student, and tokens of
    the teacher by its tokenizer; special tokens are mapped by role or name. Before it the teacher reads
    the prompt as its own tokenizer begins a text: the data's text of it, or the column
    ``teacher_prompt``, which ``ChatData`` renders with the teacher's chat template; the EOS of an
    answer then stands for the token with which that template ends a turn. It answers how likely each
    of its tokens is, and which chunks of text end on both sides
    (:class:`~lightning_kd.fused.ChunkLogProbs`), or its distributions where a chunk begins.

    Args:
        teacher: The teacher, in its own tokens: one that answers ``full_distribution``,
            ``top_k_and_token`` or ``token_log_probs``, about any text.
        tokenizer: Its tokenizer: a directory or a hub name; in Python also a tokenizer. Defaults to
            that beside a teacher with a name.

    Raises:
        ValueError: If the teacher does not tell how likely a given token is, there is no tokenizer, or,
            in a run, the bytes of the tokens of one side are not known.

    Example:
        >>> sorted(RetokenizingTeacher(LocalTeacher("./teacher")).answers)
        ['chunk_log_probs', 'chunk_start_distributions']
    """

    answers: frozenset[Ability] = frozenset({"chunk_log_probs", "chunk_start_distributions"})
    has_own_tokens = True

    def __init__(self, teacher: TeacherLike, *, tokenizer: TokenizerLike | None = None) -> None:
        self.teacher = as_teacher(teacher, "the teacher of RetokenizingTeacher")
        self.check_members()
        if self_teachers(self.teacher):
            raise ValueError(
                f"{type(self.teacher).__name__} is the student, whose tokens are the data's; take it "
                "without RetokenizingTeacher"
            )
        self._kind = choose_kind(self.teacher, _OF_TOKENS, type(self).__name__)
        told: set[Ability] = {"chunk_log_probs"}
        if "full_distribution" in self.teacher.answers and not isinstance(
            self.teacher, RoutedTeacher
        ):
            told.add("chunk_start_distributions")
        self.answers = frozenset(told)
        if tokenizer is None and isinstance(self.teacher, LocalTeacher):
            tokenizer = self.teacher.name_or_path
        if tokenizer is None:
            raise ValueError(
                "RetokenizingTeacher needs the tokenizer of its teacher, and the "
                f"{type(self.teacher).__name__} has no directory or hub name: give tokenizer (a "
                "directory, a hub name, or a tokenizer)"
            )
        self._own: object = tokenizer
        self._retokenizer: Retokenizer | None = None
        self._cure = cure_of_length(None)
        self._read_by: PreTrainedTokenizerBase | None = None

    @property
    def named_members(self) -> Mapping[str, Teacher]:
        """The teacher."""
        return {"in its own tokens": self.teacher}

    @property
    def own_tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, loaded when first asked for.

        Raises:
            ValueError: If there is none.
        """
        self._own = tokenizer_of(self._own)
        return cast(PreTrainedTokenizerBase, self._own)

    @property
    def retokenizer(self) -> Retokenizer:
        """The way from the data's tokens to the teacher's, from :meth:`prepare` on."""
        assert self._retokenizer is not None, "prepare() comes first"
        return self._retokenizer

    @property
    def local_models(self) -> Mapping[str, Any]:
        """None: the teacher's models do not read the student's rows."""
        return {}

    @property
    def answers_any_text(self) -> bool:
        """Whether the teacher's tokenizer can write any bytes."""
        return self._retokenizer is None or self._retokenizer.reads_any_text

    @property
    def looks_at_texts(self) -> bool:
        """True: rows may be longer in the teacher's tokens, or have special ones that it lacks."""
        return True

    @property
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        """Those of the teacher's prompts and of its end of turn, and those that the teacher reads."""
        return super().columns | {TEACHER_PROMPT, TEACHER_END}

    def resume_settings(self) -> dict[str, Any]:
        """Return the arguments that must not change, with the tokenizer as it is."""
        return super().resume_settings() | {"tokenizer": self.own_tokenizer}

    def routes(self, batch: Batch) -> tuple[Sequence[str], Tensor] | None:
        """Return those of the teacher."""
        return self.teacher.routes(batch)

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
        role: str = "teacher",
    ) -> None:
        """Prepare the teacher for its own tokenizer, and the way from the data's to it.

        Raises:
            ValueError: If the teacher cannot be prepared, or answers only about texts that it has been
                written for, the bytes of the tokens of one side are not known, or a vocabulary is to
                be shared.
        """
        self.align_with(tokenizer, policy)
        self.teacher.prepare(self.own_tokenizer, device, "equal", mesh, role)

    def align_with(self, tokenizer: PreTrainedTokenizerBase, policy: VocabularyPolicy) -> None:
        """Make ready the way from the data's tokens to the teacher's, without its models.

        Raises:
            ValueError: As :meth:`prepare`.
        """
        if policy != "equal":
            raise ValueError(
                f"vocabulary is {policy}, which cuts student and teacher to the tokens that they "
                "share, and a RetokenizingTeacher shares none; leave it out"
            )
        if not self.teacher.answers_any_text:
            raise ValueError(
                f"{type(self.teacher).__name__} knows rows by the student's tokens, and is asked about "
                "the text in its own here; take a teacher that answers for any text, such as "
                "LocalTeacher or ServedTeacher"
            )
        padding_id(self.own_tokenizer)
        self._retokenizer = Retokenizer(tokenizer, self.own_tokenizer)
        self._read_by = tokenizer

    def check_data(self, data: object) -> None:
        """Refuse data whose rows are no prompt and completion, and chats without the teacher's prompts.

        Raises:
            ValueError: If they are, or end with another token than the run's tokenizer has as its EOS.
        """
        self._cure = cure_of_length(data)
        super().check_data(WithoutLengths(data))
        if hasattr(data, "block_length"):
            raise ValueError(
                f"the rows of {type(data).__name__} are parts of several documents, which the "
                "teacher's tokenizer would begin and end differently; use DocumentData"
            )
        if self._read_by is not None:
            check_end(data, self._read_by)
        if isinstance(data, ChatLike):
            check_chats(data, self.own_tokenizer)

    def check_texts(
        self, texts: Iterable[tuple[Batch, ScoredPositions]], encoding: Plain = None
    ) -> None:
        """Write the texts in the teacher's tokens of which it is not known that they can be read.

        Raises:
            UnreadableRowError: If one cannot be written, or is longer than the teacher reads.
        """
        for batch, positions in texts:
            check_rows(self.retokenizer, batch, positions, self.teacher.longest_row, self._cure)

    @torch.no_grad()
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind = "chunk_log_probs",
        logits_backend: LogitsBackend,
    ) -> AlignedAnswer:
        """Ask the teacher about the rows in its tokens.

        Raises:
            ValueError: On every process, if a row of one cannot be read, or is longer than the teacher
                reads.
        """
        device, said = batch["input_ids"].device, None
        try:
            rows = aligned_rows(self.retokenizer, batch, positions)
            shorter = "lower on_policy.generation.max_new_tokens, "
            cure = f"{shorter if 'completion_mask' in batch else ''}{self._cure}"
            check_longest(rows, self.teacher.longest_row, cure)
        except ValueError as error:
            said = str(error)
        refuse_together(said, device)
        scores_starts = kind == "chunk_start_distributions"
        own = own_batch(rows, batch, padding_id(self.own_tokenizer), starts_alone=scores_starts)
        own_positions = ScoredPositions.from_labels(own["labels"])
        told = checked_answer(
            self.teacher,
            own,
            own_positions,
            kind="full_distribution" if scores_starts else self._kind,
            logits_backend=logits_backend,
        )
        chunks, starts, ends, of_tokens, since = (
            to_device(torch.tensor(numbers, dtype=torch.long), device)
            for numbers in chunk_numbers(rows)
        )
        if scores_starts:
            assert isinstance(told, FullDistribution)  # checked_answer compares the kind
            return ChunkStartDistributions(chunks, starts, ends, told)
        log_probs = token_log_probs_of(told, own_positions.targets, self.vocabulary_size)
        return ChunkLogProbs(chunks, starts, ends, log_probs, of_tokens, since)
