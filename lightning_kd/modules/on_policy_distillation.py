"""On-policy distillation by policy gradient."""

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_kd.batch import Rollout
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.policy_gradient import Dropout, PolicyGradientModule
from lightning_kd.modules.reverse_kl_estimators import (
    ReverseKLEstimator,
    SampledPositions,
    SampledToken,
)
from lightning_kd.normalization import Normalization
from lightning_kd.policy import Surrogate
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike


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

    The other options are those of :class:`~lightning_kd.modules.policy_gradient.PolicyGradientModule`.

    Args:
        gamma: Discount of later tokens' rewards, in [0, 1].
        kl_coefficient: :math:`c`.
        estimator: How the reverse KL of a token is estimated: :class:`SampledToken` (the default) or
            :class:`CorrectedTopK`.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Lu and Thinking Machines Lab, *On-Policy Distillation*, 2025.
        https://thinkingmachines.ai/blog/on-policy-distillation/
    """

    terms: tuple[str, ...] = ("policy_gradient",)

    def __init__(
        self,
        *,
        gamma: float = 0.0,
        kl_coefficient: float = 1.0,
        estimator: ReverseKLEstimator | None = None,
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

    def rollout_terms(self, rollout: Rollout, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the loss of each sampled token, and what is logged of the estimator."""
        positions = SampledPositions.of(
            rollout,
            scores,
            gamma=self.gamma,
            student_temperature=self.temperature,
            teacher_temperature=self.temperature,
        )
        given = (positions, self.surrogate, self.kl_coefficient)
        loss = self.estimator.loss(*given)
        return {"policy_gradient": LossTerm(loss), **self.estimator.watch(*given)}
