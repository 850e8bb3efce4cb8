"""Supervised fine-tuning."""

from collections.abc import Mapping

from lightning_kd.batch import Batch
from lightning_kd.fused import CrossEntropy
from lightning_kd.modules.distillation_module import DistillationModule
from lightning_kd.modules.loss import LossTerm, Scores
from lightning_kd.modules.texts import check_rendered_for_none


class SFT(DistillationModule):
    r"""Maximum likelihood of the completions: :math:`\ell_t = -\log q(y_t \mid y_{<t}, x)`.

    It makes teachers, the student a distillation starts from, and the baseline it is compared with.
    """

    terms = ("cross_entropy",)

    def setup(self, stage: str) -> None:
        """Refuse prompts that are rendered for a teacher.

        Raises:
            ValueError: If the data renders some.
        """
        super().setup(stage)
        check_rendered_for_none(getattr(self.trainer, "datamodule", None), type(self).__name__)

    def loss_terms(self, batch: Batch, scores: Scores) -> Mapping[str, LossTerm]:
        """Return the negative log-likelihood of each label."""
        return {"cross_entropy": LossTerm(CrossEntropy(scores.positions.targets))}
