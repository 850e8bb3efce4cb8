"""Sequence-level knowledge distillation."""

from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.generation import Completions, Engine, GenerationOptions, check_completions
from lightning_kd.models import LogitsBackend, StudentLike
from lightning_kd.modules.sft import SFT
from lightning_kd.normalization import Normalization
from lightning_kd.strategies import adapter_of
from lightning_kd.teachers import (
    TEACHERS,
    TeachersLike,
    check_ability,
)
from lightning_kd.teachers.ensemble import teacher_of
from lightning_kd.tokenization import TokenizerLike


class SequenceKD(SFT):
    r"""Maximum likelihood of completions that the teacher generated.

    Two commands: ``predict`` lets the *teacher* complete the prompts and saves texts and tokens as
    JSONL; ``fit`` on that file trains the student with the
    loss :math:`\ell_t = -\log q(\hat y_t \mid \hat y_{<t}, x)` on the tokens as the teacher generated
    them, :math:`\hat y \sim p(\cdot \mid x)`: an end is learned only where the teacher ended.

    The other options are those of :class:`~lightning_kd.modules.DistillationModule`; ``generation``
    says how the teacher generates (the paper: beam search of width 5).

    Args:
        teacher: Generates the completions; only ``predict`` loads it.

    References:
        Kim and Rush, *Sequence-Level Knowledge Distillation*, EMNLP 2016, section 3.2.
        https://arxiv.org/abs/1606.07947
    """

    may_change_on_resume = frozenset({"teacher"})

    def __init__(
        self,
        *,
        teacher: TeachersLike,
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
            student=student,
            tokenizer=tokenizer,
            normalization=normalization,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            logits_backend=logits_backend,
            generation=generation,
            engine=engine,
        )
        self.teacher = teacher_of(teacher)

    def setup(self, stage: str) -> None:
        """Load the teacher where it generates.

        Raises:
            ValueError: If it cannot generate, or not with this engine.
        """
        super().setup(stage)
        if stage == "predict" and self.loads_teacher:
            check_ability(self.teacher, "generation", "SequenceKD's predict", TEACHERS)
            device = self.trainer.strategy.root_device
            self.teacher.prepare(
                self.tokenizer, device, "equal", adapter_of(self.trainer).shard_mesh()
            )
            # A server's teacher is known from here on.
            self.teacher.check_generation(self.engine)

    @property
    def generating_models(self) -> Mapping[str, PreTrainedModel]:
        """The teacher's in ``predict``, the student everywhere else."""
        return self.teacher.local_models if self.trainer.predicting else super().generating_models

    def generate(
        self, prompt_ids: Tensor, prompt_mask: Tensor, options: GenerationOptions, seeds: list[int]
    ) -> Completions:
        """Complete prompts with the teacher in ``predict``."""
        if not self.trainer.predicting:
            return super().generate(prompt_ids, prompt_mask, options, seeds)
        # A model's logits may be padded beyond the tokenizer's ids, which the rows are read back with.
        known = min(self.teacher.vocabulary_size, max(self.tokenizer.get_vocab().values()) + 1)
        completions = self.teacher.generate(
            self.tokenizer,
            prompt_ids,
            prompt_mask,
            options,
            seeds=seeds,
            engine=self.engine,
            width=known,
        )
        name = f"generate of {type(self.teacher).__name__}"
        return check_completions(
            name,
            completions,
            len(prompt_ids),
            options,
            eos_ids={self.tokenizer.eos_token_id},
            other_ends=True,
            width=known,
        )
