"""The index of a directory of shards, which torch reads with pickle as it is."""

import pickle
from pathlib import Path
from typing import Any

import torch

from lightning_kd.checkpoints import unsafe

_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES = {
    _METADATA: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)},
    "pathlib": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}
"""Names that an index may have: descriptions of tensors and plain values."""


def check_indices(path: Path) -> None:
    """Validate that torch will execute nothing when it reads the index of a directory or process.

    Raises:
        ValueError: If an index names anything that does not describe tensors.
    """
    for index in path.glob("*.metadata"):
        try:
            with index.open("rb") as file:
                found = _Rehearsal(file).load()
        # Whatever goes wrong when a file is read that anybody may have written, it is not read again.
        except Exception as error:
            raise unsafe(index, error) from error
        if type(found).__name__ != "Metadata":
            raise unsafe(index, TypeError(f"it is a {type(found).__name__}"))


class _Rehearsal(pickle.Unpickler):
    """Unpickler with placeholders for everything that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return type(name, (_StandIn,), {})


class _StandIn:
    """Takes everything and does nothing; a class that is given a state has no self to take it."""

    def __new__(cls, *_: Any, **__: Any) -> "_StandIn":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass
