"""Base of methods that learn from the student's own samples."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_kd.batch import Batch, Rollout
from lightning_kd.collectives import any_process
from lightning_kd.divergences import Divergence
from lightning_kd.fused import (
    ChunkedPass,
    CrossEntropy,
    DivergenceTerm,
    TokenLoss,
    evaluate_no_grad,
)
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.models.dropout import Setting, restore, switch_off_dropout, training
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.loss_sums import LossSums
from lightning_kd.modules.reverse_kl import REVERSE_KL_NAMES, reverse_kl_term
from lightning_kd.modules.teacher_module import TeacherModule
from lightning_kd.normalization import Normalization
from lightning_kd.option_checks import check_choice, require_positive
from lightning_kd.policy import ImportanceSampling, Surrogate
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike

Dropout = Literal["none", "configured"]


class _RestoreDropout(Callback):
    """Lightning tells callbacks of an exception, and no module."""

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        assert isinstance(pl_module, PolicyGradientModule)  # it has brought this callback
        pl_module.restore_dropout()


class PolicyGradientModule(TeacherModule):
    """A student whose own samples, with their log-probabilities, come with the batch.

    The callback :class:`~lightning_kd.callbacks.OnPolicyGeneration` brings them, with ``lmbda: 1``.
    Validation is on the data's completions, where it measures the reverse KL of every token, or what
    of it the teacher's answers tell: ``top_k_reverse_kl`` over k tokens and a tail, or
    ``label_log_ratio``, how much likelier the tokens are to the student than to the teacher.

    Completions are sampled without dropout, so training steps are computed without it too: on fresh
    rollouts the ratio of current and sampling probability is then exactly 1. The student stays in
    training mode, for gradient checkpointing.

    The other options are those of :class:`~lightning_kd.modules.TeacherModule`.

    Args:
        temperature: Of student and teacher in the loss; completions must be sampled at the same.
        surrogate: How a ratio and an advantage become a loss.
        dropout: The student's in training steps: ``none``, or ``configured``, the probabilities of
            its config and of its LoRA. With the latter a ratio compares a student under dropout
            with the one that sampled, and the policy gradient is biased.

    Raises:
        ValueError: If the temperature is not positive or the choice for dropout unknown; in a run,
            if the student's training mode differs from its evaluation mode by more than dropout.
    """

    needs_own_samples = True
    evaluation_terms: tuple[str, ...] = ("reverse_kl",)

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        surrogate: Surrogate | None = None,
        dropout: Dropout = "none",
        teacher: TeachersLike,
        vocabulary: VocabularyPolicy = "equal",
        student: StudentLike,
        tokenizer: TokenizerLike | None = None,
        normalization: Normalization | str = "token",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        logits_backend: LogitsBackend | None = None,
        generation: GenerationOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(
            teacher=teacher,
            vocabulary=vocabulary,
            student=student,
            tokenizer=tokenizer,
            normalization=normalization,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            logits_backend=logits_backend,
            generation=generation,
            engine=engine,
        )
        require_positive(temperature=temperature)
        check_choice("dropout", dropout, get_args(Dropout))
        self.temperature = temperature
        self.dropout: Dropout = dropout
        self._switched_off: list[Setting] = []
        self._modes_compared = False
        self.surrogate = surrogate or ImportanceSampling()

    @property
    def teacher_temperatures(self) -> Mapping[str, float]:
        """Temperature that student and teacher share."""
        return {"temperature": self.temperature}

    def setup(self, stage: str) -> None:
        """Name validation's metric by the kind of the teacher's answers."""
        super().setup(stage)
        if stage != "predict":
            self.evaluation_terms = (REVERSE_KL_NAMES[self.answer_kind],)
            self._evaluation = LossSums(self.evaluation_terms)

    def on_fit_start(self) -> None:
        """Switch the student's dropout off, unless it is configured."""
        super().on_fit_start()
        if self.dropout == "none":
            self._switched_off += switch_off_dropout(self.student)

    def on_fit_end(self) -> None:
        """Restore the student's dropout."""
        super().on_fit_end()
        self.restore_dropout()

    def configure_callbacks(self) -> list[Callback]:
        """Add the callback that restores the student's dropout if a run is interrupted."""
        return [*super().configure_callbacks(), _RestoreDropout()]

    def restore_dropout(self) -> None:
        """Restore the dropout that was switched off."""
        restore(self._switched_off)
        self._switched_off = []

    def prepare_rollouts(self, rollouts: Sequence[Rollout], options: GenerationOptions) -> None:
        """Validate, once, that steps compute the distribution that completions were sampled from.

        Raises:
            ValueError: If they do not.
        """
        if self.dropout == "none" and not self._modes_compared:
            # Every rank compares one micro-batch, and one with tokens if it has one.
            scored = [int(self.positions(batch).tokens_per_row.sum()) for batch in rollouts]
            self._compare_modes(rollouts[scored.index(max(scored))])
            self._modes_compared = any_process(max(scored) > 0, self.device)

    def _compare_modes(self, batch: Batch) -> None:
        """Compare the student's log-probabilities in training mode and in evaluation mode."""
        positions = self.positions(batch)

        def log_probs() -> Tensor:
            student = self.logits_backend.read(self.student, batch, positions)
            return evaluate_no_grad(ChunkedPass(student, None, [CrossEntropy(positions.targets)]))[
                0
            ]

        evaluated = log_probs()
        with training(self.student):
            trained = log_probs()
        kind = self.device.type
        dtype = next(p.dtype for p in self.student.parameters() if p.is_floating_point())
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        differs = ((trained - evaluated).abs() > torch.finfo(dtype).eps ** 0.5).any()
        if any_process(bool(differs), self.device):
            raise ValueError(
                f"dropout is none, but {type(self.student).__name__} gives tokens other "
                "probabilities in training mode than in evaluation mode, in which it samples: it "
                "has a source of noise that is not known here. Set it to 0 in the student's "
                "config, or set model.dropout: configured to train with it on purpose"
            )

    @abstractmethod
    def rollout_terms(self, rollout: Rollout, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the loss of a rollout: one :class:`LossTerm` for each name in ``terms``.

        Args:
            rollout: Sampled by the student, with log-probabilities.
            scores: Of the models on it.
        """

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the loss of a batch, which must be a rollout.

        Raises:
            ValueError: If it is not.
        """
        return self.rollout_terms(as_rollout(batch, type(self).__name__), scores)

    def evaluation_loss(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the reverse KL at each label, or the part of it that the teacher's answer gives."""
        assert scores.teacher is not None  # score() has put it there
        (name,) = self.evaluation_terms
        targets = scores.positions.targets
        term = reverse_kl_term(scores.teacher, targets, temperature=self.temperature)
        return {name: LossTerm(term)}

    def divergence_term(self, divergence: Divergence) -> DivergenceTerm:
        """Return the term of a divergence from the teacher at the method's temperature."""
        return DivergenceTerm(
            divergence,
            student_temperature=self.temperature,
            teacher_temperature=self.temperature,
        )

    def policy_gradient(self, rollout: Rollout, scores: Scores, advantages: Tensor) -> TokenLoss:
        """Return the term of the surrogate loss of each sampled token, given advantages ``(N,)``."""
        written_by = of_tokens(scores, rollout["sampling_log_probs"])

        def loss(log_probs: Tensor, rows: slice) -> Tensor:
            return self.surrogate(log_probs, written_by[rows], advantages[rows])

        return TokenLoss(scores.positions.targets, loss, temperature=self.temperature)


def as_rollout(batch: Batch, user: str) -> Rollout:
    """Return a batch as a rollout with log-probabilities.

    Args:
        batch: A micro-batch.
        user: What learns from it, for the message.

    Raises:
        ValueError: If its completions are the data's.
    """
    if "sampling_log_probs" not in batch:
        raise ValueError(
            f"{user} learns from what the student generates, and this batch is the data's: add the "
            "callback OnPolicyGeneration with lmbda: 1"
        )
    return cast(Rollout, batch)


def of_tokens(scores: Scores, values: Tensor) -> Tensor:
    """Pick values of a rollout's tokens, ``(B, T)``, at the scored positions, ``(N,)``."""
    return scores.positions.of_tokens(values).to(scores.student.dtype)
