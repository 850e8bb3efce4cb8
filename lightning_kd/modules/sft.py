"""Supervised fine-tuning."""

from collections.abc import Mapping

from lightning_kd.batch import Batch
from lightning_kd.fused import CrossEntropy
from lightning_kd.modules.distillation_module import DistillationModule
from lightning_kd.modules.loss import LossTerm, Scores


class SFT(DistillationModule):
    r"""Maximum likelihood of the completions: :math:`\ell_t = -\log q(y_t \mid y_{<t}, x)`.

    It makes teachers, the student a distillation starts from, and the baseline it is compared with.
    """

    terms = ("cross_entropy",)

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the negative log-likelihood of each label."""
        return {"cross_entropy": LossTerm(CrossEntropy(scores.positions.targets))}
