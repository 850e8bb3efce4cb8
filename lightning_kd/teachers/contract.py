"""The contract between methods and teachers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.batch import Batch, copy_of
from lightning_kd.fused import AnswerKind, TeacherAnswer, TopKAndToken
from lightning_kd.generation import Completions, Engine, GenerationOptions
from lightning_kd.models.context import context_length
from lightning_kd.models.logits_backend import LogitsBackend
from lightning_kd.models.model_spec import ModelSpec
from lightning_kd.models.vocabulary import VocabularyPolicy
from lightning_kd.resuming import Resumable
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teacher_rows import as_teacher_reads
from lightning_kd.teachers.text_coverage import TextCoverage
from lightning_kd.teachers.told_kinds import how_it_could

Ability = AnswerKind | Literal["generation", "mixture"]
"""A kind of answer; ``generation`` of completions; sampling from a ``mixture`` with the student."""


class TeacherUnavailableError(ValueError):
    """A teacher outside of this process does not answer, or answers something that is no answer."""


class Teacher(Resumable, TextCoverage, ABC):
    """Gives probabilities of next tokens, and never trains.

    A subclass lists in :attr:`answers` what it can do and writes :attr:`vocabulary_size` and
    :meth:`answer`; it may be a table in memory, a file or a server. One that generates completions
    lists ``generation`` and writes :meth:`generate`.

    A resumed run refuses a teacher with other constructor arguments. One that reads a file adds what it
    read to :meth:`~lightning_kd.resuming.Resumable.resume_settings`: another file is refused too.

    A teacher is no ``nn.Module``: a module that holds one does not register its weights, so they are
    in no checkpoint, optimizer or gradient bucket.

    Example:
        >>> from lightning_kd.fused import TopK
        >>> class LikesTwo(Teacher):
        ...     answers = frozenset({"top_k"})
        ...     vocabulary_size = 18
        ...     def answer(self, batch, positions, *, kind, logits_backend):
        ...         count = len(positions.targets)
        ...         tokens = torch.tensor([[2, 3]]).expand(count, 2)
        ...         log_probs = torch.tensor([[0.75, 0.125]]).log().expand(count, 2)
        ...         return TopK(tokens, log_probs)
        >>> choose_kind(LikesTwo(), ("full_distribution", "top_k"), "GKD")
        'top_k'
    """

    answers: frozenset[Ability]
    """Kinds of answers that it can give, and ``generation`` and ``mixture`` if it can do these."""

    temperatures: frozenset[float] | None = frozenset({1.0})
    """Temperatures at which it tells the tail of ``top_k`` and ``top_k_and_token``; None for any.

    ``full_distribution`` holds at any temperature, all other kinds at 1 alone.
    """

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Number of tokens that have probabilities, from id 0 on; read after :meth:`prepare`."""

    @abstractmethod
    def answer(
        self,
        batch: Batch,
        positions: ScoredPositions,
        *,
        kind: AnswerKind,
        logits_backend: LogitsBackend,
    ) -> TeacherAnswer:
        """Return what is known of the next token at the scored positions of a micro-batch.

        It depends on the arguments alone, never on earlier calls, which a resumed run does not repeat;
        and it stays as it is while later calls are answered, so no buffer is used twice.

        Args:
            batch: The rows.
            positions: The scored positions; ``positions.targets`` are the tokens that follow them.
            kind: One of :attr:`answers`; the same in a whole run.
            logits_backend: The method's, for teachers that run models.

        Returns:
            An answer of this kind, on the device of the batch, at each position in the order of
            ``positions``; it is a :class:`~lightning_kd.fused.FullDistribution`,
            :class:`~lightning_kd.fused.TopK`, :class:`~lightning_kd.fused.TopKAndToken`,
            :class:`~lightning_kd.fused.SampledTokens` or :class:`~lightning_kd.fused.TokenLogProbs`.
        """

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        policy: VocabularyPolicy,
        mesh: DeviceMesh | None = None,
        role: str = "teacher",
    ) -> None:
        """Make ready to answer, before the first step; called again for each run of a trainer.

        Args:
            tokenizer: The data's.
            device: Of the student, on this process.
            policy: What happens to a wider vocabulary.
            mesh: The processes that share weights; None if none do.
            role: Name in messages, and of the seed of weights that start at random.

        Raises:
            ValueError: If it cannot answer for this tokenizer or from this process.
        """

    def check_data(self, data: object) -> None:
        """Validate, before the first step, that rows can be answered; does nothing by default.

        Args:
            data: The run's data module; None if it has none.

        Raises:
            ValueError: If a row cannot.
        """

    @property
    def model_specs(self) -> Sequence[ModelSpec]:
        """Specs of the models that run in this process."""
        return ()

    @property
    def local_models(self) -> Mapping[str, PreTrainedModel]:
        """The models that run in this process, by role; empty until :meth:`prepare`."""
        return {}

    @property
    def longest_row(self) -> int | None:
        """Tokens of the longest row that it reads, once prepared; None where nothing limits them."""
        lengths = [context_length(model.config) for model in self.local_models.values()]
        return min((length for length in lengths if length is not None), default=None)

    @property
    def answers_collectively(self) -> bool:
        """Whether :meth:`answer` must be called on all processes at once, as with sharded weights."""
        return False

    def routes(self, batch: Batch) -> tuple[Sequence[str], Tensor] | None:
        """Return names of several teachers, and the number of each row's, ``(B,)``; None of one."""
        return None

    follows_student: bool = False
    """Whether its weights come from the student, so that its vocabulary is known when that is built."""
    has_own_tokens: bool = False
    """Whether it reads the text in tokens of its own, so that vocabularies are not compared."""

    is_remote: bool = False
    """Whether answers come from outside of this process: all processes of a run fail together then."""

    looks_ahead: bool = False
    """Whether :meth:`announce` is called where the next micro-batch is known."""

    def announce(self, batch: Batch, positions: ScoredPositions, *, kind: AnswerKind) -> None:
        """Hear of a micro-batch that will be asked about next, if the teacher :attr:`looks_ahead`.

        Args:
            batch: The rows, on any device.
            positions: The positions that will be scored.
            kind: Kind of the answer.
        """

    def forget(self) -> None:
        """Let go of what was announced: a run has ended, or failed."""

    def check_generation(self, engine: Engine | None = None) -> None:
        """Validate, before the first step, that completions can be generated from here.

        Args:
            engine: The engine that :meth:`generate` will be given.

        Raises:
            ValueError: If an option rules it out. That :attr:`answers` lists the ability is known.
        """

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        options: GenerationOptions,
        *,
        seeds: Sequence[int],
        engine: Engine | None = None,
        width: int | None = None,
    ) -> Completions:
        """Complete prompts; written by teachers that list ``generation``.

        Args:
            tokenizer: The data's; gives the EOS.
            prompt_ids: Prompts padded on the left, ``(B, P)``.
            prompt_mask: 1 on real tokens, ``(B, P)``.
            options: Length and sampling.
            seeds: One for each row.
            engine: Engine of the run, for teachers that run models. Defaults to that of
                :func:`~lightning_kd.generation.engine_for`.
            width: Tokens from here on are never generated: those that the student does not know.

        Returns:
            One completion for each prompt, in their order, on their device.
        """
        raise NotImplementedError

    def model_on(self, device: torch.device) -> AbstractContextManager[PreTrainedModel]:
        r"""Return a context that yields the model to mix into the student's distribution.

        Written by teachers that list ``mixture``: next tokens are then sampled from
        :math:`(1 - \alpha)\, q + \alpha\, p`.

        Args:
            device: Of the student; the model is there while the context is open.
        """
        raise NotImplementedError


