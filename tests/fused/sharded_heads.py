"""Gradients of a sharded student, beside those of one process.

A script of two ranks: ``python -m torch.distributed.run --nproc_per_node 2 sharded_heads.py OUT``.
"""

import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_kd.divergences import GeneralizedJSD
from lightning_kd.fused import DivergenceTerm
from lightning_kd.models import FusedLogits
from lightning_kd.scoring import ScoredPositions
from lightning_kd.teachers import LocalTeacher
from tests.support.toys import letter_tokenizer, ragged_batch, tiny_llama

LENGTHS = [(2, 5), (1, 3), (3, 7), (2, 1)]
CASES = list(product((True, False), ("root", "own unit"), (True, False)))
"""Tied embeddings; how the head is wrapped; whether the teacher is sharded too."""


def wrapped(model: Any, head: str, mesh: Any) -> Any:
    """Every layer a unit, and the head in the root unit or by itself."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head == "own unit" and not model.config.tie_word_embeddings:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gradients(rows: slice, tied: bool, head: str, shard_teacher: bool, mesh: Any) -> Any:
    """The student's gradient of a summed divergence over some rows, in whole tensors."""
    student = tiny_llama(0, tie_word_embeddings=tied)
    teacher = tiny_llama(1)
    if mesh is not None:
        student = wrapped(student, head, mesh)
        teacher = wrapped(teacher, head, mesh) if shard_teacher else teacher
    batch: Any = ragged_batch(LENGTHS)
    batch = {name: value[rows] for name, value in batch.items()}
    positions = ScoredPositions.from_labels(batch["labels"])
    logits, source = FusedLogits(), LocalTeacher.of(teacher)
    source.prepare(letter_tokenizer(), torch.device("cpu"), "equal")
    theirs = source.answer(batch, positions, logits_backend=logits)
    own = logits.read(student, batch, positions)
    weights = torch.ones(len(positions.targets), dtype=torch.float64)
    total, _ = logits.evaluate(own, theirs, [DivergenceTerm(GeneralizedJSD())], [weights])
    total.backward()
    found = {}
    for name, parameter in student.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def main() -> None:
    """Write the largest relative difference of each case."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    differences = {}
    for tied, head, shard_teacher in CASES:
        share = slice(rank * 2, rank * 2 + 2)
        sharded = gradients(share, tied, head, shard_teacher, mesh)
        alone = gradients(slice(0, 4), tied, head, shard_teacher, None)
        differences[tied, head, shard_teacher] = max(
            # The mean over the ranks, as of every other weight, is taken back by the base module.
            ((world * sharded[name] - exact).norm() / exact.norm()).item()
            for name, exact in alone.items()
        )
    if rank == 0:
        torch.save(differences, Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
