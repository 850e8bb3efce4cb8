"""Sharding of models over processes, and gathering them for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from transformers import PreTrainedModel

from lightning_kd.models.adapters import without_adapters

_gathered: WeakSet[nn.Module] = WeakSet()


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Give each process a share of every weight (FSDP2); a layer is whole only while it computes.

    The units are the layers that transformers says must not be split, and all the rest (embedding,
    last norm, output head) together.

    Args:
        model: The same on every process; it is changed in place.
        mesh: One dimension, over the processes that share it.
    """
    core = without_adapters(model)
    kinds = set(core._no_split_modules or ())
    for part in list(model.modules()):
        if type(part).__name__ in kinds:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def is_fsdp2_sharded(model: nn.Module) -> bool:
    """Return whether a model is in shards of FSDP2, which :func:`unsharded` gathers."""
    return isinstance(model, FSDPModule)


def is_sharded(model: nn.Module) -> bool:
    """Return whether all processes must run a model together."""
    flat = any(isinstance(part, FullyShardedDataParallel) for part in model.modules())
    # DeepSpeed numbers the weights of which it leaves a process no more than its share.
    return is_fsdp2_sharded(model) or flat or any(hasattr(p, "ds_id") for p in model.parameters())


def is_gathered(model: nn.Module) -> bool:
    """Return whether :func:`unsharded` has gathered a model's weights, and they stay on every process.

    A process can then run it alone, and as often as its own rows need.
    """
    return model in _gathered


def reshard(model: nn.Module) -> None:
    """Let each process keep its share alone of a model in shards of FSDP2, between two forward passes.

    The unit of embedding and output head stays gathered after a forward pass without a backward pass.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def unsharded(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Gather all weights of models on every process while the context is open.

    No unit is let go after its forward pass, so that none has to be gathered again: a forward pass in
    the context waits for no other process.
    """
    units = [part for model in models for part in model.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    _gathered.update(models)
    try:
        yield
    finally:
        _gathered.difference_update(models)
        roots = {id(model) for model in models}
        for unit in units:
            unit.set_reshard_after_forward(id(unit) not in roots, recurse=False)
            unit.reshard()
