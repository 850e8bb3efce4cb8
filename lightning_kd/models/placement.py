"""Placement of frozen models: where they are stored, and where they compute."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from lightning_kd.models.sharding import shard

KINDS = ("replicated", "sharded", "offloaded")


def check_placement(placement: str) -> None:
    """Validate a placement.

    Raises:
        ValueError: If it is neither in :data:`KINDS` nor a device.
    """
    if placement in KINDS:
        return
    try:
        device = torch.device(placement)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":
        raise ValueError(
            f"unknown placement {placement!r}; choose {', '.join(KINDS)}, or a device such as "
            "'cuda:1' or 'cpu'"
        )


def place_model(
    model: PreTrainedModel, placement: str, device: torch.device, mesh: DeviceMesh | None
) -> None:
    """Move a model to where it is stored.

    Args:
        model: A frozen model.
        placement: ``replicated`` on every process's own device, ``sharded`` over all processes,
            ``offloaded`` to memory of the CPU, or a device of its own.
        device: Of the student, on this process.
        mesh: The processes that share weights; None if none do.

    Raises:
        ValueError: If no processes share weights, the device does not exist, or the weights cannot be
            moved.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        # They were loaded where they belong, and not all that belongs to them can be moved.
        if placement != "replicated":
            raise ValueError(
                f"placement {placement!r} of a quantized model: its weights stay where they were "
                "loaded, on every process; use placement: replicated"
            )
    elif placement == "sharded":
        if mesh is None:
            raise ValueError(
                "placement: sharded needs --trainer.strategy fsdp2; use it, or placement: replicated "
                "or offloaded"
            )
        shard(model, mesh)
    elif placement == "offloaded":
        if device.type == "cuda":
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.pin_memory()
    else:
        try:
            model.to(device if placement == "replicated" else torch.device(placement))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"placement {placement!r}: there is no such device ({error})"
            ) from error


def own_device(placement: str, device: torch.device) -> torch.device | None:
    """Return the device of a model, if it is another than the student's.

    Args:
        placement: Of the model.
        device: Of the student, on this process.

    Example:
        >>> own_device("cuda:1", torch.device("cuda:0"))
        device(type='cuda', index=1)
        >>> own_device("cuda:0", torch.device("cuda:0")), own_device("offloaded", torch.device("cuda"))
        (None, None)
    """
    if placement in KINDS:
        return None
    own = torch.device(placement)
    shared = own.type == device.type and own.index in (None, device.index or 0)
    return None if shared else own


@contextmanager
def on_compute_device(
    model: PreTrainedModel, placement: str, device: torch.device
) -> Iterator[torch.device]:
    """Yield the device that a model computes on while the context is open.

    An offloaded model is copied to ``device`` for as long; its weights on the CPU stay, so that
    nothing has to be copied back.
    """
    if placement != "offloaded":
        yield device if placement in KINDS else torch.device(placement)
        return
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield device
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
