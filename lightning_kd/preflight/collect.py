"""Checking of a run before it starts: facts are collected, and judged."""

from collections.abc import Iterator
from functools import partial

import lightning as L
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_kd.batch import Batch
from lightning_kd.data import DistillationData
from lightning_kd.models import ModelSpec, StudentSpec, vocabulary_size
from lightning_kd.models.context import context_length
from lightning_kd.models.skeleton import skeleton
from lightning_kd.modules import DistillationModule, TeacherModule
from lightning_kd.preflight.facts import Facts, ModelFacts, TokenizerFacts
from lightning_kd.preflight.findings import judge
from lightning_kd.preflight.memory import SizedModel, describe_memory
from lightning_kd.preflight.rehearsal import Rehearsal
from lightning_kd.preflight.report import Report
from lightning_kd.preflight.rows import (
    Data,
    batches,
    describe_rows,
    roles_of,
    texts_of,
    training_data,
)
from lightning_kd.preflight.setting import Setting
from lightning_kd.preflight.tokenizers import describe_tokenizer, saved_tokenizer
from lightning_kd.teachers import RetokenizingTeacher
from lightning_kd.tokenization import tokenizer_of

ROWS = 256
"""Rows that are looked at one by one."""


def check(
    module: L.LightningModule,
    datamodule: Data,
    trainer: L.Trainer | None = None,
    *,
    rows: int = ROWS,
) -> Report:
    """Check a run before it starts, without the memory of its models.

    The training rows are read and tokenized. Of the models only configurations are read: no weights
    are loaded, and nothing runs.

    Args:
        module: A method of this library.
        datamodule: Its data, or a loader of your own, whose first batches are looked at.
        trainer: What would train it, with its callbacks: device, precision, rollouts. Defaults to one
            process in float32.
        rows: Training rows that are looked at one by one.

    Returns:
        What is known, and the mismatches that would ruin the run.

    Raises:
        ValueError: If there is nothing to check: another kind of module, or no tokenizer.

    Example:
        >>> from lightning_kd import SFT, ArithmeticData, StudentSpec
        >>> config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}
        >>> report = check(SFT(student=StudentSpec(config=config)), ArithmeticData(train_size=8))
        >>> [finding.name for finding in report.findings], report.facts.rows.longest
        ([], 13)
    """
    if not isinstance(module, DistillationModule):
        raise ValueError(
            f"the module is a {type(module).__name__}; check a method of this library, or one that "
            "derives from DistillationModule"
        )
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be 1 or more")
    facts = collect(module, datamodule, trainer, rows=rows)
    return Report(facts, tuple(judge(facts)))


