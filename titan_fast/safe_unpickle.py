"""Reading torch.distributed.checkpoint's folders without running what is in them.

Their `.metadata` is a pickle, and a pickle can name any function of any module and call it, and set attributes of what
it has named. Here it may name only what a real one needs, and gets stand-ins for these, which it cannot change. Tensors
are read with `weights_only`; entries that are pickles themselves are refused, for the planner would load them without
it.
"""

import functools
import io
import math
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

SCANNED_BYTES = 16 * 2**20


class _Sealed(type):
    """Of classes whose attributes cannot be set."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"refused to change {cls.__name__}")


def _stand_in(name: str, make: Callable[..., Any]) -> type:
    """A class of this name that makes what `make` makes, both by a call and by `__new__`, as pickles do."""
    return _Sealed(name, (), {"__slots__": (), "__new__": lambda kind, *given: make(*given)})


class _MemoryFormat(int):
    """Equal to the member of torch's enumeration that has its value: a member is one object for the whole process."""

    def __eq__(self, other: object) -> bool:
        return int(self) == getattr(other, "value", other)

    __hash__ = int.__hash__


_DCP = "torch.distributed.checkpoint"
_DATA = (ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties, TensorStorageMetadata)
_PATHS = {name: lambda *parts: os.path.join(*parts) for name in ("Path", "PosixPath", "PurePosixPath")}  # noqa: PTH118
_ALLOWED: dict[str, dict[str, Callable[..., Any]]] = {
    f"{_DCP}.metadata": {kind.__name__: functools.partial(object.__new__, kind) for kind in _DATA}
    | {"_MEM_FORMAT_ENCODING": _MemoryFormat},
    f"{_DCP}.filesystem": {"_StorageInfo": functools.partial(object.__new__, _StorageInfo)},
    "torch": {"Size": torch.Size},
    "torch.serialization": {"_get_layout": _get_layout},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # Python 3.13's name
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (make := _ALLOWED.get(module_name, {}).get(global_name)) is not None:
            return _stand_in(global_name, make)
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(f"refused global {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refused a persistent id")


def load_metadata(content: bytes) -> Metadata:
    """The `.metadata` of a checkpoint. UnpicklingError names a forbidden global, and nothing has been run; or what is
    not as in a real one."""
    try:
        _check_sizes(content)
        metadata = _Unpickler(io.BytesIO(content)).load()
        problem = _problem(metadata)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise pickle.UnpicklingError(f"damaged: {type(error).__name__}: {error}") from error
    if problem:
        raise pickle.UnpicklingError(problem)
    return metadata


def _problem(metadata: Any) -> str:
    """What is wrong, or ""."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        return f"not a checkpoint's metadata but a {type(metadata).__name__}"
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            return f"refused entry {name!r}, which is not a tensor"
        if not _is_tensor(entry):
            return f"refused tensor {name!r}, whose size or dtype is none"
        if not _is_whole(entry):
            return f"refused tensor {name!r}, whose pieces are not the whole of it"
    for index, info in (metadata.storage_data or {}).items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            return f"refused the place of {index!r}, which is none"
        path = Path(info.relative_path) if type(info.relative_path) is str else None
        if path is None or path.is_absolute() or ".." in path.parts:
            return f"refused a file outside the checkpoint: {str(info.relative_path)!r}"
    return ""


def _is_tensor(entry: TensorStorageMetadata) -> bool:
    kinds = type(entry.size), type(entry.properties), type(getattr(entry.properties, "dtype", None))
    return kinds == (torch.Size, TensorProperties, torch.dtype) and all(size >= 0 for size in entry.size)


def _is_whole(entry: TensorStorageMetadata) -> bool:
    """Whether the pieces lie within the tensor, begin at different places, and have as many elements as it has. (What
    no piece covers would be whatever was in memory.)"""
    pieces = [chunk for chunk in entry.chunks if math.prod(chunk.sizes)]
    return (
        all(_is_within(chunk, entry.size) for chunk in entry.chunks)
        and len({tuple(piece.offsets) for piece in pieces}) == len(pieces)
        and sum(math.prod(piece.sizes) for piece in pieces) == math.prod(entry.size)
    )


def _is_within(chunk: ChunkStorageMetadata, size: torch.Size) -> bool:
    places = zip(chunk.offsets, chunk.sizes, size, strict=True)
    return all(at >= 0 and length >= 0 and at + length <= whole for at, length, whole in places)


def _check_sizes(content: bytes) -> None:
    """UnpicklingError for lengths that no file of this size can need: pickle would allocate gigabytes for such a memo
    before it noticed that the rest is missing. Files larger than SCANNED_BYTES are not scanned."""
    if len(content) > SCANNED_BYTES:
        return
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"refused memo index {argument} in {len(content)} bytes")


class SafeReader(FileSystemReader):
    """DCP's reader of a folder, with `load_metadata` instead of pickle.load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = load_metadata((Path(self.path) / ".metadata").read_bytes())
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
