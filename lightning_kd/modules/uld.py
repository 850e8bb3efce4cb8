"""Universal logit distillation, for comparison."""

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_kd.batch import Batch
from lightning_kd.fused import AnswerKind, ChunkStartDistributions, CrossEntropy, SortedDistance
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.teacher_module import TeacherModule
from lightning_kd.normalization import Normalization
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike


class ULD(TeacherModule):
    r"""Cross-entropy, and the L1 distance of the sorted probabilities of student and teacher.

    .. math:: \ell_t = -\log q(y_t) + w \sum_k \bigl|q_{(k)} - p_{(k)}\bigr|

    with :math:`q_{(k)}` the k-th largest probability. The sum says nothing of which token has which
    probability: it is 0 for any two distributions of one shape, equal or not, and unchanged if a
    vocabulary is permuted. It is here to be compared with; to distil, take
    :class:`~lightning_kd.modules.ChunkLikelihoodKD`.

    Distributions are compared where both sides have read the same text, at the beginning of each chunk;
    at all other tokens the sum is 0. (The official code compares the n-th token of one side with the
    n-th of the other.)

    The other options are those of :class:`~lightning_kd.modules.TeacherModule`; ``vocabulary`` stays
    ``equal``.

    Args:
        weight: :math:`w`, 1.5 in the paper.

    Raises:
        ValueError: If the weight is negative; in a run, if the teacher does not tell its distributions.

    References:
        Boizard et al., *Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
        LLMs*, TMLR 2025, section 3. https://arxiv.org/abs/2402.12030
    """

    terms = ("cross_entropy", "sorted_distance")
    needs: tuple[AnswerKind, ...] = ("chunk_start_distributions",)

    def __init__(
        self,
        *,
        weight: float = 1.5,
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
        if not weight >= 0:
            raise ValueError(f"weight is {weight}; it must be 0 or more")
        self.weight = weight

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return cross-entropy at each label, and the distance where a chunk begins."""
        answer = scores.teacher
        assert isinstance(answer, ChunkStartDistributions)  # it was asked for
        return {
            "cross_entropy": LossTerm(CrossEntropy(scores.positions.targets)),
            "sorted_distance": LossTerm(SortedDistance(answer.begins), self.weight),
        }
