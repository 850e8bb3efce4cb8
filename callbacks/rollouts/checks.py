"""Validation that module, data and options are compatible with generated completions."""

from collections.abc import Sequence

import lightning as L

from lightning_kd.batch import Rollout
from lightning_kd.callbacks.rollouts.planning import loader_of
from lightning_kd.data import PairedLoader, TrainingLoader, WindowedLoader
from lightning_kd.generation import Engine, GenerationOptions, check_log_probs
from lightning_kd.models.positions import check_length
from lightning_kd.models.sharding import is_fsdp2_sharded
from lightning_kd.modules import GKD, DistillationModule, PolicyGradientModule, TeacherModule
from lightning_kd.modules.self_taught import longest_of_teacher
from lightning_kd.modules.student_module import longest_rows
from lightning_kd.modules.texts import check_splits
from lightning_kd.schedules import Schedule


def check_ranges(
    lmbda: float | Schedule, mixture_alpha: float, steps_per_window: int, rows_at_once: int | None
) -> None:
    """Validate shares and sizes: of on-policy windows, of the teacher in a mixture, of windows.

    Raises:
        ValueError: If one is out of its range.
    """
    if steps_per_window < 1 or (rows_at_once is not None and rows_at_once < 1):
        raise ValueError(
            f"steps_per_window is {steps_per_window} and rows_at_once {rows_at_once}; they "
            "must be 1 or more"
        )
    if not isinstance(lmbda, Schedule) and not 0 <= lmbda <= 1:
        raise ValueError(f"lmbda is {lmbda}; it is a share of windows, in [0, 1]")
    if not 0 <= mixture_alpha < 1:
        raise ValueError(f"mixture_alpha is {mixture_alpha}; it must lie in [0, 1)")


def check_rows_at_once(engine: Engine, rows_at_once: int | None) -> None:
    """Refuse parts of a window for an engine that takes parts of what it is given by itself.

    Raises:
        ValueError: If the window is to be cut up, and the engine refills its slots.
    """
    if rows_at_once is not None and engine.refills_slots:
        raise ValueError(
            f"rows_at_once is {rows_at_once}, and {type(engine).__name__} would be given that many "
            "rows at a time, with no further one to enter where a row has ended; leave rows_at_once "
            "out (slots of the engine is the number of rows that are generated together), or choose "
            "engine: CachedSampler"
        )


def check_module(module: L.LightningModule, engine: Engine) -> DistillationModule:
    """Return a module that uses completions, for which the engine gives what it needs.

    Args:
        module: The module that is trained.
        engine: What generates.

    Raises:
        ValueError: If the module is none of this library, its method learns from the data's
            completions alone, or needs log-probabilities that the engine does not give.
    """
    if not isinstance(module, DistillationModule):
        raise ValueError(
            f"OnPolicyGeneration generates for modules of this library, not for a "
            f"{type(module).__name__}; derive it from DistillationModule"
        )
    if not (isinstance(module, TeacherModule) or module.needs_own_samples):
        raise ValueError(
            f"{type(module).__name__} learns the completions of the data, and on_policy would have it "
            "learn its own; leave on_policy out, or use a method with a teacher, such as GKD"
        )
    if module.needs_own_samples:
        check_log_probs(engine, type(module).__name__)
        if engine.asks_teacher:
            raise ValueError(
                f"{type(module).__name__} weighs tokens by how likely the student was to sample them, "
                f"and with {type(engine).__name__} some are never sampled; choose engine: "
                "CachedSampler, or a method without policy gradient, such as GKD"
            )
    return module


def check_shards(module: L.LightningModule, *, unshard: bool) -> None:
    """Validate that weights that are to be gathered are sharded.

    Raises:
        ValueError: If they are not.
    """
    if unshard and not is_fsdp2_sharded(module.student):  # type: ignore[arg-type]
        raise ValueError(
            "unshard: true gathers shards of FSDP2, and this strategy has none; leave it out, "
            "or use --trainer.strategy fsdp2"
        )


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
        other = ", or leave model.estimator out" if isinstance(module, GKD) else ""
        raise ValueError(
            f"{name} learns only from what the student has sampled; set lmbda: 1{other}"
        )
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
    """Validate that prompts and completions fit into the models' positions, and teachers can read them.

    Args:
        module: Module with the models, attached to a trainer.
        max_new_tokens: Largest number of tokens of a completion.
        from_data: Whether some windows are trained on with the completions of the data.

    Raises:
        ValueError: If rows are longer than the positions, the data has no completions, or a teacher
            cannot answer about one.
    """
    row, prompt = longest_rows(module.trainer).get("train", (0, 0))
    what = "prompts and on_policy.generation.max_new_tokens"
    check_length(module.models, prompt + max_new_tokens, what)
    told = longest_of_teacher(module.trainer).get("train")
    if told is not None and isinstance(module, TeacherModule):
        module.check_teacher_length(told[1] + max_new_tokens, what)
    if from_data and row == prompt > 0:
        raise ValueError(
            "lmbda below 1 with off_policy: dataset trains on the data's completions, and the data has "
            "prompts alone; set lmbda: 1 or off_policy: teacher, or give completions"
        )
    if from_data:
        check_length(module.models, row, "train rows")
        for teacher in module.teachers.values() if isinstance(module, TeacherModule) else ():
            # The others have seen all texts.
            if teacher.looks_at_texts and teacher.answers_any_text:
                check_splits(module, teacher, ["train"])


def check_groups(loader: TrainingLoader | PairedLoader | WindowedLoader) -> None:
    """Refuse groups of completions that do not fill a window; other loaders have no groups."""
    if not isinstance(loader, WindowedLoader):
        rows = loader.samples_per_micro_batch * loader.plan.micro_batches
        check_window(rows, loader.plan.group_size)


def check_window(rows: int, group_size: int) -> None:
    """Validate that groups of completions fill a window.

    Args:
        rows: Of a window, over all processes and micro-batches.
        group_size: Completions of a prompt.

    Raises:
        ValueError: If they do not.
    """
    if rows % group_size:
        raise ValueError(
            f"a window has {rows} rows over all processes and micro-batches, which group_size "
            f"{group_size} does not divide; change batch_size or steps_per_window"
        )


def check_cut(trainer: L.Trainer, rollouts: Sequence[Rollout]) -> None:
    """Validate that a window from a checkpoint is cut into the micro-batches of this run.

    Args:
        trainer: The trainer, with its loader.
        rollouts: This rank's micro-batches of the window; none if no window was unfinished.

    Raises:
        ValueError: If it is not.
    """
    loader = loader_of(trainer)
    if not rollouts or isinstance(loader, WindowedLoader):
        return
    saved = len(rollouts), len(rollouts[0]["row"]) * trainer.world_size
    own = loader.plan.micro_batches, loader.samples_per_micro_batch
    if saved != own:
        raise ValueError(
            f"the checkpoint is from the middle of a window of {saved[0]} micro-batches of {saved[1]} "
            f"rows, and this run cuts windows into {own[0]} of {own[1]}: resume with the same "
            "data.batch_size and trainer.accumulate_grad_batches, or from a checkpoint at the end of a "
            "window (every_n_train_steps a multiple of "
            f"{loader.plan.window // trainer.accumulate_grad_batches})"
        )
