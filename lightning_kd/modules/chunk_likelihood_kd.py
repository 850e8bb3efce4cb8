"""Distillation by the likelihood of chunks of text, between models of different tokenizers."""

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.divergences import Divergence, make_divergence
from lightning_kd.fused import AnswerKind, ChunkLogProbs, CrossEntropy
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.teacher_module import TeacherModule
from lightning_kd.normalization import Normalization
from lightning_kd.option_checks import require_positive
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike


class ChunkLikelihoodKD(TeacherModule):
    r"""Match how likely the teacher finds each chunk of text, whatever tokens either side reads it in.

    A chunk :math:`c` is what lies between two places where a token ends on both sides. Its likelihood
    under each side, at the temperature :math:`\tau`, is one of two events, and the rest the other:

    .. math:: p_c = e^{\frac1\tau \log p(c) - \epsilon}, \quad
        q_c = e^{\frac1\tau \log q(c) - \epsilon}, \qquad
        \ell_c = \tau\, D\bigl((p_c, 1 - p_c), (q_c, 1 - q_c)\bigr)

    where :math:`\log p(c)` is the sum over the chunk's tokens, behind the text before them. With the
    forward KL, :math:`D` is the binary cross-entropy less the teacher's entropy: the approximate
    likelihood matching (ALM) of Minixhofer et al., times :math:`\tau`, which keeps its size. With
    :math:`\tau \to \infty` it tends to :math:`s_q - s_p + s_p \log (s_p / s_q)` of the surprisals
    :math:`s_p = -\log p(c)` and :math:`s_q`. With :math:`\tau = 1` and one tokenizer on both sides it
    is the divergence over the label and one event for all other tokens, a lower bound of that over
    the vocabulary.

    The loss of a chunk stands at its last token, so that a ``normalization`` divides by tokens of the
    student. To it cross-entropy may be added: :math:`\alpha\,(-\log q(y_t)) + (1 - \alpha)\,\ell`.

    As with :class:`~lightning_kd.modules.GKD`, the callback
    :class:`~lightning_kd.callbacks.OnPolicyGeneration` has the student generate a share ``lmbda`` of
    the completions.

    The other options are those of :class:`~lightning_kd.modules.TeacherModule`; ``vocabulary`` stays
    ``equal``.

    Args:
        divergence: Of the two events: a registered name or a
            :class:`~lightning_kd.divergences.Divergence`.
        alpha: Weight of cross-entropy against the divergence, in [0, 1].
        temperature: :math:`\tau`, 100 in the paper.
        epsilon: :math:`\epsilon`, which keeps a likelihood below 1.

    Raises:
        ValueError: If ``alpha`` lies outside [0, 1], temperature or epsilon is not positive, or the
            divergence is unknown; in a run, if the teacher does not answer about chunks.

    References:
        Minixhofer, Vulic and Ponti, *Universal Cross-Tokenizer Distillation via Approximate Likelihood
        Matching*, NeurIPS 2025, section 3. https://arxiv.org/abs/2503.20083
    """

    terms = ("cross_entropy", "divergence")
    needs: tuple[AnswerKind, ...] = ("chunk_log_probs",)

    def __init__(
        self,
        *,
        divergence: Divergence | str = "forward_kl",
        alpha: float = 0.0,
        temperature: float = 100.0,
        epsilon: float = 1e-6,
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
        require_positive(temperature=temperature, epsilon=epsilon)
        if not 0 <= alpha <= 1:
            raise ValueError(
                f"alpha is {alpha}; it weighs cross-entropy against the divergence, in [0, 1]"
            )
        self.divergence = make_divergence(divergence)
        self.alpha, self.temperature, self.epsilon = alpha, temperature, epsilon

    @property
    def teacher_divergences(self) -> Mapping[str, Divergence]:
        """The divergence."""
        return {"divergence": self.divergence}

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return cross-entropy at each label, and the divergence of each chunk at its last token."""
        answer = scores.teacher
        assert isinstance(answer, ChunkLogProbs)  # it was asked for
        label = CrossEntropy(scores.positions.targets)
        (nats,) = self.logits_backend.per_token(scores.student, None, [label])
        own, theirs = answer.sums(-nats.double()), answer.log_probs.double()
        of_chunks = self.temperature * self.divergence(self._events(own), self._events(theirs))
        return {
            "cross_entropy": LossTerm(label, self.alpha),
            "divergence": LossTerm(answer.at_ends(of_chunks).to(nats.dtype), 1 - self.alpha),
        }

    def _events(self, log_likelihoods: Tensor) -> Tensor:
        """Return the log-probabilities of each chunk and of the rest, ``(C,) -> (C, 2)``."""
        chunk = log_likelihoods / self.temperature - self.epsilon
        # Near 1, one minus the exponential would be round-off.
        return torch.stack([chunk, (-chunk.expm1()).log()], -1)
