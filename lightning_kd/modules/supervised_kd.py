"""Supervised knowledge distillation."""

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_kd.batch import Batch
from lightning_kd.divergences import Divergence, make_divergence
from lightning_kd.fused import CrossEntropy, DivergenceTerm
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.divergence_module import DivergenceModule
from lightning_kd.modules.interpolation import Interpolation
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.normalization import Normalization
from lightning_kd.option_checks import require_positive
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike


class SupervisedKD(DivergenceModule):
    r"""Match the teacher's distribution at every token of the data's completions.

    With student :math:`q`, teacher :math:`p`, both at temperature :math:`\tau` inside the divergence:

    .. math:: \ell_t = \alpha\,(-\log q(y_t)) + (1 - \alpha)\,\tau^k D(p^\tau_t, q^\tau_t)

    The gradient of a softened divergence shrinks as :math:`1/\tau^k`; the factor keeps its size
    against the cross-entropy. :math:`k` is the divergence's
    :attr:`~lightning_kd.divergences.Divergence.order`: 2 for all but the total variation and its
    logarithm, whose is 1.

    The other options are those of :class:`~lightning_kd.modules.DivergenceModule`.

    Args:
        divergence: A registered name (``forward_kl``, ``generalized_jsd``, ...) or a
            :class:`~lightning_kd.divergences.Divergence`.
        alpha: Weight of cross-entropy against the divergence, in [0, 1].
        temperature: Divides the logits of student and teacher in the divergence. Metrics are at 1.

    Raises:
        ValueError: If ``alpha`` lies outside [0, 1], or is 1 beside an interpolation, the temperature
            is not positive or the divergence is unknown.

    References:
        Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015.
        https://arxiv.org/abs/1503.02531
    """

    terms = ("cross_entropy", "divergence")
    needs = ("full_distribution", "top_k", "top_k_and_token", "sampled")

    def __init__(
        self,
        *,
        divergence: Divergence | str = "forward_kl",
        alpha: float = 0.5,
        temperature: float = 1.0,
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
        require_positive(temperature=temperature)
        self.temperature = temperature
        self.divergence = make_divergence(divergence)
        if not 0 <= alpha <= 1:
            raise ValueError(
                f"alpha is {alpha}; it weighs cross-entropy against the divergence, in [0, 1]"
            )
        if alpha == 1 and interpolation is not None:
            raise ValueError(
                "alpha is 1, so that the divergence is not learned, and interpolation moves the target "
                "of the divergence; leave interpolation out, or give an alpha below 1"
            )
        self.alpha = alpha

    @property
    def teacher_temperatures(self) -> Mapping[str, float]:
        """Temperature of the teacher in the divergence."""
        return {"temperature": self.temperature}

    @property
    def teacher_divergences(self) -> Mapping[str, Divergence]:
        """The divergence."""
        return {"divergence": self.divergence}

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return cross-entropy with the label and divergence from the target, at each label."""
        return self._terms(scores, self.trained_divergence(self.divergence))

    def evaluation_loss(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the same with the divergence from the teacher itself."""
        return self._terms(scores, self.divergence)

    def _terms(self, scores: Scores, divergence: Divergence) -> Mapping[str, LossTerm]:
        softened = DivergenceTerm(
            divergence,
            student_temperature=self.temperature,
            teacher_temperature=self.temperature,
        )
        return {
            "cross_entropy": LossTerm(CrossEntropy(scores.positions.targets), self.alpha),
            "divergence": LossTerm(
                softened,
                (1 - self.alpha) * self.temperature**self.divergence.order,
            ),
        }
