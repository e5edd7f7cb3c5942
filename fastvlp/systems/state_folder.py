"""Folders of ``torch.distributed.checkpoint``, read without trusting them: torch's own reader unpickles what it finds."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

METADATA = ".metadata"
# What a description of tensors is made of: no function among them, and no class that does more than hold its arguments.
_NAMES = {
    "torch.distributed.checkpoint.metadata": ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
                                              "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
}


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a description of tensors")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = metadata_of(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        # Read without trust and written anew, since torch's own planner unpickles whatever it is given.
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def metadata_of(folder: Path) -> Metadata:
    """What the files of a folder hold, and where.

    Raises:
        ValueError: it is no such description. OSError: it cannot be read.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            found = _Descriptions(file).load()
    except OSError:
        raise
    except Exception as error:  # a pickle may fail in any way
        raise ValueError(f"{folder / METADATA} is no description of tensors: {error}") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{folder / METADATA} is no description of tensors")
    return found


def read_state(state: dict[str, Any], folder: Path, alone: bool) -> None:
    """Fill tensors from a folder of ``torch.distributed.checkpoint``, of any number of processes; ``alone``: by this process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # alone, that is as it should be
        dcp.load(state, storage_reader=_Reader(str(folder)), planner=_Planner(), no_dist=alone)
