"""Texts of a run, for teachers that know some texts and no others."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.trainer.states import TrainerFn

from lightning_kd.batch import Batch
from lightning_kd.collectives import refuse_together
from lightning_kd.modules.distillation_module import DistillationModule
from lightning_kd.resuming import describe
from lightning_kd.teacher_rows import as_teacher_reads
from lightning_kd.teachers import Teacher, UnreadableRowError


@runtime_checkable
class KnownTexts(Protocol):
    """A data module that can show its texts before the first step."""

    def texts(self, split: Any) -> Iterator[Batch]:
        """Yield every row of a split once; none if the split was not given."""
        ...

    def check_repeats(self, split: Any) -> None:
        """Refuse a split whose texts are other ones in each pass."""
        ...


def check_own_samples(module: DistillationModule, teacher: Teacher) -> None:
    """Validate that a teacher can be asked about what a model generates on the way.

    Raises:
        ValueError: If it cannot.
    """
    if not teacher.answers_any_text:
        raise ValueError(
            f"{type(module).__name__} asks its teacher about completions that are generated on the "
            f"way, and {type(teacher).__name__} knows only some texts: those that it was written for, "
            "or those that its tokenizer has letters for. Take a teacher that answers for any text, "
            "such as LocalTeacher, or learn from the data's "
            "completions: SupervisedKD, or GKD with on_policy: null"
        )


def check_rendered_for_none(data: object, reader: str) -> None:
    """Refuse data that renders prompts for a teacher with other tokens where there is none.

    Args:
        data: The data module.
        reader: Name of what reads the data's tokens.

    Raises:
        ValueError: If it does.
    """
    if getattr(data, "teacher_tokenizer", None) is not None:
        raise ValueError(
            "data.teacher_tokenizer renders prompts for a teacher with other tokens, and "
            f"{reader} reads those of the data; leave it out, or take a RetokenizingTeacher"
        )


def check_whole_prompts(data: Any, teacher: Teacher, splits: Sequence[str]) -> None:
    """Refuse prompts that are cut for the student, and that the teacher reads whole in another form.

    Args:
        data: The data module.
        teacher: Reads the prompts' texts, in tokens of its own or with more text in them.
        splits: What is trained on or evaluated.

    Raises:
        ValueError: If there is one in these splits.
    """
    if not hasattr(data, "cut_prompts"):
        return
    told = data.longest_of_teacher()
    for split, where in data.cut_prompts().items():
        if split in splits and (teacher.has_own_tokens or split in told):
            raise ValueError(
                f"{where}: data.truncation cuts the prompt for the student, and "
                f"{type(teacher).__name__} reads all of it in another form: set data.truncation: drop, "
                "or raise data.max_length or data.max_prompt_length"
            )


def check_texts(
    module: DistillationModule, teacher: Teacher, stage: str, *, rewritten: bool
) -> None:
    """Show the texts of a run to a teacher that looks at them.

    The data of a user's own data module shows its texts as they come.

    Args:
        module: The method.
        teacher: Its teacher.
        stage: Of the run.
        rewritten: Whether completions of the training rows may be generated, which are not known.

    Raises:
        ValueError: If the teacher cannot answer about one, on any process, it reads prompts whole that
            are cut for the student, or prompts are rendered for one that does not read them.
    """
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    if not teacher.has_own_tokens:
        check_rendered_for_none(data, type(teacher).__name__)
    splits = _splits(module, stage)
    check_whole_prompts(data, teacher, splits)
    if not teacher.looks_at_texts:
        return
    if stage == TrainerFn.FITTING and module.needs_own_samples:
        check_own_samples(module, teacher)
    teacher.check_precision(module.trainer.precision)
    left_out = {"train"} if teacher.answers_any_text and rewritten else set()
    check_splits(module, teacher, [split for split in splits if split not in left_out])


def check_splits(module: DistillationModule, teacher: Teacher, splits: Sequence[str]) -> None:
    """Show every row of some splits to a teacher that looks at texts.

    Args:
        module: The method.
        teacher: One that looks at texts.
        splits: Names of the splits.

    Raises:
        ValueError: If the teacher cannot answer about a row, on any process.
    """
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, KnownTexts):
        return
    said = None
    try:
        for split in splits:
            if not teacher.answers_any_text:
                data.check_repeats(split)
            texts = (
                as_teacher_reads(batch, module.positions(batch)) for batch in data.texts(split)
            )
            teacher.check_texts(texts, describe(data))
    except UnreadableRowError as error:
        place = getattr(data, "place_of", "{}[{}]".format)(split, error.row)
        said = f"data.{split}: {place}: {error}"
    except ValueError as error:
        said = f"data.{split}: {error}"
    refuse_together(said, module.trainer.strategy.root_device)


def _splits(module: DistillationModule, stage: str) -> list[str]:
    if stage != TrainerFn.FITTING:
        return ["validation" if stage == TrainerFn.VALIDATING else "test"]
    return ["train", "validation"] if module.trainer.limit_val_batches else ["train"]
