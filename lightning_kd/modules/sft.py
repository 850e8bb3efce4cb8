"""Supervised fine-tuning."""

from collections.abc import Mapping

from lightning_kd.modules.base import DistillationModule
from lightning_kd.modules.loss import LossTerm
from lightning_kd.scoring import Scores, cross_entropy
from lightning_kd.types import Batch


class SFT(DistillationModule):
    r"""Maximum likelihood of the completions: :math:`\ell_t = -\log q(y_t \mid y_{<t}, x)`.

    It makes teachers, the student a distillation starts from, and the baseline it is compared with.
    """

    terms = ("cross_entropy",)

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """The negative log-likelihood of each label."""
        values = cross_entropy(scores.student_logits, scores.positions.targets)
        return {"cross_entropy": LossTerm(values)}
