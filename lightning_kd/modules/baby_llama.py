"""BabyLlama: distillation from an ensemble of teachers."""

from typing import Any, Literal, get_args

from torch import Tensor

from lightning_kd.modules.kd import SupervisedKD
from lightning_kd.scoring import ScoredPositions
from lightning_kd.types import Batch

KLScale = Literal["token", "batchmean"]


class BabyLlama(SupervisedKD):
    r"""Cross-entropy and softened forward KL to the averaged logits of several teachers.

    .. math:: \ell_t = \alpha\,(-\log q(y_t)) + (1 - \alpha)\,\tau^2\,
        KL\bigl(\mathrm{softmax}(\bar u_t / \tau) \,\|\, \mathrm{softmax}(z_t / \tau)\bigr)

    with :math:`z` the student's logits and :math:`\bar u` the mean of the teachers'.

    ``kl_scale="batchmean"`` reproduces the official code, which divides the cross-entropy by the
    number of labels but the KL by the number of rows (``KLDivLoss(reduction="batchmean")`` on
    ``(B, T, V)``), and which also scores the last token of a row, which has no label. The KL of a row
    is then a sum over its tokens: on blocks of 128 tokens it weighs about 128 times more than with
    ``token``, so a learning rate does not carry over. Padding, which the official code also scores,
    stays out.

    Args:
        alpha: Weight of cross-entropy against the KL, in [0, 1].
        temperature: Divides the logits of student and teachers in the KL.
        kl_scale: ``token``, or ``batchmean`` for the scale of the official code.
        base: The options of :class:`~lightning_kd.modules.TeacherModule`.

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
        **base: Any,
    ) -> None:
        super().__init__(divergence="forward_kl", alpha=alpha, temperature=temperature, **base)
        if kl_scale not in get_args(KLScale):
            raise ValueError(f"unknown kl_scale {kl_scale!r}; choose one of {get_args(KLScale)}")
        self.kl_scale: KLScale = kl_scale

    def positions(self, batch: Batch) -> ScoredPositions:
        """The labeled positions; every real token where the official scale is asked for."""
        if self.kl_scale == "token":
            return super().positions(batch)
        return ScoredPositions.everywhere(batch["labels"], batch["attention_mask"])

    def row_scale(self, positions: ScoredPositions) -> Tensor | None:
        """For ``batchmean``, a row's labels, which turns its mean over tokens into a sum."""
        return None if self.kl_scale == "token" else positions.tokens_per_row
