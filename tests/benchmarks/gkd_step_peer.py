"""Whole GKD steps beside a peer: ``python -m tests.benchmarks.gkd_step_peer``.

TRL's ``GKDTrainer`` and ours: the same student and teacher (random Llamas), the same batch, prompts and
completion lengths, every batch written by the student, AdamW; a step as one batch and as four
micro-batches. By default the peer checkpoints activations and writes without a cache. In turn, in one
process, several rounds; the time of a step is that between two optimizer steps, without the first. The
peak of memory beyond the two models is measured in a process of its own for each.
"""

import argparse
import itertools
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
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
from lightning_kd.models import DenseLogits, LogitsBackend, StudentSpec
from lightning_kd.modules import GKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import trainer
from tests.support.toys import LETTERS, letter_tokenizer

ROUNDS, STEPS, ROWS, PROMPT, NEW = 3, 5, 8, 16, 64
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def llama(seed: int, width: int, vocabulary: int) -> LlamaForCausalLM:
    """A random model; an end is as likely as any other token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
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


def ours(accumulation: int, vocabulary: int, logits: LogitsBackend | None = None) -> list[float]:
    """Seconds per step of this library."""
    clock = Clock()
    generation = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=NEW), table_every=0, truncated="keep"
    )
    module = GKD(
        student=StudentSpec.of(llama(0, 256, vocabulary)),
        teacher=LocalTeacher.of(llama(1, 512, vocabulary)),
        logits_backend=logits,
    )
    # As often as both log by default: not once in so short a run.
    fit = trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=accumulation,
        callbacks=[generation, clock],
        log_every_n_steps=50,
    )
    watch_memory()
    fit.fit(module, datamodule=Prompts(accumulation))
    return gaps(clock.times)


def peer(accumulation: int, vocabulary: int, *, gradient_checkpointing: bool) -> list[float]:
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
        trainer = GKDTrainer(
            model=llama(0, 256, vocabulary),
            teacher_model=llama(1, 512, vocabulary),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        watch_memory()
        trainer.train()
    return gaps(clock.times)


METHODS: dict[str, Callable[[int, int], list[float]]] = {
    "ours": ours,
    "ours, DenseLogits": partial(ours, logits=DenseLogits()),
    "TRL": partial(peer, gradient_checkpointing=False),
    "TRL, its defaults": partial(peer, gradient_checkpointing=True),
}
_before = 0.0


def watch_memory() -> None:
    """From here on the peak counts."""
    global _before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    _before = megabytes("VmRSS")


def megabytes(field: str) -> float:
    """What Linux says of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise OSError(f"/proc/self/status has no {field}: peaks are measured on Linux")


def peak_apart(name: str, accumulation: int, vocabulary: int) -> float:
    """Megabytes beyond the models, in a process of its own."""
    numbers = [str(accumulation), str(vocabulary)]
    command = [sys.executable, "-m", "tests.benchmarks.gkd_step_peer", "--peak", name, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8_000, 32_000, 151_936])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, accumulation, vocabulary = arguments.peak
        METHODS[name](int(accumulation), int(vocabulary))
        print(megabytes("VmHWM") - _before)
        return
    table = Table("vocabulary", "micro-batches", "", "seconds per step", "times ours", "peak MB")
    for vocabulary, accumulation in itertools.product(arguments.vocabulary, arguments.accumulation):
        measured: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(arguments.rounds):
            for name, method in METHODS.items():
                measured[name] += method(accumulation, vocabulary)
        for name, seconds in measured.items():
            ratio = median(seconds) / median(measured["ours"])
            peak = peak_apart(name, accumulation, vocabulary)
            cells = [f"{median(seconds):.3f}", f"{ratio:.2f}", f"{peak:.0f}"]
            table.add_row(f"{vocabulary:,}", str(accumulation), name, *cells)
    Console(width=100).print(table)
    Console().print(f"{ROWS} rows, {PROMPT} + {NEW} tokens, float32")


if __name__ == "__main__":
    main()
