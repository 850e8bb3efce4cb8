"""Generalized knowledge distillation."""

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info

from lightning_kd.batch import Batch
from lightning_kd.divergences import Divergence, ReverseKL, make_divergence
from lightning_kd.fused import AnswerKind, DivergenceTerm
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.divergence_module import DivergenceModule
from lightning_kd.modules.interpolation import Interpolation
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.loss_sums import LossSums
from lightning_kd.modules.policy_gradient import as_rollout
from lightning_kd.modules.reverse_kl import REVERSE_KL_NAMES
from lightning_kd.modules.reverse_kl_estimators import CorrectedTopK, SampledPositions
from lightning_kd.modules.student_module import generates_completions
from lightning_kd.normalization import Normalization
from lightning_kd.option_checks import require_positive
from lightning_kd.policy import ImportanceSampling
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike


class GKD(DivergenceModule):
    r"""Match the teacher at every token of completions, a share of which the student generates.

    .. math:: L = (1 - \lambda)\, E_{(x, y) \sim data}\bigl[D(p \| q)(y | x)\bigr]
        + \lambda\, E_{x}\, E_{y \sim q(\cdot | x)}\bigl[D(p \| q)(y | x)\bigr]

    with no gradient through the sampling. What generates is the business of the callback
    :class:`~lightning_kd.callbacks.OnPolicyGeneration`: its ``lmbda`` is :math:`\lambda`, its
    ``temperature`` the sampling temperature, and with ``off_policy: teacher`` the teacher generates
    what the student does not. Without the callback it is supervised distillation.

    The other options are those of :class:`~lightning_kd.modules.DivergenceModule`.

    Args:
        divergence: A registered name or a :class:`~lightning_kd.divergences.Divergence`; the
            generalized Jensen-Shannon divergence with ``beta`` 0.5.
        teacher_temperature: Divides the teacher's logits in the divergence (the paper uses 0.1 on
            GSM8K). The student's are never divided: what it learns is what it samples from.
        estimator: Makes the reverse KL from a teacher's k tokens unbiased by the sampled token:
            :class:`CorrectedTopK`, which needs completions of the student alone (``lmbda: 1``,
            sampled without ``top_k`` and ``top_p``) and ``divergence: ReverseKL``. Without it, the
            divergence from k tokens is over these and one event for all others: a lower bound.
            Validation measures that bound in any case; with an estimator, whose ``train/divergence``
            is of all tokens, it is ``val/top_k_reverse_kl``.

    Raises:
        ValueError: If the temperature is not positive, the divergence unknown, or an estimator given
            for another divergence than the reverse KL or beside an interpolation.

    References:
        Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024, Algorithm 1.
        https://arxiv.org/abs/2306.13649
    """

    terms: tuple[str, ...] = ("divergence",)
    evaluation_terms: tuple[str, ...] = ("divergence",)
    needs: tuple[AnswerKind, ...] = ("full_distribution", "top_k", "top_k_and_token", "sampled")

    def __init__(
        self,
        *,
        divergence: Divergence | str = "generalized_jsd",
        teacher_temperature: float = 1.0,
        estimator: CorrectedTopK | None = None,
        interpolation: Interpolation | None = None,
        position_share: float = 1.0,
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
            interpolation=interpolation,
            position_share=position_share,
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
        require_positive(teacher_temperature=teacher_temperature)
        self.divergence = make_divergence(divergence)
        self.teacher_temperature = teacher_temperature
        self.estimator = estimator
        if estimator is not None:
            if type(self.divergence) is not ReverseKL:
                raise ValueError(
                    f"estimator: CorrectedTopK estimates the reverse KL, and the divergence is "
                    f"{self.divergence!r}, whose own formula it would not read; set divergence: "
                    "ReverseKL, or leave estimator out"
                )
            if interpolation is not None:
                raise ValueError(
                    "estimator: CorrectedTopK estimates the reverse KL from the teacher, and "
                    "interpolation puts another target in its place; leave one of them out"
                )
            self.needs, self.needs_own_samples = estimator.needs, True
            self.terms = (*self.terms, *estimator.watched)

    @property
    def teacher_temperatures(self) -> Mapping[str, float]:
        """Temperature of the teacher in the divergence."""
        return {"teacher_temperature": self.teacher_temperature}

    @property
    def teacher_divergences(self) -> Mapping[str, Divergence]:
        """The divergence."""
        return {"divergence": self.divergence}

    def setup(self, stage: str) -> None:
        """Name validation's metric by what it measures, where an estimator trains on another."""
        super().setup(stage)
        if self.estimator is not None and stage != "predict":
            self.evaluation_terms = (self._measured,)
            self._evaluation = LossSums(self.evaluation_terms)

    def on_fit_start(self) -> None:
        """Warn if the student generates nothing."""
        super().on_fit_start()
        if not generates_completions(self.trainer):
            rank_zero_info(
                "GKD without the callback OnPolicyGeneration trains on the data's completions alone, "
                "as with lmbda: 0"
            )

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the divergence at each token of the completion, or its estimate.

        Raises:
            ValueError: If there is an estimator, and the student has not sampled the completion.
        """
        if self.estimator is None:
            return self._terms(self.trained_divergence(self.divergence))
        rollout = as_rollout(batch, "GKD with estimator: CorrectedTopK")
        positions = SampledPositions.of(
            rollout, scores, teacher_temperature=self.teacher_temperature
        )
        unclipped = ImportanceSampling()
        loss = self.estimator.loss(positions, unclipped, 1.0)
        return {"divergence": LossTerm(loss), **self.estimator.watch(positions, unclipped, 1.0)}

    def evaluation_loss(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the divergence at each token, as the teacher's answer tells it."""
        return self._terms(self.divergence)

    def _terms(self, divergence: Divergence) -> Mapping[str, LossTerm]:
        term = DivergenceTerm(divergence, teacher_temperature=self.teacher_temperature)
        return {self._measured: LossTerm(term)}

    @property
    def _measured(self) -> str:
        """Name of the divergence that the teacher's answer tells by itself."""
        if self.estimator is None or self.answer_kind == "full_distribution":
            return "divergence"
        return REVERSE_KL_NAMES[self.answer_kind]
