"""One process and two, and what their checkpoints hold: ``python -m tests.benchmarks.scaling``.

GKD from its config, every window written by the student, one thread for each process; the batch of a
process stays the same, so two do twice the work. The teacher is eight times as large as the student:
were it in a checkpoint, its size would show it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_kd.data import arithmetic_tokenizer

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "gkd.yaml"
STEPS = 30
RUNS = [("one process", "auto", 1), ("ddp", "ddp", 2), ("fsdp2", "fsdp2", 2)]


def llama(width: int, layers: int) -> dict[str, Any]:
    """A configuration."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }


def run(strategy: str, devices: int, folder: Path) -> tuple[float, int]:
    """Tokens per second over all processes, and bytes of the checkpoint."""
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "every_n_train_steps": STEPS,
            "save_last": True,
            "dirpath": str(folder / "c"),
        },
    }
    command: list[Any] = [sys.executable, "-m", "lightning_kd", "fit", "--config", CONFIG]
    command += ["--model.student.config", json.dumps(llama(128, 3))]
    command += ["--model.teacher.name_or_path", folder.parent / "teacher"]
    command += ["--trainer.strategy", strategy, "--trainer.devices", devices]
    command += ["--trainer.max_steps", STEPS, "--trainer.callbacks", json.dumps([checkpoint])]
    command += ["--trainer.log_every_n_steps", 5, "--trainer.limit_val_batches", 0]
    command += ["--trainer.val_check_interval", STEPS, "--trainer.logger.save_dir", folder / "runs"]
    command += ["--trainer.accelerator", "cpu", "--on_policy.lmbda", 1, "--data.batch_size", 64]
    command += ["--trainer.enable_progress_bar", "false", "--export.dirpath", folder / "student"]
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [str(part) for part in command],
        env=os.environ | threads,
        check=True,
        capture_output=True,
    )
    seen = EventAccumulator(str(next((folder / "runs").glob("version_*"))))
    seen.Reload()
    speeds = [event.value for event in seen.Scalars("train/tokens_per_second")]
    return median(speeds[1:]), (folder / "c" / "last.ckpt").stat().st_size


def main() -> None:
    """Run them one after the other, and print a table."""
    with tempfile.TemporaryDirectory() as scratch:
        fields = {k: v for k, v in llama(256, 6).items() if k != "model_type"}
        teacher = LlamaForCausalLM(LlamaConfig(vocab_size=14, eos_token_id=1, **fields))
        teacher.save_pretrained(Path(scratch) / "teacher")
        arithmetic_tokenizer().save_pretrained(Path(scratch) / "teacher")
        weights = (Path(scratch) / "teacher" / "model.safetensors").stat().st_size
        table = Table("", "tokens per second", "of one process", "checkpoint MB", "teacher MB")
        alone = 0.0
        for name, strategy, devices in RUNS:
            speed, size = run(strategy, devices, Path(scratch) / strategy)
            alone = alone or speed
            sizes = f"{size / 1e6:.2f}", f"{weights / 1e6:.2f}"
            table.add_row(name, f"{speed:.0f}", f"{speed / alone:.2f}", *sizes)
    Console().print(table)


if __name__ == "__main__":
    main()
