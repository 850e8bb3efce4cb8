"""BabyLlama: distillation from an ensemble of teachers."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_kd.batch import Batch
from lightning_kd.generation import Engine, GenerationOptions
from lightning_kd.models import LogitsBackend, StudentLike, VocabularyPolicy
from lightning_kd.modules.supervised_kd import SupervisedKD
from lightning_kd.normalization import BatchMean, Normalization
from lightning_kd.option_checks import check_choice
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import TeachersLike
from lightning_kd.tokenization import TokenizerLike

KLScale = Literal["token", "batchmean"]


class BabyLlama(SupervisedKD):
    r"""Cross-entropy and softened forward KL to the averaged logits of several teachers.

    .. math:: \ell_t = \alpha\,(-\log q(y_t)) + (1 - \alpha)\,\tau^2\,
        KL\bigl(\mathrm{softmax}(\bar u_t / \tau) \,\|\, \mathrm{softmax}(z_t / \tau)\bigr)

    with :math:`z` the student's logits and :math:`\bar u` the mean of the teachers'.

    ``kl_scale="batchmean"`` reproduces the scale of the official code, which divides the cross-entropy
    by the number of labels but the KL by the number of rows (``KLDivLoss(reduction="batchmean")`` on
    ``(B, T, V)``), and which also scores tokens that have no label, the last one of a row among them.
    Over the :math:`R` rows of an optimizer step that have a label, with :math:`T_b` real tokens and
    :math:`N` labels in all,

    .. math:: L = \alpha\,CE + (1 - \alpha)\,\tau^2\, \frac{1}{R} \sum_b \sum_{t \le T_b} KL_{b,t}

    where the ``normalization`` is that of the cross-entropy alone: :math:`\frac1N\sum` (``token``, the
    official code), the mean of the rows' means (``sequence``, the same on blocks of one length), or
    the mean of the rows' sums (``batch``). On blocks of 128 tokens the KL weighs about 128 times more
    than with ``token``, so a learning rate does not carry over. Padding, which the official code also
    scores, stays out.

    The official scale has two counts, labels and rows, and with ``token`` the ratio of both must be
    known before the first backward pass of a step. The data modules of this library tell it; with a
    loader that does not, ``accumulate_grad_batches`` above 1 is refused.

    The other options are those of :class:`~lightning_kd.modules.TeacherModule`.

    Args:
        alpha: Weight of cross-entropy against the KL, in [0, 1].
        temperature: Divides the logits of student and teachers in the KL.
        kl_scale: ``token``, or ``batchmean`` for the scale of the official code.

    Raises:
        ValueError: If a value is out of its range.

    References:
        Timiryasov and Tastet, *Baby Llama: knowledge distillation from an ensemble of teachers
        trained on a small dataset with no performance penalty*, 2023, section 3.
        https://arxiv.org/abs/2308.02019
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        temperature: float = 2.0,
        kl_scale: KLScale = "token",
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
            divergence="forward_kl",
            alpha=alpha,
            temperature=temperature,
            interpolation=None,
            position_share=1.0,
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
        check_choice("kl_scale", kl_scale, get_args(KLScale))
        self.kl_scale: KLScale = kl_scale

    def positions(self, batch: Batch) -> ScoredPositions:
        """Return the labeled positions; with the official scale, every real token."""
        if self.kl_scale == "token":
            return super().positions(batch)
        return ScoredPositions.everywhere(batch["labels"], batch["attention_mask"])

    @property
    def term_normalizations(self) -> Mapping[str, Normalization]:
        """Normalization of the KL by rows with a label, on the official scale."""
        return {"divergence": LabeledRows()} if self.kl_scale == "batchmean" else {}


class LabeledRows(BatchMean):
    """Normalization that averages the sums of the rows that have a label."""

    def row_weights(self, tokens_per_row: Tensor) -> Tensor:
        """Return 1 for a row with a label, 0 for any other."""
        return (tokens_per_row > 0).double()
