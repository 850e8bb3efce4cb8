"""Whole GKD steps beside a peer: ``python -m tests.benchmarks.gkd_step_peer``.

TRL's ``GKDTrainer`` and ours: the same student and teacher (random Llamas), the same batch, prompts and
completion lengths, every batch written by the student, AdamW; a step as one batch and as four
micro-batches. By default the peer checkpoints activations and writes without a cache. In turn, in one
process, several rounds; the time of a step is that between two optimizer steps, without the first. The
peak of memory beyond the two models is measured in a process of its own for each. With ``--cuda`` all
of it is done on a GPU, in bfloat16, with models of half a billion parameters and of one and a half.
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
from dataclasses import dataclass
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

ROUNDS, STEPS = 3, 5
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Size:
    """What a step is of.

    Attributes:
        vocabulary: Tokens of both models.
        rows: Rows of an optimizer step.
        prompt: Tokens of each prompt.
        new: Tokens of each completion.
        student: Width, width inside of the layers, and layers.
        teacher: The same.
        heads: Attention heads of both.
        is_cuda: Whether it is done on a GPU, in bfloat16.
    """

    vocabulary: int
    rows: int = 8
    prompt: int = 16
    new: int = 64
    student: tuple[int, int, int] = (256, 512, 4)
    teacher: tuple[int, int, int] = (512, 1024, 4)
    heads: int = 4
    is_cuda: bool = False


def on_gpu(vocabulary: int) -> Size:
    """Half a billion parameters and one and a half, beside their embeddings."""
    return Size(vocabulary, 16, 256, 256, (1024, 4096, 28), (2048, 6144, 28), 16, True)


def llama(seed: int, size: Size, shape: tuple[int, int, int]) -> LlamaForCausalLM:
    """A random model; an end is as likely as any other token."""
    torch.manual_seed(seed)
    width, inner, layers = shape
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        max_position_embeddings=1024,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16 if size.is_cuda else torch.float32)


def prompt(row: int, size: Size) -> str:
    """Letters, always as many."""
    return "".join(LETTERS[(row * 7 + k * k) % len(LETTERS)] for k in range(size.prompt))


class Prompts(DistillationData):
    """The prompts, with a reference that nobody reads."""

    def __init__(self, accumulation: int, size: Size) -> None:
        super().__init__(tokenizer=letter_tokenizer(), batch_size=size.rows // accumulation)
        self.size = size

    def rows(self, split: str) -> "Prompts":
        """Itself."""
        return self

    def __len__(self) -> int:
        """Rows of one run."""
        return self.size.rows * STEPS

    def example(self, row: int, pass_: int) -> Example:
        """A prompt and one token."""
        text = prompt(row, self.size)
        ids = self.tokenizer(text)["input_ids"]
        return Example([*ids, 1], len(ids), text, "")


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


def ours(accumulation: int, size: Size, logits: LogitsBackend | None = None) -> list[float]:
    """Seconds per step of this library."""
    clock = Clock()
    generation = OnPolicyGeneration(
        generation=SamplingOptions(max_new_tokens=size.new), table_every=0, truncated="keep"
    )
    module = GKD(
        student=StudentSpec.of(llama(0, size, size.student)),
        teacher=LocalTeacher.of(llama(1, size, size.teacher)),
        logits_backend=logits,
    )
    # As often as both log by default: not once in so short a run.
    fit = trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=accumulation,
        callbacks=[generation, clock],
        log_every_n_steps=50,
        accelerator="gpu" if size.is_cuda else "cpu",
        precision="bf16-true" if size.is_cuda else "32-true",
    )
    watch_memory()
    fit.fit(module, datamodule=Prompts(accumulation, size))
    return gaps(clock.times)


def peer(accumulation: int, size: Size, *, gradient_checkpointing: bool) -> list[float]:
    """Seconds per step of TRL."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = letter_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [
        {
            "messages": [
                {"role": "user", "content": prompt(k, size)},
                {"role": "assistant", "content": "a"},
            ]
        }
        for k in range(size.rows * STEPS)
    ]
    clock = PeerClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            per_device_train_batch_size=size.rows // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            lmbda=1.0,
            beta=0.5,
            temperature=1.0,
            max_length=size.prompt + size.new,
            max_new_tokens=size.new,
            gradient_checkpointing=gradient_checkpointing,
            report_to=[],
            use_cpu=not size.is_cuda,
            save_strategy="no",
            disable_tqdm=True,
            bf16=size.is_cuda,
        )
        trainer = GKDTrainer(
            model=llama(0, size, size.student),
            teacher_model=llama(1, size, size.teacher),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        watch_memory()
        trainer.train()
    return gaps(clock.times)


METHODS: dict[str, Callable[[int, Size], list[float]]] = {
    "ours": ours,
    "ours, DenseLogits": partial(ours, logits=DenseLogits()),
    "TRL": partial(peer, gradient_checkpointing=False),
    "TRL, its defaults": partial(peer, gradient_checkpointing=True),
}
_before = 0.0


def watch_memory() -> None:
    """From here on the peak counts."""
    global _before
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    _before = megabytes("VmRSS")


def peak(size: Size) -> float:
    """Megabytes since then; on a GPU with the models."""
    if size.is_cuda:
        return torch.cuda.max_memory_allocated() / 1e6
    return megabytes("VmHWM") - _before


def megabytes(field: str) -> float:
    """What Linux says of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise OSError(f"/proc/self/status has no {field}: peaks are measured on Linux")


def peak_apart(name: str, accumulation: int, size: Size) -> float:
    """Megabytes beyond the models, in a process of its own; on a GPU with the models."""
    numbers = [str(accumulation), str(size.vocabulary)]
    command = [sys.executable, "-m", "tests.benchmarks.gkd_step_peer", "--peak", name, *numbers]
    command += ["--cuda"] if size.is_cuda else []
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
    parser.add_argument("--cuda", action="store_true", help="on a GPU, with larger models")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sized = on_gpu if arguments.cuda else Size
    if arguments.peak:
        name, accumulation, vocabulary = arguments.peak
        METHODS[name](int(accumulation), sized(int(vocabulary)))
        print(peak(sized(int(vocabulary))))
        return
    table = Table("vocabulary", "micro-batches", "", "seconds per step", "times ours", "peak MB")
    for vocabulary, accumulation in itertools.product(arguments.vocabulary, arguments.accumulation):
        size = sized(vocabulary)
        measured: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(arguments.rounds):
            for name, method in METHODS.items():
                measured[name] += method(accumulation, size)
        for name, seconds in measured.items():
            ratio = median(seconds) / median(measured["ours"])
            cells = [f"{median(seconds):.3f}", f"{ratio:.2f}"]
            cells += [f"{peak_apart(name, accumulation, size):.0f}"]
            table.add_row(f"{vocabulary:,}", str(accumulation), name, *cells)
    Console(width=100).print(table)
    Console().print(f"{size.rows} rows, {size.prompt} + {size.new} tokens")


if __name__ == "__main__":
    main()
