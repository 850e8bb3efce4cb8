"""The trained student as a Hugging Face directory."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from transformers import GenerationConfig

from lightning_kd.generation import end_of_sequence_ids
from lightning_kd.models.sharding import is_sharded
from lightning_kd.modules import DistillationModule
from lightning_kd.strategies import whole_weights


class HFExport(Callback):
    """Write the student, its tokenizer and a generation config when training ends.

    ``AutoModelForCausalLM.from_pretrained`` loads the directory, and so does the next run, as
    student or teacher. Weights are safetensors; LoRA adapters are merged into the weights.

    Args:
        dirpath: Where to; ``student`` in the logger's directory when not given.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export; all ranks gather, the first one writes."""
        if not isinstance(pl_module, DistillationModule) or getattr(trainer, "fast_dev_run", False):
            return
        weights = whole_weights(trainer, pl_module.student)
        # Asked on every rank: the trainer broadcasts its answer.
        log_dir = trainer.log_dir
        if trainer.is_global_zero:
            directory = Path(self.dirpath or Path(log_dir or ".") / "student")
            write_student(pl_module, weights, directory)
            rank_zero_info(f"The student is in {directory}")
        trainer.strategy.barrier("hf_export")


def write_student(module: DistillationModule, weights: dict[str, Any], directory: Path) -> None:
    """Save model, tokenizer and generation config under ``directory``."""
    model, tokenizer = module.student, module.tokenizer
    if module.student_source.lora is not None:
        # Merging changes the weights in place, and this model may go on training; one in shards
        # cannot be copied, but it can be had again.
        if is_sharded(model):
            model = module.student_source.build(tokenizer)
        else:
            model = copy.deepcopy(model).cpu()
        model.load_state_dict(weights)
        model = model.merge_and_unload()
        weights = model.state_dict()
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(end_of_sequence_ids(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)