def choose_kind(
    teacher: Teacher, needs: Sequence[AnswerKind], method: str, others: Sequence[type[Teacher]] = ()
) -> AnswerKind:
    """Return the first kind of answer that a method can use and a teacher can give.

    Args:
        teacher: The teacher.
        needs: Kinds that the method can use, the best first.
        method: Name of the method, for the message.
        others: Classes of teachers; the message names those that would do.

    Raises:
        ValueError: If there is none.
    """
    answers = getattr(teacher, "answers", None)
    if not isinstance(answers, frozenset):
        raise ValueError(
            f"{type(teacher).__name__} has the answers {answers!r}; give the class a frozenset of "
            'what it can do, such as answers = frozenset({"top_k"})'
        )
    for kind in needs:
        if kind in answers:
            return kind
    own, able = type(teacher).__name__, [o.__name__ for o in others if o.answers & set(needs)]
    hint = how_it_could(own, needs) if own in able else ""
    instead = "a method that needs less; one of your own says in its class what it can use (needs)"
    if teacher.has_own_tokens:
        instead = (
            "a method that compares chunks of text: ChunkLikelihoodKD (which takes the student's own "
            "completions as GKD does), OnPolicyDistillation or ULD"
        )
    raise ValueError(
        f"{method} needs a teacher that answers {' or '.join(needs)}; {own} answers "
        f"{', '.join(sorted(teacher.answers)) or 'nothing'}. Of this library's teachers, "
        f"{', '.join(able)} can{hint}; or choose {instead}"
    )


def checked_answer(
    teacher: Teacher,
    batch: Batch,
    positions: ScoredPositions,
    *,
    kind: AnswerKind,
    logits_backend: LogitsBackend,
) -> TeacherAnswer:
    """Return a teacher's answer, over all tokens that it knows.

    It is asked about the rows as it reads them: behind prompts of its own, where the batch has some.

    Raises:
        ValueError: If it is of another kind, or not about these positions.
    """
    batch, positions = as_teacher_reads(batch, positions)
    # A teacher may change its batch, to mask something for its own model.
    answer = teacher.answer(copy_of(batch), positions, kind=kind, logits_backend=logits_backend)
    if not isinstance(answer, TeacherAnswer):
        raise ValueError(
            f"{type(teacher).__name__} has answered with a {type(answer).__name__}; return a "
            "FullDistribution, TopK or TokenLogProbs"
        )
    if answer.kind != kind:
        raise ValueError(
            f"{type(teacher).__name__} was asked for {kind} and has answered {answer.kind}"
        )
    answer.check(len(positions.targets), teacher.vocabulary_size)
    if isinstance(answer, TopKAndToken):
        answer.check_targets(positions.targets, teacher.vocabulary_size)
    return answer
