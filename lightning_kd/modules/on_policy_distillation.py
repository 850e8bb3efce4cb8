"""On-policy distillation by policy gradient."""

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn

from lightning_kd.batch import Rollout
from lightning_kd.fused import TeacherAnswer
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.answer_checks import check_temperatures
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.policy_gradient import Dropout, PolicyGradientModule
from lightning_kd.modules.reverse_kl_estimators import (
    ReverseKLEstimator,
    SampledPositions,
    SampledToken,
)
from lightning_kd.normalization import Normalization
from lightning_kd.policy import Surrogate
from lightning_kd.teachers import Teacher, TeachersLike
from lightning_kd.teachers.ensemble import teacher_of
from lightning_kd.tokenization import TokenizerLike

_EXTRAPOLATION = 1.25
"""Of the paper."""

_EVALUATING = (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING)


class OnPolicyDistillation(PolicyGradientModule):
    r"""A policy gradient whose reward, at each sampled token, is minus its reverse KL.

    .. math:: A_t = -c \sum_{k \ge t} \gamma^{k-t}
        \bigl[\log q(y_k \mid y_{<k}) - \log p(y_k \mid y_{<k})\bigr]
        \qquad \ell_t = -\rho_t A_t, \quad \rho_t = q_\theta(y_t) / \tilde p(y_t)

    with :math:`q` the student as it was when the completion was sampled, at the training
    temperature, and :math:`\tilde p` what the tokens were drawn from: :math:`q` itself, or its
    mixture with the teacher where the callback has a ``mixture_alpha``. With ``passes`` or
    ``steps_per_window`` above 1 the current student :math:`q_\theta` moves on; the ratio follows it,
    the rewards stay those of :math:`q`.

    On fresh rollouts without a mixture the expected gradient is, with :math:`\gamma = 0`, that of
    the summed reverse KL of the tokens, and with :math:`\gamma = 1` that of the reverse KL between
    sequences. With a mixture, each token is weighed exactly; how often a prefix is reached is left
    to the mixture. The advantage is neither centered nor whitened, as in the reference; the
    ``batch`` normalization is the sum per sequence that these identities are about.

    That is the ``estimator`` :class:`SampledToken`. :class:`CorrectedTopK` has the same expected
    gradient and a lower variance: it computes the reverse KL over the teacher's k tokens and
    their tail, and leaves to the sampled token what the tail hides alone. The full-vocabulary reverse
    KL, from a teacher in the process, has a still lower one: that is :class:`GKD` with
    ``divergence: ReverseKL`` and ``lmbda: 1``, for :math:`\gamma = 0`.

    With a ``reference`` :math:`p_0`, such as what the teacher was trained from, the teacher is
    extrapolated (ExOPD). The reward of a token is
    :math:`\lambda \log (p / p_0) - \log (q / p_0)`: above :math:`\lambda = 1` the student goes further
    in the direction in which the teacher has gone from the reference, and at 1 the reference is of no
    effect. Validation measures the reverse KL from the teacher itself.

    The other options are those of :class:`~lightning_kd.modules.policy_gradient.PolicyGradientModule`.

    Args:
        gamma: Discount of later tokens' rewards, in [0, 1].
        kl_coefficient: :math:`c`.
        estimator: How the reverse KL of a token is estimated: :class:`SampledToken` (the default) or
            :class:`CorrectedTopK`.
        reference: A model, or any other :class:`~lightning_kd.teachers.Teacher`, from which the teacher
            is extrapolated; asked in training alone.
        extrapolation: :math:`\lambda`, with a reference, above 0. Defaults to 1.25.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Lu and Thinking Machines Lab, *On-Policy Distillation*, 2025.
        https://thinkingmachines.ai/blog/on-policy-distillation/; Yang et al., *Learning beyond Teacher:
        Generalized On-Policy Distillation with Reward Extrapolation*, 2026. https://arxiv.org/abs/2602.12125
    """

    terms: tuple[str, ...] = ("policy_gradient",)

    def __init__(
        self,
        *,
        gamma: float = 0.0,
        kl_coefficient: float = 1.0,
        estimator: ReverseKLEstimator | None = None,
        reference: TeachersLike | None = None,
        extrapolation: float | None = None,
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
            temperature=temperature,
            surrogate=surrogate,
            dropout=dropout,
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
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}; it is a discount, in [0, 1]")
        if not kl_coefficient > 0:
            raise ValueError(f"kl_coefficient is {kl_coefficient}; it must be positive")
        self.gamma, self.kl_coefficient = gamma, kl_coefficient
        self.estimator = estimator or SampledToken()
        self.needs = self.estimator.needs
        self.terms = (*self.terms, *self.estimator.watched)
        self.reference = None if reference is None else teacher_of(reference)
        self.extrapolation = _EXTRAPOLATION if extrapolation is None else extrapolation
        self._check_reference(extrapolation)

    def _check_reference(self, given: float | None) -> None:
        if self.reference is None:
            if given is not None:
                raise ValueError(
                    f"extrapolation is {given}, and there is no reference to extrapolate from; give "
                    "one, or leave extrapolation out"
                )
            return
        if self.teacher.has_own_tokens or self.reference.has_own_tokens:
            raise ValueError(
                "reference extrapolates the teacher token by token, and one of the two has tokens of "
                "its own; leave reference out, or give both with the student's tokenizer"
            )
        if not self.extrapolation > 0:
            raise ValueError(f"extrapolation is {self.extrapolation}; it must be positive")
        if not isinstance(self.estimator, SampledToken):
            raise ValueError(
                f"estimator: {type(self.estimator).__name__} computes the reverse KL from the teacher "
                "over several tokens, and with a reference the reward is of the sampled token alone; "
                "leave estimator out, or reference"
            )

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """The teacher, and the reference where a run trains."""
        evaluates = self._trainer is not None and self.trainer.state.fn in _EVALUATING
        if self.reference is None or evaluates:
            return super().teachers
        return {**super().teachers, "reference": self.reference}

    def check_answers(self) -> None:
        """Refuse a teacher, or a reference, that does not tell what is computed."""
        super().check_answers()
        for teacher in list(self.teachers.values())[1:]:
            kind = self.kind_from(teacher)
            check_temperatures(teacher, kind, self.teacher_temperatures)

    def compare_vocabularies(self) -> None:
        """Compare those of the reference too.

        Raises:
            ValueError: If they cannot be compared.
        """
        super().compare_vocabularies()
        for teacher in list(self.teachers.values())[1:]:
            known = teacher.vocabulary_size
            # Only from all probabilities can those of fewer tokens be renormalized.
            cut = self.vocabulary == "shared" and self.kind_from(teacher) == "full_distribution"
            if known < self.width or (known > self.width and not cut):
                raise ValueError(
                    f"the reference has {known} tokens, and {self.width} of the student and the "
                    "teacher are compared; give one with the teacher's vocabulary"
                )

    def rollout_terms(self, rollout: Rollout, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the loss of each sampled token, and what is logged of the estimator."""
        positions = SampledPositions.of(
            rollout,
            scores,
            gamma=self.gamma,
            student_temperature=self.temperature,
            teacher_temperature=self.temperature,
            reference=self._reference_answer(rollout, scores),
            extrapolation=self.extrapolation,
        )
        given = (positions, self.surrogate, self.kl_coefficient)
        loss = self.estimator.loss(*given)
        return {"policy_gradient": LossTerm(loss), **self.estimator.watch(*given)}

    def _reference_answer(self, rollout: Rollout, scores: Scores) -> TeacherAnswer | None:
        if self.reference is None:
            return None
        return self.answer_of(self.reference, rollout, scores.positions).narrowed(self.width)
