"""Reading torch.distributed.checkpoint's folders without running what is in them.

Their `.metadata` is a pickle, and a pickle can name any function of any module and call it. Here it may name only what
a real one needs. Tensors are read with `weights_only`; entries that are pickles themselves are refused, for the planner
would load them without it.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_DCP}.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},  # Python 3.13's name
}

SCANNED_BYTES = 16 * 2**20


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name in _ALLOWED.get(module_name, ()):
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(f"refused global {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refused a persistent id")


def load_metadata(content: bytes) -> Metadata:
    """The `.metadata` of a checkpoint. UnpicklingError names a forbidden global, and nothing has been run."""
    try:
        _check_sizes(content)
        metadata = _Unpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise pickle.UnpicklingError(f"damaged: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise pickle.UnpicklingError(f"not a checkpoint's metadata but a {type(metadata).__name__}")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"refused entry {key!r}, which is not a tensor")
    for info in (metadata.storage_data or {}).values():
        path = Path(info.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise pickle.UnpicklingError(f"refused a file outside the checkpoint: {str(path)!r}")
    return metadata


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
