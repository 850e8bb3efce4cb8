"""Numbers of every callback that evaluates, and the report by document, on one process or two.

``python two_rank_likelihoods.py OUT STRATEGY TEXTS``, with ``alone``, ``ddp`` or ``fsdp2``, which also
has the teacher in shards; texts are ``sampled``, or ``given`` by an engine, of other lengths for each.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_kd import DocumentData, Engine, SupervisedKD
from lightning_kd.callbacks import BLiMP, CompletionSamples, DocumentLikelihoods, ExposureBias
from lightning_kd.evaluation import DistinctN, ExactMatch, Repetition, RougeL
from lightning_kd.generation import Completions
from lightning_kd.models import StudentSpec
from lightning_kd.strategies import FSDP2Strategy
from lightning_kd.teachers import LocalTeacher
from tests.callbacks.test_blimp import write
from tests.callbacks.test_document_likelihoods import TEXTS, TOKENIZER, student
from tests.support.harness import trainer

SPLITS = ("train", "validation", "test")


class Given(Engine):
    """Writes for a prompt what its tokens say: other texts for the student than for the teacher."""

    def generate(self, prompts: Any, options: Any, *, seeds: Any, models: Any) -> Completions:
        """Write up to ``max_new_tokens`` tokens; a shorter text ends with an EOS."""
        ((model, _),) = models
        factor = 3 if next(model.parameters()).requires_grad else 5
        texts = []
        for ids, mask in zip(prompts.ids, prompts.mask, strict=True):
            number = int(ids[mask.bool()].sum())
            length = number * factor % 9
            text = [100 + (number + factor * place) % 9 for place in range(length)]
            texts.append([*text, min(prompts.eos_ids)][: options.max_new_tokens])
        return Completions.of_tokens(
            texts, eos_ids=prompts.eos_ids, pad_id=prompts.pad_id, device=prompts.ids.device
        )


def main(out: Path, name: str, texts_are: str) -> None:
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
    engine = Given() if texts_are == "given" else None
    module = SupervisedKD(student=StudentSpec.of(student()), teacher=teacher, engine=engine)
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
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
