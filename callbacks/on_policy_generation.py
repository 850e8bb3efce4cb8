"""Generation of the completions that a step is trained on."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_kd.batch import Batch, Rollout, require_prompts
from lightning_kd.callbacks.rollouts.checkpoints import gather_ranks, select_rank
from lightning_kd.callbacks.rollouts.checks import (
    check_cut,
    check_groups,
    check_lengths,
    check_module,
    check_ranges,
    check_rows_at_once,
    check_sampling,
)
from lightning_kd.callbacks.rollouts.empty_windows import EmptyWindows
from lightning_kd.callbacks.rollouts.generation import Writing, check_sources, write_window
from lightning_kd.callbacks.rollouts.health import HealthOptions, RolloutHealth
from lightning_kd.callbacks.rollouts.looking_ahead import tell_what_comes
from lightning_kd.callbacks.rollouts.planning import give_plan, give_rollout, loader_of
from lightning_kd.callbacks.rollouts.records import RolloutRecords
from lightning_kd.callbacks.rollouts.replay import ReplayBuffer
from lightning_kd.callbacks.rollouts.statistics import RolloutStatistics
from lightning_kd.callbacks.rollouts.student_windows import StudentWindows
from lightning_kd.data import RolloutPlan, Window
from lightning_kd.generation import Engine, SamplingOptions, Truncation, engine_for
from lightning_kd.modules import DistillationModule, TeacherModule
from lightning_kd.option_checks import check_choice
from lightning_kd.resuming import Resumable
from lightning_kd.schedules import Constant, Schedule
from lightning_kd.seeding import derive_seed, run_seed

OffPolicy = Literal["dataset", "teacher"]

_CHECKPOINT_KEY = "on_policy_generation"
_TABLE = ("table_every", "table_rows")


class OnPolicyGeneration(Resumable, Callback):
    r"""Train the student, with probability ``lmbda``, on completions that it generates itself.

    Completions are generated in *windows*: all micro-batches of ``steps_per_window`` optimizer steps
    at once, by the student as it is before the first of them. One random number decides for a whole
    window; it is a hash of the run's seed and the window's number, so it is the same on all ranks and
    in a resumed run. A row's completion is sampled with random numbers of its own, seeded by the run
    and the number of its sample, so that it does not depend on ranks or micro-batches. With
    ``passes``, each window is trained on several times before the next is generated; a checkpoint in
    the middle of a window contains it.

    Logs under ``rollout/``, at logged steps, what ``docs/on_policy.md`` (Health) says: completions'
    lengths, ends and repetition, each teacher's share of their tokens, ``on_policy`` (1 if the student
    generated); ``tokens_per_second`` of generation and its ``time_share`` of the window; histograms
    (TensorBoard), a table. Warns when lengths run away.

    Args:
        lmbda: Share of windows that the student generates (GKD's :math:`\lambda`), in [0, 1], or a
            schedule of it.
        off_policy: Source of the completions of the other windows: the ``dataset`` or the ``teacher``.
        generation: Sampling options.
        engine: Engine that generates. Defaults to ``CachedSampler``, and to ``TransformersEngine`` for
            beam search.
        mixture_alpha: Share of the teacher in the distribution that the student's completions are
            sampled from (MiniLLM's :math:`\alpha`, 0.2 in the paper); 0 is the student alone.
        group_size: Number of completions of each prompt.
        steps_per_window: Optimizer steps whose completions are generated at once.
        passes: Number of times that each window is trained on.
        truncated: Treatment of completions without an EOS: ``keep`` trains on them; ``mask`` removes
            their tokens from the loss and its count; ``drop`` also from baselines and statistics.
        replay: Buffer of the student's completions, from which some of its windows are taken.
        health: What is looked at to tell whether the student does well.
        rows_at_once: Most rows that a rank generates together. Defaults to all; not with ``slots``.
        table_every: Optimizer steps between histograms and tables; 0 for none.
        table_rows: Rows of the table.
        unshard: Gather sharded weights on every process to generate: faster, if there is memory for it.
        path: JSONL file that every generated completion is appended to, with the columns that
            :class:`~lightning_kd.callbacks.JsonlPredictions` writes. Only a resumed run goes on in
            one that exists.

    Raises:
        ValueError: If a value is out of its range, or module or data do not support the options.

    References:
        Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024, Algorithm 1.
        https://arxiv.org/abs/2306.13649; Gu et al., *MiniLLM*, ICLR 2024, Eq. 4.
        https://arxiv.org/abs/2306.08543
    """

    resume_name = "on_policy"
    may_change_on_resume = frozenset({"rows_at_once", "unshard", "path", "health", *_TABLE})

    def __init__(
        self,
        *,
        lmbda: float | Schedule = 1.0,
        off_policy: OffPolicy = "dataset",
        generation: SamplingOptions | None = None,
        engine: Engine | None = None,
        mixture_alpha: float = 0.0,
        group_size: int = 1,
        steps_per_window: int = 1,
        passes: int = 1,
        truncated: Truncation = "keep",
        replay: ReplayBuffer | None = None,
        health: HealthOptions | None = None,
        rows_at_once: int | None = None,
        unshard: bool = False,
        table_every: int = 100,
        table_rows: int = 4,
        path: str | None = None,
    ) -> None:
        check_choice("off_policy", off_policy, get_args(OffPolicy))
        check_choice("truncated", truncated, get_args(Truncation))
        check_ranges(lmbda, mixture_alpha, steps_per_window, rows_at_once)
        self.lmbda = lmbda if isinstance(lmbda, Schedule) else Constant(lmbda)
        self.off_policy: OffPolicy = off_policy
        self.generation = generation or SamplingOptions()
        self.engine = engine_for(self.generation, engine, mixture=mixture_alpha > 0, teacher=True)
        check_rows_at_once(self.engine, rows_at_once)
        self.mixture_alpha = mixture_alpha
        self.steps_per_window = steps_per_window
        self.plan = RolloutPlan(1, passes, group_size)
        self.truncated: Truncation = truncated
        self._empty, self.replay = EmptyWindows(truncated), replay
        self._own = StudentWindows(self.lmbda, replay)
        self.rows_at_once, self.unshard = rows_at_once, unshard
        self.health = RolloutHealth(health or HealthOptions(), self.generation)
        self.statistics = RolloutStatistics(table_every)
        self.records = RolloutRecords(table_every, table_rows, None if path is None else Path(path))
        self._window: int | None = None
        self._on_policy = False
        self._rollouts: list[Rollout] = []

    def resume_settings(self) -> dict[str, Any]:
        """Return options that must not change, with ``rows_at_once`` if rows share random numbers."""
        rows = {} if self.engine.seeds_rows else {"rows_at_once": self.rows_at_once}
        return super().resume_settings() | rows

    def is_on_policy(self, window: int, step: int) -> bool:
        """Return whether the student generates a window that begins at a step; equal on all ranks."""
        return derive_seed(run_seed(), "coin", window) / 2**63 < self.lmbda(step)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the data the plan of the run, before its loaders are built.

        Raises:
            ValueError: If the data takes none, or has one from another callback.
        """
        # A run that ended inside a window leaves it behind; the next one has its own.
        self._window, self._rollouts, self._empty.consecutive = None, [], 0
        self.records.forget_run()
        self.health.forget_run()
        self._own.forget_run()
        if stage == "fit":
            micro_batches = self.steps_per_window * trainer.accumulate_grad_batches
            plan = replace(self.plan, micro_batches=micro_batches)
            give_plan(trainer, pl_module, plan, given_by=type(self).__name__)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse module, options and engine that do not go together, before the first step."""
        self.check(pl_module)
        self._own.check_validation(trainer)
        self.records.check(trainer)

    def check(self, pl_module: L.LightningModule) -> None:
        """Refuse a module that does not go together with the options; it has its models and data."""
        module = check_module(pl_module, self.engine)
        self.health.check(module)
        self._own.check(module)
        always = isinstance(self.lmbda, Constant) and self.lmbda.value == 1
        check_sampling(module, self.generation, always=always)
        generating = self.mixture_alpha, self.off_policy, self.lmbda, self.engine
        check_sources(module, *generating, unshard=self.unshard)
        from_data = not always and self.off_policy == "dataset"
        check_lengths(module, self.generation.max_new_tokens, from_data=from_data)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate that groups fill a window, and that a restored one is cut as this run's are."""
        check_groups(loader_of(trainer))
        check_cut(trainer, self._rollouts)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Replace the batch's completions; at the start of a window, generate them.

        Raises:
            ValueError: If rows have no prompts.
        """
        assert isinstance(pl_module, DistillationModule)  # checked in on_fit_start
        window, place = loader_of(trainer).window_of(batch)
        if window.number != self._window:
            require_prompts(batch)
            # None until it is complete: a checkpoint of a run that fails meanwhile has no window.
            self._window, self._rollouts = None, []
            self._on_policy = self.is_on_policy(window.number, trainer.global_step)
            self.statistics.begin()
            if self._on_policy or self.off_policy == "teacher":
                self._generate_window(trainer, pl_module, window)
            self._window = window.number
        self.health.compare(pl_module, self._on_policy)
        if self._rollouts:
            give_rollout(batch, self._rollouts[place])
            pl_module.count_rollouts(batch, self._rollouts, place)
        tell_what_comes(pl_module, self._rollouts or window, place, loader_of(trainer).ends_window)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Log statistics of a window at its last micro-batch."""
        assert isinstance(pl_module, DistillationModule)  # checked in on_fit_start
        self.health.compare_log_probs(pl_module, batch)
        if not loader_of(trainer).ends_window or self._window is None:
            return
        steps = self.steps_per_window * self.plan.passes
        also = partial(self.health.metrics, pl_module, self._rollouts, self._on_policy)
        always = self._own.logged(trainer.global_step - 1, self._on_policy)
        self.statistics.end(trainer, self._on_policy, steps, also, always)
        if self._rollouts and isinstance(pl_module, TeacherModule):
            self.records.log_table(trainer, pl_module, self._rollouts[0])
        self._window, self._rollouts = None, []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a share that follows validations hear of one."""
        self._own.hear_of_validation(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save an unfinished window: later weights would generate another one."""
        saved: dict[str, Any] = {"empty_windows": self._empty.consecutive}
        saved |= {"health": self.health.state_dict(), "own": self._own.state_dict()}
        # A callback in front of this one may save when the window has ended and is still here.
        if self._window is not None and not loader_of(trainer).ends_window:
            own = {"rollouts": self._rollouts, "statistics": self.statistics.state_dict()}
            unfinished = {"window": self._window, "on_policy": self._on_policy}
            saved |= unfinished | {"ranks": gather_ranks(own)}
        checkpoint[_CHECKPOINT_KEY] = saved

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore an unfinished window.

        Raises:
            ValueError: If it was generated for another number of processes.
        """
        if trainer.state.fn is not TrainerFn.FITTING:
            return
        self.records.resumed = True
        saved = checkpoint.get(_CHECKPOINT_KEY, {"empty_windows": 0})
        self._empty.consecutive = saved["empty_windows"]
        if "health" in saved:
            self.health.load_state_dict(saved["health"])
        self._own.load_state_dict(saved.get("own", {}))
        if "window" in saved:
            own = select_rank(trainer, saved["ranks"], self.steps_per_window * self.plan.passes)
            self._window, self._on_policy = saved["window"], saved["on_policy"]
            self._rollouts = own["rollouts"]
            self.statistics.load_state_dict(own["statistics"])

    def _generate_window(
        self, trainer: L.Trainer, module: DistillationModule, window: Window
    ) -> None:
        """Generate a window's completions, or take them from the buffer."""
        batches = [trainer.strategy.batch_to_device(require_prompts(batch)) for batch in window]
        replay = self.replay if self._on_policy else None
        how = Writing(
            self.generation,
            self.engine,
            self.mixture_alpha,
            self.rows_at_once,
            self.unshard,
            self.plan.group_size,
            self.truncated,
        )
        if replay is not None and replay.begin(window.number, trainer.global_step):
            self._rollouts = replay.rollouts(module, batches, how.group_size, how.truncation)
            return
        generated, self._rollouts, seconds = write_window(
            trainer, module, batches, how, on_policy=self._on_policy
        )
        self.statistics.add(generated, seconds)
        self._empty.add(module, self._rollouts, self.generation.max_new_tokens)
        self.records.write(trainer, module, self._rollouts, generated.ended.tolist(), window.number)
        if self._on_policy:
            self.health.add(module, generated, window.number, trainer.global_step)
        if replay is not None:
            replay.add(batches, generated)
