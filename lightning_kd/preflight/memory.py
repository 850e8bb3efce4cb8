"""Memory that a run will take, from models without weights."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_kd.fused.chunked_pass import chunk_size, default_chunk_bytes, part_size
from lightning_kd.generation import (
    CachedSampler,
    ContinuousBatchingSampler,
    TransformersContinuousBatching,
    TransformersEngine,
)
from lightning_kd.generation.cache import allocated_length, longest_allocation
from lightning_kd.generation.transformers_batching import paged_length
from lightning_kd.models import FusedLogits, ModelSpec, vocabulary_size
from lightning_kd.models.adapters import has_adapters
from lightning_kd.modules import DistillationModule, TeacherModule
from lightning_kd.preflight.cache_sizes import cache_bytes, kept_types
from lightning_kd.preflight.facts import MemoryFacts, MemoryPart, RowFacts
from lightning_kd.preflight.optimizer_states import optimizer_bytes
from lightning_kd.preflight.setting import Setting

_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
"""Type of a student's numbers, where the precision converts it."""

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Type that autocast computes in."""

_TEMPORARIES = {False: 3, True: 8}
"""Tensors of the size of a part of a chunk that arithmetic takes, without and with a teacher. Some
divergences take more."""


@dataclass(frozen=True)
class SizedModel:
    """A model whose weights need not be there, and the spec that it is of."""

    role: str
    spec: ModelSpec
    model: PreTrainedModel
    held_on: str = ""
    """Kind of device that holds the weights already."""


def describe_memory(
    module: DistillationModule,
    student: SizedModel,
    teachers: Sequence[SizedModel],
    rows: RowFacts | None,
    setting: Setting,
    *,
    batch_size: int,
) -> MemoryFacts:
    """Estimate the memory of a run on one process.

    Weights, gradients and states of the optimizer are counted; the chunk of logits and the cache are
    those of the longest rows. Activations, and copies of weights under autocast, are not counted.

    Args:
        module: The method.
        student: Its student.
        teachers: Models of its teacher in this process.
        rows: The training rows.
        setting: Device, precision, rollouts.
        batch_size: Rows of a micro-batch.
    """
    here = str(setting.device)
    unknown = [
        f"weights of the {each.role}, which is quantized"
        for each in (student, *teachers)
        if is_quantized(each)
    ]
    parts = [
        part
        for each in (student, *teachers)
        if not is_quantized(each)
        for part in _weights(each, setting, is_student=each is student)
    ]
    parts += _training(module, student, setting)
    parts += _copies(module, student, setting)
    if rows is not None:
        parts.append(
            MemoryPart(
                "chunk of logits",
                _logits(module, student, teachers, rows, setting, batch_size),
                here,
            )
        )
        generated, missing = _caches(student, teachers, rows, setting)
        parts += generated
        unknown += missing
    devices = {part.device for part in parts}
    return MemoryFacts(
        parts=[part for part in parts if part.bytes > 0],
        processes={device: setting.processes if device == "cpu" else 1 for device in devices},
        available={device: available_bytes(torch.device(device)) for device in devices},
        unknown=unknown,
    )


def is_quantized(sized: SizedModel) -> bool:
    """Return whether the weights in memory are others than those of the architecture."""
    saved = getattr(sized.model.config, "quantization_config", None)
    return sized.spec.quantization is not None or saved is not None


def available_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device; None where it is not known.

    That of the CPU is what the machine has, or the control group of this process allows.
    """
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        stat = (group / "memory.stat").read_text().splitlines()
        reclaimable = next(int(x.split()[1]) for x in stat if x.startswith("inactive_file "))
        found.append(limit - used + reclaimable)
    if not found:
        with suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _size(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
    """Return bytes of tensors; ``dtype`` is that of floating-point numbers, if it will change."""
    return sum(
        t.numel() * (dtype if dtype is not None and t.is_floating_point() else t.dtype).itemsize
        for t in tensors
    )


def _weights(sized: SizedModel, setting: Setting, *, is_student: bool) -> Iterator[MemoryPart]:
    placement = "replicated" if is_student else getattr(sized.spec, "placement", "replicated")
    here, what = str(setting.device), f"weights of the {sized.role}"
    if setting.device.type == sized.held_on:
        return  # what is free is without it
    dtype = _TRUE.get(setting.precision) if is_student else None
    size = _size((*sized.model.parameters(), *sized.model.buffers()), dtype)
    if placement == "sharded" or (is_student and setting.shards > 1):
        yield MemoryPart(f"{what}, a share", size // setting.shards, here)
    elif placement == "offloaded" and here != "cpu":
        yield MemoryPart(what, size, "cpu")
        yield MemoryPart(f"{what}, while it runs", size, here)
    else:
        yield MemoryPart(
            what, size, here if placement in {"replicated", "offloaded"} else placement
        )


def _training(
    module: DistillationModule, student: SizedModel, setting: Setting
) -> Iterator[MemoryPart]:
    here, dtype = str(setting.device), _TRUE.get(setting.precision)
    trained = [p for p in student.model.parameters() if p.requires_grad]
    share = ", a share" if setting.shards > 1 else ""
    yield MemoryPart(f"gradients{share}", _size(trained, dtype) // setting.shards, here)
    states = optimizer_bytes(module, trained, dtype)
    yield MemoryPart(f"states of the optimizer{share}", states // setting.shards, here)


def _copies(
    module: DistillationModule, student: SizedModel, setting: Setting
) -> Iterator[MemoryPart]:
    """Yield the weights of teachers that are copies of the student."""
    teachers = module.followers if isinstance(module, TeacherModule) else []
    shares = setting.shards == 1 and has_adapters(student.model)
    copied = [p for p in student.model.parameters() if p.requires_grad or not shares]
    for teacher in teachers:
        types = [teacher.copy_dtype(_TRUE.get(setting.precision, p.dtype)) for p in copied]
        pairs = zip(copied, types, strict=True)
        size = sum(p.numel() * dtype.itemsize for p, dtype in pairs if dtype is not None)
        share = ", a share" if setting.shards > 1 else ""
        what = f"{type(teacher).__name__}, a copy of the student{share}"
        yield MemoryPart(what, size // setting.shards, str(setting.device))


def _logits(
    module: DistillationModule,
    student: SizedModel,
    teachers: Sequence[SizedModel],
    rows: RowFacts,
    setting: Setting,
    batch_size: int,
) -> int:
    """Return bytes of logits, of arithmetic with them, and of gradients of states and head.

    A pass over the logits writes these gradients before they are added to those of the weights.
    """
    rollouts = setting.rollouts
    generated = rollouts.max_new_tokens if rollouts is not None and rollouts.any else 0
    given = rows.most_labels if rollouts is None or rollouts.trains_on_data else 0
    positions = batch_size * max(generated, given, 1)
    told = isinstance(module, TeacherModule) and module.answer_kind == "full_distribution"
    itself = module.followers if isinstance(module, TeacherModule) else []
    others = [*teachers, *(student for _ in itself)] if told else []
    widths = [vocabulary_size(each.model) for each in (student, *others)]
    row = sum(widths) * 4
    backend = module.logits_backend
    if not isinstance(backend, FusedLogits):
        # The student's are kept as log-probabilities, and have a gradient.
        return positions * (row + 2 * widths[0] * 4)
    head: Any = student.model.get_output_embeddings()
    weight = getattr(head, "base_layer", head).weight
    # Chunks are planned by the student's width, and hold what each model has.
    own = widths[0] * 4
    of_head = 4 * weight.numel() if weight.requires_grad else 0
    allowed = backend.chunk_bytes or default_chunk_bytes(of_head)
    length = chunk_size(positions, len(widths) * own, allowed)
    part = min(length, part_size(length, own, setting.device)) * own
    gradients = of_head + 4 * positions * int(weight.shape[1])
    return length * row + _TEMPORARIES[isinstance(module, TeacherModule)] * part + gradients


def _caches(
    student: SizedModel, teachers: Sequence[SizedModel], rows: RowFacts, setting: Setting
) -> tuple[list[MemoryPart], list[str]]:
    """Return the key-value caches of generation, and what is not known of them."""
    rollouts, here = setting.rollouts, str(setting.device)
    if rollouts is None:
        return [], []
    prompt, new, together = rows.longest_prompt, rollouts.max_new_tokens, rollouts.rows
    if isinstance(setting.engine, CachedSampler):
        length = allocated_length(prompt, new)
    elif isinstance(setting.engine, ContinuousBatchingSampler):
        length, together = longest_allocation(prompt, new), min(together, setting.engine.slots)
    elif isinstance(setting.engine, TransformersContinuousBatching):
        length, together = paged_length(prompt, new), min(together, setting.engine.slots)
    elif isinstance(setting.engine, TransformersEngine):
        length = (prompt + new) * setting.beams
    else:
        return [], [f"what {type(setting.engine).__name__} takes"]
    generating = [student] if rollouts.by_student else []
    generating += teachers if rollouts.by_teacher else []
    parts, unknown = [], []
    for each in generating:
        dtype, mixed = each.model.dtype, _MIXED.get(setting.precision)
        if each is student:
            dtype = _TRUE.get(setting.precision, dtype)
        kept = (dtype, dtype) if mixed is None else kept_types(each.model, mixed)
        token = cache_bytes(each.model, kept or (dtype, dtype))
        if token is None:
            unknown.append(f"the state of the {each.role} while it generates")
        else:
            size = together * length * token
            most = "" if kept else ", at most"
            parts.append(MemoryPart(f"key-value cache of the {each.role}{most}", size, here))
    return parts, unknown
