"""Memory that a run will take, from models without weights."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from lightning_kd.fused.chunked_pass import chunk_size, part_size
from lightning_kd.generation import CachedSampler, TransformersEngine
from lightning_kd.generation.cache import allocated_length
from lightning_kd.models import FusedLogits, ModelSpec, vocabulary_size
from lightning_kd.modules import DistillationModule, TeacherModule
from lightning_kd.preflight.facts import MemoryFacts, MemoryPart, RowFacts
from lightning_kd.preflight.setting import Setting

_TRUE = {"bf16-true": 2, "16-true": 2, "64-true": 8}
"""Bytes of a student's number, where the precision converts it."""

_TEMPORARIES = {False: 3, True: 8}
"""Tensors of the size of a part of a chunk that arithmetic takes, without and with a teacher. Some
divergences take more."""

_PROXY = 256
"""Rows and columns of the matrix that an optimizer is measured on, if it needs numbers."""


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


def _size(tensors: Iterable[Tensor], each: int | None = None) -> int:
    """Return bytes of tensors; ``each`` is the size of a floating-point number, if it will change."""
    return sum(
        t.numel() * (each if each is not None and t.is_floating_point() else t.element_size())
        for t in tensors
    )


def _weights(sized: SizedModel, setting: Setting, *, is_student: bool) -> Iterator[MemoryPart]:
    placement = "replicated" if is_student else getattr(sized.spec, "placement", "replicated")
    here, what = str(setting.device), f"weights of the {sized.role}"
    if setting.device.type == sized.held_on:
        return  # what is free is without it
    each = _TRUE.get(setting.precision) if is_student else None
    size = _size((*sized.model.parameters(), *sized.model.buffers()), each)
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
    here, each = str(setting.device), _TRUE.get(setting.precision)
    trained = [p for p in student.model.parameters() if p.requires_grad]
    share = ", a share" if setting.shards > 1 else ""
    yield MemoryPart(f"gradients{share}", _size(trained, each) // setting.shards, here)
    states = optimizer_bytes(module, trained)
    if each is not None and trained:
        states = states * each // trained[0].element_size()
    yield MemoryPart(f"states of the optimizer{share}", states // setting.shards, here)


def optimizer_bytes(module: DistillationModule, parameters: Sequence[Parameter]) -> int:
    """Return bytes of the states that a module's optimizer will have, of parameters without memory.

    The optimizer takes a step on the meta device. One that needs numbers takes it on a small matrix,
    and what it keeps for each number there is taken to hold for all.
    """
    wide = [Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    try:
        return _states_after_step(module, wide)
    except (RuntimeError, NotImplementedError):
        proxy = Parameter(torch.zeros(_PROXY, _PROXY, dtype=parameters[0].dtype))
        kept = _states_after_step(module, [proxy])
        return int(kept / _size([proxy]) * _size(parameters))


def _states_after_step(module: DistillationModule, parameters: Sequence[Parameter]) -> int:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = module.make_optimizer(parameters)
    optimizer.step()
    return sum(
        _size([value])
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


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
    generated = 0 if setting.rollouts is None else setting.rollouts.max_new_tokens
    positions = batch_size * max(generated, rows.most_labels, 1)
    told = isinstance(module, TeacherModule) and module.answer_kind == "full_distribution"
    widths = [vocabulary_size(each.model) for each in (student, *(teachers if told else ()))]
    row = sum(widths) * 4
    backend = module.logits_backend
    if not isinstance(backend, FusedLogits):
        # The student's are kept as log-probabilities, and have a gradient.
        return positions * (row + 2 * widths[0] * 4)
    head: Any = student.model.get_output_embeddings()
    weight = getattr(head, "base_layer", head).weight
    # Chunks are planned by the student's width, and hold what each model has.
    own = widths[0] * 4
    length = chunk_size(positions, len(widths) * own, backend.chunk_megabytes * 2**20)
    part = min(length, part_size(length, own, setting.device)) * own
    of_head = weight.numel() if weight.requires_grad else 0
    gradients = 4 * (of_head + positions * int(weight.shape[1]))
    return length * row + _TEMPORARIES[isinstance(module, TeacherModule)] * part + gradients


def _caches(
    student: SizedModel, teachers: Sequence[SizedModel], rows: RowFacts, setting: Setting
) -> tuple[list[MemoryPart], list[str]]:
    """Return the key-value caches of generation, and what is not known of them."""
    rollouts, here = setting.rollouts, str(setting.device)
    if rollouts is None:
        return [], []
    prompt, new = rows.longest_prompt, rollouts.max_new_tokens
    if isinstance(setting.engine, CachedSampler):
        length = allocated_length(prompt, new)
    elif isinstance(setting.engine, TransformersEngine):
        length = (prompt + new) * setting.beams
    else:
        return [], [f"what {type(setting.engine).__name__} takes"]
    generating = [student] if rollouts.by_student else []
    generating += teachers if rollouts.by_teacher else []
    parts, unknown = [], []
    for each in generating:
        token = cache_bytes(each.model, 2 if setting.precision.endswith("mixed") else None)
        if token is None:
            unknown.append(f"the state of the {each.role} while it generates")
        else:
            size = rollouts.rows * length * token
            parts.append(MemoryPart(f"key-value cache of the {each.role}", size, here))
    return parts, unknown


def cache_bytes(model: PreTrainedModel, each: int | None = None) -> int | None:
    """Return bytes of the keys and values of one token; None if the configuration does not tell.

    Args:
        model: A model, without weights.
        each: Bytes of a number. Defaults to those of the weights.
    """
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(
        config, "num_attention_heads", None
    )
    layers, hidden = config.num_hidden_layers, getattr(config, "hidden_size", None)
    width = getattr(config, "head_dim", None)
    if width is None and hidden and heads:
        width = hidden // config.num_attention_heads
    if not heads or not width:
        return None
    return 2 * int(layers) * int(heads) * int(width) * (each or model.dtype.itemsize)
