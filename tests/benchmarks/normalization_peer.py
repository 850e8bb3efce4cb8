"""What a peer's loss is divided by, beside ours: ``python -m tests.benchmarks.normalization_peer``.

Two questions to TRL's GKD trainer and to this library, on the same tiny models:

1. Every completion is written by the student, and only the *unused* reference in the data grows.
   Does the loss change?
2. The same four samples, as one batch or as several accumulated micro-batches. Does the loss change?
"""

import tempfile
import warnings
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.table import Table

from lightning_kd.models import StudentSpec
from lightning_kd.modules import SupervisedKD
from lightning_kd.teachers import LocalTeacher
from tests.support.harness import fit_one_step
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama, with_prompts

LETTERS = "abcdefghijklmnop"
ANSWERS = ["ab", "cdefgh", "i", "jklmnopabc"]
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


def peer(repeats: int, accumulation: int, lmbda: float) -> tuple[float, float]:
    """Loss and gradient norm of TRL's first step."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = letter_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [
        {
            "messages": [
                {"role": "user", "content": "abcd"[: k + 1]},
                {"role": "assistant", "content": answer * repeats},
            ]
        }
        for k, answer in enumerate(ANSWERS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GKDConfig(
            output_dir=folder,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.0,
            lmbda=lmbda,
            beta=0.5,
            max_length=512,
            max_new_tokens=8,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            seed=0,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = GKDTrainer(
            model=tiny_llama(0, max_position_embeddings=512),
            teacher_model=tiny_llama(1, max_position_embeddings=512),
            args=arguments,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows),
        )
        trainer.train()
    (first,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return first["loss"], first["grad_norm"]


def ours(repeats: int, accumulation: int) -> tuple[float, float]:
    """Loss and gradient norm of our first step, on completions of fixed tokens."""
    batch: Any = with_prompts(ragged_batch([(k + 1, len(a)) for k, a in enumerate(ANSWERS)]))
    batch["completion"] = [text * repeats for text in batch["completion"]]
    size = 4 // accumulation
    pieces = [{k: v[s : s + size] for k, v in batch.items()} for s in range(0, 4, size)]
    module = SupervisedKD(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=LocalTeacher.of(tiny_llama(1)),
        divergence="generalized_jsd",
        alpha=0.0,
    )
    loss, gradient = fit_one_step(module, pieces)
    return loss, gradient.norm().item()


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    table = Table("", "TRL GKD loss", "gradient norm", "ours: loss", "gradient norm")

    def row(name: str, theirs: tuple[float, float], own: tuple[float, float]) -> None:
        table.add_row(name, *(f"{value:.4f}" for value in (*theirs, *own)))

    for repeats in (1, 4, 16):
        name = f"unused reference x {repeats}"
        row(name, peer(repeats, 1, lmbda=1.0), ours(repeats, 1))
    table.add_section()
    for accumulation in (1, 2, 4):
        name = f"{accumulation} micro-batches of {4 // accumulation}"
        row(name, peer(1, accumulation, lmbda=0.0), ours(1, accumulation))
    Console().print(table)


if __name__ == "__main__":
    main()
