"""Generation of the completions of a window."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.batch import Batch, PromptBatch, require_prompts
from lightning_kd.data import PairedLoader, TrainingLoader
from lightning_kd.generation import (
    Completions,
    Engine,
    GenerationOptions,
    check_log_probs,
    generate,
)
from lightning_kd.models.positions import check_length
from lightning_kd.modules import DistillationModule, PolicyGradientModule, TeacherModule
from lightning_kd.modules.student_module import longest_rows
from lightning_kd.seeding import derive_seed, run_seed
from lightning_kd.teachers import TEACHERS, Ability, Teacher, check_ability
from lightning_kd.tokenization import padding_id


def complete(
    module: DistillationModule,
    batches: Sequence[PromptBatch],
    options: GenerationOptions,
    *,
    engine: Engine,
    on_policy: bool,
    mixture_alpha: float,
    rows_at_once: int | None,
) -> Completions:
    """Generate completions of the rows of all batches, each row seeded by its sample.

    Args:
        module: Module whose student or teacher generates.
        batches: Micro-batches with prompts.
        options: How completions are sampled.
        engine: What generates.
        on_policy: Whether the student generates, rather than the teacher.
        mixture_alpha: Share of the teacher in the distribution that the student samples from.
        rows_at_once: Largest number of rows that are generated together.
    """
    pad_id = padding_id(module.tokenizer)
    prompts = _joined([batch["prompt_ids"] for batch in batches], pad_id)
    masks = _joined([batch["prompt_mask"] for batch in batches], 0)
    samples = torch.cat([batch["sample"] for batch in batches]).tolist()
    seeds = [derive_seed(run_seed(), "rollout", sample) for sample in samples]
    shared: dict[str, Any] = {
        "engine": engine,
        "width": module.width if isinstance(module, TeacherModule) else None,
    }
    with ExitStack() as stack:
        source: Callable[..., Completions]
        if on_policy:
            source = partial(generate, module.student, **shared)
            if mixture_alpha > 0:
                teacher = teacher_with("mixture", module)
                model = stack.enter_context(teacher.model_on(prompts.device))
                source = partial(source, mixed_with=(model, mixture_alpha))
        else:
            source = partial(teacher_with("generation", module).generate, **shared)
        size = rows_at_once or len(samples)
        slices = [slice(start, start + size) for start in range(0, len(samples), size)]
        parts = [
            source(module.tokenizer, prompts[part], masks[part], options, seeds=seeds[part])
            for part in slices
        ]
    generated = Completions.join(parts, pad_id)
    if len(generated.ids) != len(samples):
        raise ValueError(
            f"{len(generated.ids)} completions came for {len(samples)} prompts; the teacher's generate "
            "must return one for each, in their order"
        )
    return generated


def teacher_with(ability: Ability, module: L.LightningModule) -> Teacher:
    """Return the teacher of a module, which must be able to generate or to be mixed in.

    Raises:
        ValueError: If there is no such teacher.
    """
    option = "mixture_alpha above 0" if ability == "mixture" else "off_policy: teacher"
    teacher = check_ability(
        getattr(module, "teacher", None),
        ability,
        f"{type(module).__name__} with {option}",
        TEACHERS,
    )
    teacher.check_generation(mixture=ability == "mixture")
    return teacher


def check_teacher(module: L.LightningModule, mixture_alpha: float, generates: bool) -> None:
    """Validate that the teacher can do what it is needed for.

    Raises:
        ValueError: If it cannot.
    """
    if mixture_alpha > 0:
        teacher_with("mixture", module)
    if generates:
        teacher_with("generation", module)


def loader_of(trainer: L.Trainer) -> TrainingLoader | PairedLoader:
    """Return the training loader.

    Raises:
        ValueError: If it is not of a data module of this library.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, TrainingLoader | PairedLoader):
        raise ValueError(
            f"OnPolicyGeneration needs the loader of a data module of this library, not a "
            f"{type(loader).__name__}; derive yours from DistillationData"
        )
    return loader


def check_method(module: DistillationModule, engine: Engine) -> None:
    """Validate that a method uses completions, and that the engine gives what the method needs.

    Raises:
        ValueError: If the method learns from the data's completions alone, or needs log-probabilities
            that the engine does not give.
    """
    if not (isinstance(module, TeacherModule) or module.needs_own_samples):
        raise ValueError(
            f"{type(module).__name__} learns the completions of the data, and on_policy would have it "
            "learn its own; leave on_policy out, or use a method with a teacher, such as GKD"
        )
    if module.needs_own_samples:
        check_log_probs(engine, type(module).__name__)


def check_sampling(module: DistillationModule, options: GenerationOptions, *, always: bool) -> None:
    """Validate that a policy gradient gets samples of the student from its whole distribution.

    Args:
        module: The method.
        options: How completions are sampled.
        always: Whether the student generates every window.

    Raises:
        ValueError: If other samples than these are trained on.
    """
    name = type(module).__name__
    if module.needs_own_samples and not always:
        raise ValueError(f"{name} learns only from what the student has sampled; set lmbda: 1")
    if module.needs_own_samples and options.truncates:
        raise ValueError(
            f"{name} weighs tokens by how likely they were to be sampled, "
            "which top_k, top_p and greedy decoding distort; sample with a temperature above "
            f"0, top_k: 0, top_p: 1 and num_beams: 1 (got {options})"
        )
    sampling = options.temperature
    if isinstance(module, PolicyGradientModule) and module.temperature != sampling:
        raise ValueError(
            f"completions are sampled at temperature {sampling}, but {name} "
            f"trains the student at {module.temperature}, which is another distribution; "
            "set model.temperature and on_policy.generation.temperature to the same value"
        )


def check_lengths(module: DistillationModule, max_new_tokens: int, *, from_data: bool) -> None:
    """Validate that prompts and completions fit into the models' positions.

    Args:
        module: Module with the models, attached to a trainer.
        max_new_tokens: Largest number of tokens of a completion.
        from_data: Whether some windows are trained on with the completions of the data.

    Raises:
        ValueError: If rows are longer than the positions.
    """
    row, prompt = longest_rows(module.trainer).get("train", (0, 0))
    what = "prompts and on_policy.generation.max_new_tokens"
    check_length(module.models, prompt + max_new_tokens, what)
    if from_data:
        check_length(module.models, row, "train rows")


def check_batches(batches: Sequence[Batch], world_size: int, group_size: int) -> None:
    """Validate that completions of a window can be generated.

    Raises:
        ValueError: If rows have no prompts, or groups do not fill a window.
    """
    for batch in batches:
        require_prompts(batch)
    rows = world_size * sum(len(batch["row"]) for batch in batches)
    if rows % group_size:
        raise ValueError(
            f"a window has {rows} rows over all processes and micro-batches, which group_size "
            f"{group_size} does not divide; change batch_size or steps_per_window"
        )


def _joined(values: Sequence[Tensor], fill: int) -> Tensor:
    """Concatenate matrices of several batches, padded on the left."""
    widest = max(value.shape[1] for value in values)
    return torch.cat([F.pad(v, (widest - v.shape[1], 0), value=fill) for v in values])
