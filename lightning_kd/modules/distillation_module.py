"""Base of every method: steps, division of the loss, optimizer and logs."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_kd.batch import Batch, Rollout
from lightning_kd.evaluation import DistributionMetrics
from lightning_kd.fused import TokenTerm
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import FusedLogits, LogitsBackend, StudentLike
from lightning_kd.modules.loss import LossTerm, MicroBatchLoss, Scores, evaluate
from lightning_kd.modules.loss_sums import LossSums
from lightning_kd.modules.measured import MeasuredModule, narrow
from lightning_kd.modules.optimization import (
    WarmupCosine,
    built_optimizer,
    check_schedule,
    with_schedule,
)
from lightning_kd.modules.planned_work import PlanningModule
from lightning_kd.modules.term_checks import by_name, term_names
from lightning_kd.modules.tuning import TunableModule
from lightning_kd.normalization import Normalization, make_normalization
from lightning_kd.option_checks import check_instance
from lightning_kd.seeding import derive_seed, run_seed
from lightning_kd.strategies import StrategyAdapter, adapter_of
from lightning_kd.tokenization import TokenizerLike


class DistillationModule(TunableModule, MeasuredModule, PlanningModule):
    """A student, its optimizer, and a loss that is divided once per optimizer step.

    A method derives from this class (or from :class:`TeacherModule`), names its ``terms`` and says
    in :meth:`loss_terms` what is computed at a token. Nothing else of a step is its business.

    Args:
        student: The model that trains. In Python also its name, its configuration, or a model.
        tokenizer: Directory or hub name; in Python also a tokenizer. Defaults to the data module's,
            or else to that beside a student with a name.
        normalization: What the loss is divided by: ``token``, ``sequence``, ``batch``, or an
            instance of a :class:`~lightning_kd.normalization.Normalization`.
        optimizer: For all trainable weights, your own modules' too; biases and norms do not decay.
        lr_scheduler: Stepped once per optimizer step; ``lightning.pytorch.cli.ReduceLROnPlateau``
            with a ``monitor`` of validation once per validation.
        logits_backend: Defaults to :class:`~lightning_kd.models.FusedLogits`, a chunk at a time.
        generation: How completions are generated in ``predict``.
        engine: What generates there and samples; see ``StudentModule`` for the default.

    Raises:
        ValueError: If a value is out of its range, before any model is loaded.
    """

    evaluation_terms: tuple[str, ...] = ()
    """Names of the terms of :meth:`evaluation_loss`, if that is another loss."""

    may_change_on_resume = frozenset({"optimizer", "lr_scheduler", "logits_backend"})

    needs_own_samples: bool = False
    """Whether the method learns from the student's own samples alone."""

    loads_teacher: bool = True
    """Whether a teacher is loaded where it is needed; to export a student, none is."""

    micro_batch_loss: MicroBatchLoss
    """Loss of the last micro-batch, for callbacks."""

    def __init__(
        self,
        *,
        student: StudentLike,
        tokenizer: TokenizerLike | None = None,
        normalization: Normalization | str = "token",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        logits_backend: LogitsBackend | None = None,
        generation: GenerationOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(student=student, tokenizer=tokenizer, generation=generation, engine=engine)
        self.normalization = make_normalization(normalization)
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.logits_backend = FusedLogits() if logits_backend is None else logits_backend
        check_instance("logits_backend", self.logits_backend, LogitsBackend, "FusedLogits()")
        self._window = LossSums(term_names(type(self), getattr(self, "terms", None)))
        self._evaluation = LossSums(self.evaluation_terms or self.terms)
        self.train_distribution = DistributionMetrics()
        self.eval_distribution = DistributionMetrics()

    # What a method defines.

    @abstractmethod
    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the loss of a micro-batch: one :class:`LossTerm` for each name in ``terms``."""

    def evaluation_loss(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the loss on validation and test data. Defaults to that of training."""
        return self.loss_terms(batch, scores)

    def prepare_rollouts(self, rollouts: Sequence[Rollout], options: GenerationOptions) -> None:
        """Add to rollouts what needs all of a window: rewards, baselines, whitened advantages.

        Called once for each window of rollouts, without gradients and with models in evaluation
        mode, on all ranks together.

        Args:
            rollouts: This rank's micro-batches of the window; they are changed in place.
            options: How they were sampled.
        """

    def score(self, batch: Batch) -> Scores:
        """Run the models on a micro-batch."""
        positions = self.positions(batch)
        return Scores(positions, self.logits_backend.read(self.student, batch, positions))

    def training_scores(self, batch: Batch) -> Scores:
        """Run the models on a micro-batch to train on, at the positions that take part."""
        return self.score(batch)

    # Steps.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted sum of the micro-batch, scaled as the strategy divides."""
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        if micro_batch == 0:
            self._window = LossSums(self.terms)  # a step that was broken off has left its sums
            if self._logs_this_step():  # each time, a device would be given zeros of the host
                self.train_distribution.reset()
        # Dropout comes from counters, so that a resumed run repeats it.
        place = self.global_step, micro_batch, self.global_rank
        torch.manual_seed(derive_seed(run_seed(), "step", *place))
        self.check_rows(batch, batch_idx)
        scores = self.training_scores(batch)
        metrics = self.train_distribution if self._logs_this_step() else None
        terms = by_name(self.loss_terms(batch, scores), self.terms, type(self).__name__)
        total, self.micro_batch_loss = self._evaluate(scores, terms, metrics, self.count_ratios)
        self._window.add(self.micro_batch_loss)
        self.count_trained_bytes(batch, scores)
        sum_scale = partial(
            self._sum_scale.sum_factor, self.trainer, scores.positions, self.normalization
        )
        return self._adapter.scale_loss(total, sum_scale, self._close_step)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the count of the whole step: once, unscaled, before clipping."""
        self._adapter.scale_gradients(self._gradients(), self._close_step)
        self.check_sums()
        means = {name: narrow(mean) for name, mean in self._step_sums.means().items()}
        self.log("train/loss", means["loss"])
        self.log("train/tokens", narrow(self._step_sums.sums[1]))
        self.log("train/lr", narrow(optimizer.param_groups[0]["lr"]))
        shown = set()
        if self._logs_this_step():
            shown = self._log_distribution("train", self.train_distribution)
        self._log_terms("train", means, self.terms, shown)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip with the trainer's options, and log the norm of the divided gradient before clipping."""
        if self._logs_this_step():
            self._log_gradient_norm(self._adapter.gradient_norm(self._gradients()))
        self._adapter.clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, *_: object) -> None:
        """Log the norm of the gradient if it is known only after the optimizer step."""
        if self._logs_this_step(taken=1):
            self._log_gradient_norm(self._adapter.gradient_norm_after_step())

    def on_validation_start(self) -> None:
        """Refuse to evaluate random weights, and forget the sums of an evaluation that broke off."""
        super().on_validation_start()
        self._evaluation = LossSums(self._evaluation.terms)
        self.eval_distribution.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the sums of the evaluation."""
        self.check_rows(batch, batch_idx)
        scores = self.score(batch)
        names = self._evaluation.terms
        terms = by_name(self.evaluation_loss(batch, scores), names, type(self).__name__)
        _, loss = self._evaluate(scores, terms, self.eval_distribution)
        self._evaluation.add(loss)
        self.count_bytes(batch, scores)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate a batch of test data."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the whole validation set."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over the whole test set."""
        self._log_evaluation("test")

    # Optimizer.

    def make_optimizer(self, parameters: Iterable[Parameter]) -> Optimizer:
        """Return the optimizer of those parameters that train."""
        return self.at_own_rate(built_optimizer(self._optimizer, parameters))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, and the schedule that is stepped with it.

        Raises:
            ValueError: If the optimizer does not take its options, or a schedule that depends on a
                metric does not say on which.
        """
        optimizer = self.make_optimizer(self.parameters())
        if self._lr_scheduler is None:
            return optimizer
        return with_schedule(optimizer, self._lr_scheduler(optimizer))

    def on_train_start(self) -> None:
        """Set the end of a cosine without one to the trainer's.

        Not in :meth:`configure_optimizers`: asking the trainer there makes it set up the loader
        before its state is restored.

        Raises:
            ValueError: If the run has no end, or a schedule depends on validation and there is none.
        """
        for config in self.trainer.lr_scheduler_configs:
            check_schedule(config, self.trainer)
            if isinstance(config.scheduler, WarmupCosine) and config.scheduler.total_steps is None:
                config.scheduler.end_with_run(self.trainer.estimated_stepping_batches)
        super().on_train_start()

    # Helpers.

    @property
    def _adapter(self) -> StrategyAdapter[Any]:
        return adapter_of(self.trainer)

    def _close_step(self) -> Tensor:
        """Return the factor that makes the sums of this step its loss.

        Lightning divides by the micro-batches and the strategy by the ranks: that is taken back.
        """
        self._step_sums = self._window.reduce(self.sum_over_ranks)
        number = self.trainer.accumulate_grad_batches * self.trainer.world_size
        factor = self._sum_scale.gradient_factor(self.trainer, number)
        return factor * number / self._step_sums.divisor

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]

    def _evaluate(
        self,
        scores: Scores,
        terms: Mapping[str, LossTerm],
        metrics: DistributionMetrics | None,
        count_ratios: Mapping[str, Tensor | float] | None = None,
    ) -> tuple[Tensor, MicroBatchLoss]:
        metric_terms = [] if metrics is None else self._metric_terms(metrics, scores)
        total, loss, watched = evaluate(
            self.logits_backend,
            scores,
            terms,
            self.normalization,
            own=self.term_normalizations,
            count_ratios=count_ratios,
            metric_terms=metric_terms,
        )
        if metrics is not None:
            self.compared_label_nats = watched[0]
            self._measure(metrics, scores, watched)
        return total, loss

    def _metric_terms(self, metrics: DistributionMetrics, scores: Scores) -> list[TokenTerm]:
        return metrics.token_terms(scores.positions.targets, scores.teacher)

    def _measure(self, metrics: DistributionMetrics, scores: Scores, values: Tensor) -> None:
        """Add the values of the metrics' terms, ``(terms, N)``, the first of them the labels' nats."""
        kind = None if scores.teacher is None else scores.teacher.kind
        metrics.update(values, scores.positions.targets, kind)
        self.label_nats = values[0]

    def _log_evaluation(self, stage: Literal["val", "test"]) -> None:
        self._evaluation.open(self.device)
        reduced = self._evaluation.close(self.sum_over_ranks)
        self.check_evaluated(reduced.tokens)
        # All ranks have the same means already; sync_dist tells Lightning that this is known.
        self.log(f"{stage}/loss", reduced.means["loss"], prog_bar=True, sync_dist=True)
        shown = self._log_distribution(stage, self.eval_distribution)
        self._log_terms(stage, reduced.means, self._evaluation.terms, shown)
        self.log(f"{stage}/tokens", float(reduced.tokens), sync_dist=True)
