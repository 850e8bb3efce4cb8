"""Numbers of every callback that evaluates, and the report by document, on one process or two.

``python two_rank_likelihoods.py OUT STRATEGY``, with ``alone``, ``ddp`` or ``fsdp2``, which also has
the teacher in shards.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_kd import DocumentData, SupervisedKD
from lightning_kd.callbacks import BLiMP, CompletionSamples, DocumentLikelihoods, ExposureBias
from lightning_kd.evaluation import DistinctN, ExactMatch, Repetition, RougeL
from lightning_kd.models import StudentSpec
from lightning_kd.strategies import FSDP2Strategy
from lightning_kd.teachers import LocalTeacher
from tests.callbacks.test_blimp import write
from tests.callbacks.test_document_likelihoods import TEXTS, TOKENIZER, student
from tests.support.harness import trainer

SPLITS = ("train", "validation", "test")


def main(out: Path, name: str) -> None:
    """Evaluate seven documents, four of which teacher and student complete, and seven pairs.

    In a validation behind a step of training, and in the test.
    """
    wait = timedelta(minutes=2)
    strategies: dict[str, Any] = {
        "alone": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo", timeout=wait),
        "fsdp2": lambda: FSDP2Strategy(process_group_backend="gloo", timeout=wait),
    }
    directory = out.parent / name
    pairs = directory / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write(pairs)
    placement = "sharded" if name == "fsdp2" else "replicated"
    teacher = LocalTeacher.of(student(1), placement=placement)
    module = SupervisedKD(student=StudentSpec.of(student()), teacher=teacher)
    texts = [*TEXTS, "two or five", "is that so"]
    data = DocumentData(
        tokenizer=TOKENIZER,
        **{split: [{"text": text * 3} for text in texts] for split in SPLITS},
        prompt_length=3,
        max_length=200,
        truncation="right",
        batch_size=2 if name == "alone" else 1,
    )
    report = directory / "documents.jsonl"
    fit = trainer(
        devices=1 if name == "alone" else 2,
        strategy=strategies[name](),
        max_steps=2,
        val_check_interval=2,
        limit_val_batches=1.0,
        num_sanity_val_steps=1,
        callbacks=[
            CompletionSamples(6, metrics=[ExactMatch(), RougeL(), DistinctN(), Repetition(1)]),
            BLiMP(str(pairs), batch_size=2),
            DocumentLikelihoods(str(report)),
            ExposureBias([2], 5, prompts=4, samples_per_prompt=2, overlap_k=3),
        ],
    )
    fit.fit(module, datamodule=data)
    numbers = {n: v.item() for n, v in fit.callback_metrics.items() if n.startswith("val/")}
    numbers |= fit.test(module, datamodule=data, verbose=False)[0]
    if fit.is_global_zero:
        documents = [json.loads(line) for line in report.read_text().splitlines()]
        torch.save({"numbers": numbers, "documents": documents}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
