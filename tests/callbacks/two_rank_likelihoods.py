"""Numbers of likelihoods, and the report by document, on one process or two.

``python two_rank_likelihoods.py OUT STRATEGY``, with ``alone`` or ``ddp``.
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
from lightning_kd.callbacks import BLiMP, DocumentLikelihoods, ExposureBias
from lightning_kd.models import StudentSpec
from tests.callbacks.test_blimp import write
from tests.callbacks.test_document_likelihoods import TEXTS, TOKENIZER, student
from tests.support.harness import trainer


def main(out: Path, name: str) -> None:
    """Evaluate seven documents, four of which have their prompts completed, and six pairs."""
    wait = timedelta(minutes=2)
    strategies: dict[str, Any] = {
        "alone": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo", timeout=wait),
    }
    directory = out.parent / name
    pairs = directory / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write(pairs)
    module = SupervisedKD(student=StudentSpec.of(student()), teacher=student(1))
    texts = [*TEXTS, "two or five", "is that so"]
    data = DocumentData(
        tokenizer=TOKENIZER,
        test=[{"text": text * 3} for text in texts],
        prompt_length=3,
        max_length=200,
        truncation="right",
        batch_size=2,
    )
    report = directory / "documents.jsonl"
    fit = trainer(
        devices=1 if name == "alone" else 2,
        strategy=strategies[name](),
        callbacks=[
            BLiMP(str(pairs), batch_size=2),
            DocumentLikelihoods(str(report)),
            ExposureBias(lengths=[2], max_new_tokens=5, prompts=4, samples_per_prompt=2),
        ],
    )
    (found,) = fit.test(module, datamodule=data, verbose=False)
    if fit.is_global_zero:
        documents = [json.loads(line) for line in report.read_text().splitlines()]
        torch.save({"numbers": found, "documents": documents}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