def collect(
    module: DistillationModule,
    datamodule: Data,
    trainer: L.Trainer | None,
    *,
    rows: int,
    iterate: bool = True,
) -> Facts:
    """Return the facts of a run.

    Args:
        module: The method.
        datamodule: Its data.
        trainer: What would train it.
        rows: Training rows that are looked at one by one.
        iterate: Whether the loader of another library's data module may be iterated over, and what
            ``fit`` checks before its first step is checked, too.
    """
    tokenizer, named = _tokenizers(module, datamodule)
    refused: list[str] = []
    some: list[Batch] = []
    if iterate or isinstance(training_data(datamodule), DistillationData):
        try:
            some = list(batches(datamodule, rows, tokenizer))
        except ValueError as error:
            refused.append(str(error))
    texts, roles = texts_of(some, tokenizer), roles_of(datamodule)
    framed = isinstance(training_data(datamodule), DistillationData) and not roles
    compared = partial(describe_tokenizer, data=tokenizer, texts=texts, roles=roles, framed=framed)
    retokenizes = isinstance(module, TeacherModule) and isinstance(
        module.teacher, RetokenizingTeacher
    )
    sized: list[SizedModel] = []
    described: list[ModelFacts] = []
    for role, spec in _specs(module):
        apart = retokenizes and role != "student"
        try:
            own_tokens = _teachers_tokenizer(module) if apart else tokenizer
            model, own = skeleton(spec, own_tokens, role), None
            if spec.name_or_path is not None and not apart:
                own = saved_tokenizer(spec.name_or_path)
        except ValueError as error:
            refused.append(str(error))
            continue
        held = spec.load(own_tokens, role).device.type if spec.is_given else ""
        sized.append(SizedModel(role, spec, model, held))
        about = None
        if own is not None:
            about = compared(own, str(spec.name_or_path))
        described.append(_describe(sized[-1], about))
    batch_size = getattr(datamodule, "batch_size", None) or len(some[0]["labels"] if some else [0])
    setting = Setting.of(trainer, batch_size)
    student = next((d for d in described if d.role == "student"), None)
    others_described = [d for d in described if d.role != "student"]
    stops = () if student is None else student.eos_ids
    about_rows = describe_rows(datamodule, some, tokenizer, stops) if some else None
    students = [each for each in sized if each.spec is module.student_spec]
    memory = None
    if students:
        others = [each for each in sized if each is not students[0]]
        try:
            memory = describe_memory(
                module, students[0], others, about_rows, setting, batch_size=batch_size
            )
        except ValueError as error:  # of the optimizer, or of what the teacher answers
            refused.append(str(error))
    if iterate and len(sized) == len(list(_specs(module))):
        rehearsal = Rehearsal(module, datamodule, trainer, tokenizer)
        rehearsal.run(sized, some)
        refused += [said for said in rehearsal.refused if said not in refused]
    return Facts(
        method=type(module).__name__,
        tokenizer=compared(tokenizer, _name(tokenizer)),
        named=None if named is None else compared(named, _name(named)),
        policy=module.vocabulary if isinstance(module, TeacherModule) else "",
        student=student,
        teachers=[] if retokenizes else others_described,
        rows=about_rows,
        rollouts=setting.rollouts,
        memory=memory,
        refused=refused,
        with_other_tokens=others_described if retokenizes else [],
    )


def _tokenizers(
    module: DistillationModule, datamodule: Data
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    """Return the data's tokenizer, and another one that was named for the module.

    Raises:
        ValueError: If there is neither.
    """
    of_data: PreTrainedTokenizerBase | None = getattr(datamodule, "tokenizer", None)
    if of_data is None:
        return module.tokenizer, None
    named = of_data if module.own_tokenizer is None else tokenizer_of(module.own_tokenizer)
    return of_data, None if named is of_data else named


def _specs(module: DistillationModule) -> Iterator[tuple[str, ModelSpec]]:
    """Yield the models that run in this process, with their roles."""
    yield "student", module.student_spec
    if isinstance(module, TeacherModule):
        for role, teacher in module.teachers.items():
            specs = teacher.model_specs
            for number, spec in enumerate(specs):
                yield role if len(specs) == 1 else f"{role} {number}", spec


def _teachers_tokenizer(module: DistillationModule) -> PreTrainedTokenizerBase:
    assert isinstance(module, TeacherModule)  # it has such a teacher
    assert isinstance(module.teacher, RetokenizingTeacher)
    return module.teacher.own_tokenizer


def _describe(sized: SizedModel, tokenizer: TokenizerFacts | None) -> ModelFacts:
    model, spec = sized.model, sized.spec
    weights = list(model.parameters())
    lora = spec.lora if isinstance(spec, StudentSpec) else None
    is_student = sized.role == "student"
    return ModelFacts(
        role=sized.role,
        name=spec.name_or_path or ("an object" if spec.is_given else "a configuration"),
        parameters=sum(weight.numel() for weight in weights),
        trainable=sum(w.numel() for w in weights if w.requires_grad) if is_student else 0,
        rank=0 if lora is None else lora.r,
        width=vocabulary_size(model),
        context=context_length(model.config),
        eos_ids=_eos_ids(model),
        starts_at_random=spec.name_or_path is None and not spec.is_given,
        tokenizer=tokenizer,
    )


def _eos_ids(model: PreTrainedModel) -> list[int]:
    config = model.generation_config
    given = None if config is None else config.eos_token_id
    return (
        [] if given is None else [int(i) for i in (given if isinstance(given, list) else [given])]
    )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
