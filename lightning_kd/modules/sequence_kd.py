"""Sequence-level knowledge distillation."""

from typing import Any

from transformers import PreTrainedModel

from lightning_kd.modules.sft import SFT
from lightning_kd.strategies import adapter_of
from lightning_kd.teachers import LocalTeacher


class SequenceKD(SFT):
    r"""Maximum likelihood of completions that the teacher generated.

    Two commands: ``predict`` lets the *teacher* complete the prompts and saves texts and tokens as
    JSONL; ``fit`` on that file trains the student,
    :math:`\ell_t = -\log q(\hat y_t \mid \hat y_{<t}, x)` with :math:`\hat y \sim p(\cdot \mid x)`,
    on the tokens as the teacher generated them: an end is learned only where the teacher ended.

    Args:
        teacher: Generates the completions; only ``predict`` loads it.
        base: The options of :class:`~lightning_kd.modules.DistillationModule`; ``generation`` says
            how the teacher generates (the paper: beam search of width 5).

    References:
        Kim and Rush, *Sequence-Level Knowledge Distillation*, EMNLP 2016, section 3.2.
        https://arxiv.org/abs/1606.07947
    """

    may_change_on_resume = frozenset({"teacher"})

    def __init__(self, *, teacher: LocalTeacher, **base: Any) -> None:
        super().__init__(**base)
        self.teacher = teacher

    def setup(self, stage: str) -> None:
        """Load the teacher where it generates."""
        super().setup(stage)
        if stage == "predict":
            if self.teacher.placement not in {"replicated", "sharded"}:
                raise ValueError(
                    f"placement is {self.teacher.placement!r}, but in predict nothing but the "
                    "teacher works; use replicated or sharded"
                )
            device = self.trainer.strategy.root_device
            self.teacher.prepare(
                self.tokenizer, device, "equal", adapter_of(self.trainer).shard_mesh()
            )

    @property
    def generating_model(self) -> PreTrainedModel:
        """The teacher in ``predict``, the student everywhere else."""
        return self.teacher.models[0] if self.trainer.predicting else self.student
