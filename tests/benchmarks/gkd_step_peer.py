"""Whole GKD steps beside a peer: ``python -m tests.benchmarks.gkd_step_peer``.

TRL's ``GKDTrainer`` and ours: the same student and teacher (random Llamas), the same batch, prompts and
completion lengths, every batch written by the student, AdamW; a step as one batch and as four
micro-batches. By default the peer checkpoints activations and writes without a cache. In turn, in one
process, several rounds; the time of a step is that between two optimizer steps, without the first.
"""

import itertools
import logging
import tempfile
import time
import warnings
from statistics import median
from typing import Any

import datasets
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from lightning_kd.callbacks import OnPolicyGeneration
from lightning_kd.data import DistillationData, Example
from lightning_kd.generation import SamplingOptions
from lightning_kd.models import SingleTeacher, Student
from lightning_kd.modules import GKD
from tests.modules.harness import trainer
from tests.toys import LETTERS, letter_tokenizer

ROUNDS, STEPS, ROWS, PROMPT, NEW, VOCABULARY = 3, 5, 8, 16, 64, 8_000
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def llama(seed: int, width: int) -> LlamaForCausalLM:
    """A random model; an end is as likely as any other token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def prompt(row: int) -> str:
    """Letters, always as many."""
    return "".join(LETTERS[(row * 7 + k * k) % len(LETTERS)] for k in range(PROMPT))


class Prompts(DistillationData):
    """The prompts, with a reference that nobody reads."""

    def __init__(self, accumulation: int) -> None:
        super().__init__(tokenizer=letter_tokenizer(), batch_size=ROWS // accumulation)

    def rows(self, split: str) -> "Prompts":
        """Itself."""
        return self

    def __len__(self) -> int:
        """Rows of one run."""
        return ROWS * STEPS

    def example(self, row: int, pass_: int) -> Example:
        """A prompt and one token."""
        ids = self.tokenizer(prompt(row))["input_ids"]
        return Example([*ids, 1], len(ids), prompt(row), "")


class Clock(Callback):
    """When each optimizer step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Note the time, where the optimizer has stepped."""
        if trainer.global_step > len(self.times):
            self.times.append(time.perf_counter())


class PeerClock(TrainerCallback):
    """The same for transformers."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def gaps(times: list[float]) -> list[float]:
    """Seconds of every step but the first."""
    return [b - a for a, b in itertools.pairwise(times)]


def ours(accumulation: int) -> list[float]:
    """Seconds per step of this library."""
    clock = Clock()
    generation = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=NEW), table_every=0, truncated="keep"
    )
    module = GKD(student=Student.of(llama(0, 256)), teacher=SingleTeacher.of(llama(1, 512)))
    # As often as both log by default: not once in so short a run.
    fit = trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=accumulation,
        callbacks=[generation, clock],
        log_every_n_steps=50,
    )
    fit.fit(module, datamodule=Prompts(accumulation))
    return gaps(clock.times)


def peer(accumulation: int, gradient_checkpointing: bool) -> list[float]:
    """Seconds per step of TRL."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = letter_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [
        {
            "messages": [
                {"role": "user", "content": prompt(k)},
                {"role": "assistant", "content": "a"},
            ]
        }
        for k in range(ROWS * STEPS)
    ]
    clock = PeerClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            lmbda=1.0,
            beta=0.5,
            temperature=1.0,
            max_length=256,
            max_new_tokens=NEW,
            gradient_checkpointing=gradient_checkpointing,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
        )
        GKDTrainer(
            model=llama(0, 256),
            teacher_model=llama(1, 512),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        ).train()
    return gaps(clock.times)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    table = Table("micro-batches", "", "seconds per step", "times ours")
    for accumulation in (1, 4):
        measured: dict[str, list[float]] = {"ours": [], "TRL": [], "TRL, its defaults": []}
        for _ in range(ROUNDS):
            measured["ours"] += ours(accumulation)
            measured["TRL"] += peer(accumulation, gradient_checkpointing=False)
            measured["TRL, its defaults"] += peer(accumulation, gradient_checkpointing=True)
        for name, seconds in measured.items():
            ratio = median(seconds) / median(measured["ours"])
            table.add_row(str(accumulation), name, f"{median(seconds):.3f}", f"{ratio:.2f}")
    Console().print(table)
    Console().print(f"{ROWS} rows, {PROMPT} + {NEW} tokens, vocabulary {VOCABULARY:,}, float32")


if __name__ == "__main__":
    main()
