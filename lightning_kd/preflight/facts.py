"""Facts about a run before it starts, as plain data: what is judged, and what is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer.

    Attributes:
        name: Where it comes from.
        size: Ids that it gives, from 0 on.
        eos_id: Its EOS.
        special: Its special tokens with their ids, by role: ``eos_token``, ``pad_token``, ...
        has_template: Whether it has a chat template.
        other_ids: How it differs from the data's tokenizer; empty where it gives the same ids.
        other_template: How its chat template differs from the data's; empty where both render the
            same, where it has none, and where the data is no chats.
        other_start: How what it puts before a text, as a BOS, differs from what the data's puts there;
            empty where both put the same, and where the data is chats.
    """

    name: str
    size: int
    eos_id: int | None
    special: Mapping[str, tuple[str, int]]
    has_template: bool
    other_ids: str = ""
    other_template: str = ""
    other_start: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """A model, without its weights.

    Attributes:
        role: ``student``, ``teacher``, ``teacher 0``, ...
        name: Where it comes from.
        parameters: All of its weights.
        trainable: Those that train.
        rank: Rank of its LoRA; 0 without.
        width: Logits.
        context: Longest row; None if there is no limit.
        eos_ids: EOS of its generation config.
        starts_at_random: Whether there is nothing that it has learned.
        tokenizer: That which is saved beside it; None if there is none.
    """

    role: str
    name: str
    parameters: int
    trainable: int
    rank: int
    width: int
    context: int | None
    eos_ids: Sequence[int]
    starts_at_random: bool
    tokenizer: TokenizerFacts | None = None


@dataclass(frozen=True)
class Token:
    """A token of the example row."""

    text: str
    trained: bool


@dataclass(frozen=True)
class RowFacts:
    """The training rows, or those that were looked at.

    Attributes:
        looked_at: Rows that were looked at one by one.
        kept: Rows of a pass; None where the data does not tell.
        dropped: Rows that are too long and left out.
        cut: Rows that are too long and were cut.
        longest: Tokens of the longest row; where the data does not tell, of those that were looked at.
        longest_prompt: Tokens of the longest prompt, likewise.
        have_prompts: Whether rows are prompts and completions, rather than text.
        labeled: Rows that were looked at and have something to train on.
        ended: Those of them that are trained on an EOS.
        stopped: Those whose last label is a token that the student stops at, by its generation config.
        masked_ends: Those that have an EOS behind what is trained on, which is not trained on itself.
        completions: Tokens of the completions that were looked at; of a chat, of its last answer.
        most_labels: Most tokens of a row that are trained on.
        example: The tokens of a row.
        turn_end: The token that ends a turn of the chat template, and its id; None without template.
        told: End of what the teacher reads before the completion of the example row; empty where it
            reads the prompt.
    """

    looked_at: int
    kept: int | None
    dropped: int
    cut: int
    longest: int
    longest_prompt: int
    have_prompts: bool
    labeled: int
    ended: int
    masked_ends: int
    completions: Sequence[int]
    most_labels: int
    example: Sequence[Token]
    turn_end: tuple[str, int] | None = None
    stopped: int = 0
    told: str = ""


@dataclass(frozen=True)
class RolloutFacts:
    """Completions that are generated during training.

    Attributes:
        max_new_tokens: The longest.
        rows: Rows that a process generates together.
        trains_on_data: Whether completions of the data are trained on, too.
        by_student: Whether the student generates.
        by_teacher: Whether the teacher generates, or is mixed in.
    """

    max_new_tokens: int
    rows: int
    trains_on_data: bool
    by_student: bool
    by_teacher: bool

    @property
    def any(self) -> bool:
        """Whether anything is generated."""
        return self.by_student or self.by_teacher


@dataclass(frozen=True)
class MemoryPart:
    """Memory that one thing takes.

    Attributes:
        what: The thing.
        bytes: Its size, on one process.
        device: Where it is.
    """

    what: str
    bytes: int
    device: str


@dataclass(frozen=True)
class MemoryFacts:
    """Memory of a run, on the machine of this process.

    Attributes:
        parts: What takes memory.
        processes: Processes of the run that share the memory of a device.
        available: Free bytes of each device; None where they are not known.
        unknown: Things whose size is not known.
    """

    parts: Sequence[MemoryPart]
    processes: Mapping[str, int]
    available: Mapping[str, int | None]
    unknown: Sequence[str] = ()

    def needed(self, device: str) -> int:
        """Return what all processes take on a device."""
        own = sum(part.bytes for part in self.parts if part.device == device)
        return own * self.processes.get(device, 1)


@dataclass(frozen=True)
class Facts:
    """What is known of a run before it starts.

    Attributes:
        method: Class of the module.
        tokenizer: The data's.
        named: That which is named for the module beside the data's; None if there is none.
        policy: Vocabulary policy of a method with a teacher; empty without teacher.
        student: The student; None where it could not be built.
        teachers: Models of the teacher in this process.
        rows: The training rows; None where they could not be read.
        rollouts: Completions that are generated; None without.
        memory: Memory of models, optimizer, logits and cache; None where a model could not be built.
        refused: What ``fit`` would refuse: its messages.
        with_other_tokens: Models of a teacher that reads the text in tokens of its own: no token,
            template or length of theirs is compared with the data's.
    """

    method: str
    tokenizer: TokenizerFacts
    named: TokenizerFacts | None
    policy: str
    student: ModelFacts | None
    teachers: Sequence[ModelFacts]
    rows: RowFacts | None
    rollouts: RolloutFacts | None
    memory: MemoryFacts | None
    refused: Sequence[str] = ()
    with_other_tokens: Sequence[ModelFacts] = ()

    @property
    def models(self) -> Sequence[ModelFacts]:
        """The models that read the data's tokens, as far as they could be built."""
        return [*([] if self.student is None else [self.student]), *self.teachers]
