"""Two processes of which one has a row that its teacher cannot read: ``python two_ranks.py OUT``."""

import os
import sys
from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_kd.models import StudentSpec
from lightning_kd.modules import ChunkLikelihoodKD
from lightning_kd.teachers import LocalTeacher, RetokenizingTeacher
from tests.support.harness import BatchList, trainer
from tests.support.toys import fused_letter_tokenizer, ragged_batch, tiny_llama

RANK = int(os.environ.get("LOCAL_RANK", "0"))
POSITIONS = 6

if __name__ == "__main__":
    tokenizer = fused_letter_tokenizer()
    short = LocalTeacher.of(tiny_llama(1, max_position_embeddings=POSITIONS))
    module = ChunkLikelihoodKD(
        student=StudentSpec.of(tiny_llama(0)),
        teacher=RetokenizingTeacher(short, tokenizer=tokenizer),
        tokenizer=tokenizer,
    )
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=2))
    run = trainer(devices=2, strategy=strategy, max_steps=2)
    batches = [ragged_batch([(2, 3)]), ragged_batch([(2, 3 + 5 * RANK)])]
    message = ""
    try:
        run.fit(module, datamodule=BatchList(batches))
    except ValueError as error:
        message = str(error)
    if RANK == 0:
        torch.save({"message": message, "step": run.global_step}, sys.argv[1])
