"""Generation of the completions of a window."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.batch import PromptBatch, Rollout
from lightning_kd.callbacks.rollouts.checks import check_shards
from lightning_kd.generation import (
    Completions,
    Engine,
    GenerationOptions,
    check_completions,
    evaluating,
    generate,
)
from lightning_kd.generation.rollouts import Truncation, rollout_batches
from lightning_kd.models.positions import check_length
from lightning_kd.models.sharding import is_fsdp2_sharded, unsharded
from lightning_kd.modules import DistillationModule, TeacherModule
from lightning_kd.modules.remote import ask_together
from lightning_kd.modules.self_taught import longest_of_teacher
from lightning_kd.modules.texts import check_own_samples
from lightning_kd.schedules import Constant, Schedule
from lightning_kd.seeding import derive_seed, run_seed
from lightning_kd.strategies import adapter_of
from lightning_kd.teachers import TEACHERS, Ability, Teacher, check_ability
from lightning_kd.tokenization import padding_id


@dataclass(frozen=True)
class Writing:
    """How the completions of a run's windows are generated."""

    options: GenerationOptions
    engine: Engine
    mixture_alpha: float
    rows_at_once: int | None
    unshard: bool
    group_size: int
    truncation: Truncation


def write_window(
    trainer: L.Trainer,
    module: DistillationModule,
    batches: Sequence[PromptBatch],
    how: Writing,
    *,
    on_policy: bool,
) -> tuple[Completions, list[Rollout], float]:
    """Generate a window's completions, and let the module prepare those of the student.

    Args:
        trainer: The trainer.
        module: Module whose student or teacher generates.
        batches: The window's micro-batches, on the device.
        how: The options.
        on_policy: Whether the student generates, rather than the teacher.

    Returns:
        The completions, the micro-batches with them, and the seconds that generating took.
    """
    models = list(module.models.values())
    context = trainer.precision_plugin.train_step_context()
    sharded = [model for model in models if how.unshard and is_fsdp2_sharded(model)]
    gathered = adapter_of(trainer).outside_of_steps()
    with evaluating(*models), torch.no_grad(), gathered, unsharded(sharded), context:
        started = time.perf_counter()
        how.engine.update(module.student)
        generated = complete(
            module,
            batches,
            how.options,
            engine=how.engine,
            on_policy=on_policy,
            mixture_alpha=how.mixture_alpha,
            rows_at_once=how.rows_at_once,
        )
        seconds = time.perf_counter() - started
        rollouts = rollout_batches(
            batches,
            generated,
            pad_id=padding_id(module.tokenizer),
            group_size=how.group_size,
            truncation=how.truncation,
        )
        if on_policy:
            module.prepare_rollouts(rollouts, how.options)
    return generated, rollouts, seconds


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
    longest = prompts.shape[1] + options.max_new_tokens
    check_length(module.models, longest, "prompts and on_policy.generation.max_new_tokens")
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
            if mixture_alpha > 0 or engine.asks_teacher:
                teacher = teacher_with("mixture", module, engine)
                model = stack.enter_context(teacher.model_on(prompts.device))
                source = partial(source, mixed_with=(model, mixture_alpha))
        else:
            teacher = teacher_with("generation", module)
            source = partial(teacher.generate, **shared)
            if teacher.is_remote:
                source = partial(_on_all, source, prompts.device)
        size = rows_at_once or len(samples)
        slices = [slice(start, start + size) for start in range(0, len(samples), size)]
        parts = []
        for part in slices:
            given = prompts[part], masks[part], options
            completions = source(module.tokenizer, *given, seeds=seeds[part])
            if not on_policy:
                name, count = f"generate of {type(teacher).__name__}", len(prompts[part])
                completions = check_completions(
                    name,
                    completions,
                    count,
                    options,
                    eos_ids={module.tokenizer.eos_token_id},
                    other_ends=True,
                    width=shared["width"],
                )
            parts.append(completions)
    return Completions.join(parts, pad_id)


def teacher_with(
    ability: Ability, module: L.LightningModule, engine: Engine | None = None
) -> Teacher:
    """Return the teacher of a module, which must be able to generate or to be mixed in.

    Args:
        ability: Which of both.
        module: The module.
        engine: Of the run.

    Raises:
        ValueError: If there is no such teacher.
    """
    option = "mixture_alpha above 0" if ability == "mixture" else "off_policy: teacher"
    if ability == "mixture" and engine is not None and engine.asks_teacher:
        option = f"engine: {type(engine).__name__}"
    user = f"{type(module).__name__} with {option}"
    return check_ability(getattr(module, "teacher", None), ability, user, TEACHERS)


def check_sources(
    module: DistillationModule,
    mixture_alpha: float,
    off_policy: str,
    lmbda: Schedule,
    engine: Engine,
    *,
    unshard: bool,
) -> None:
    """Validate that teacher and engine can do what they are needed for.

    Args:
        module: The method, with its models.
        mixture_alpha: Share of the teacher in the distribution that the student samples from.
        off_policy: Source of what the student does not generate: ``dataset`` or ``teacher``.
        lmbda: Share of windows that the student generates.
        engine: Of the run.
        unshard: Whether weights in shards are gathered meanwhile.

    Raises:
        ValueError: If one cannot, or nothing is in shards that could be gathered.
    """
    share = lmbda.value if isinstance(lmbda, Constant) else None
    together = mixture_alpha > 0 or engine.asks_teacher
    teacher_generates = off_policy == "teacher" and share != 1
    if isinstance(module, TeacherModule) and share != 0:
        for asked in module.teachers.values():
            check_own_samples(module, asked)
    if (together or teacher_generates) and longest_of_teacher(module.trainer).get("train"):
        raise ValueError(
            "the teacher would generate, or be mixed in, and reads other prompts than the student "
            "(data.teacher_prompt_template): what follows them is another text. Set mixture_alpha: 0 "
            "and off_policy: dataset, take another engine, or leave the template out"
        )
    if together:
        teacher_with("mixture", module, engine)
    if teacher_generates:
        if engine.asks_teacher:
            raise ValueError(
                f"engine: {type(engine).__name__} generates with the student and the teacher together, "
                "and with off_policy: teacher the teacher would generate alone; set lmbda: 1 or "
                "off_policy: dataset"
            )
        teacher_with("generation", module).check_generation(engine)
    check_shards(module, unshard=unshard)
    models: list[Any] = [] if share == 0 else [module.student]
    if isinstance(module, TeacherModule) and (teacher_generates or (together and models)):
        models += module.teacher.local_models.values()
    engine.check_models(models, gathered=unshard)


def _on_all(
    source: Callable[..., Completions], device: torch.device, *given: Any, seeds: list[int]
) -> Completions:
    """Generate on all processes, or fail on all of them."""
    return ask_together(partial(source, *given, seeds=seeds), device)


def _joined(values: Sequence[Tensor], fill: int) -> Tensor:
    """Concatenate matrices of several batches, padded on the left."""
    widest = max(value.shape[1] for value in values)
    return torch.cat([F.pad(v, (widest - v.shape[1], 0), value=fill) for v in values])
