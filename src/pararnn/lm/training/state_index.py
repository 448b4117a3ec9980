"""Reads the index of a checkpoint's state without running any code in it.

`torch.distributed.checkpoint` stores as a pickle, `.metadata`, which tensor lies where. A pickle
may name any function to be called. Here it gets records without behaviour for the few classes that
an index is made of and nothing else; what PyTorch works with is built from their checked fields.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

INDEX = ".metadata"


class StateReader(FileSystemReader):
    """Reads the parts that a checked index names, for `torch.distributed.checkpoint.load`.

    Args:
        folder: The state of a checkpoint.

    Raises:
        ValueError: As `read_index`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._index = read_index((folder / INDEX).read_bytes())

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, from the bytes that were checked."""
        return self._index


def read_index(content: bytes) -> Metadata:
    """The index in the bytes of a `.metadata`.

    Raises:
        ValueError: It is damaged, or names something that does not belong into an index.
    """
    try:
        return _metadata(_Unpickler(io.BytesIO(content)).load())
    except _ForeignError as error:
        raise ValueError(
            f"names {error}, which no index of tensors holds; nothing was run"
        ) from None
    except _MALFORMED as error:
        raise ValueError("is no index of tensors") from error


def part_names(index: Metadata) -> set[str]:
    """Names of the files beside the index that hold tensors."""
    return {info.relative_path for info in index.storage_data.values()}


_MALFORMED = (
    *(pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError),
    *(LookupError, OverflowError, MemoryError, RecursionError),
)
"""Errors of the unpickler and the stand-ins on bytes that we did not write."""


class _ForeignError(Exception):
    """A class or function that is refused."""


class _Record:
    """Stands for an object and keeps all its fields."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Ignored:
    """Stands for objects that are not needed."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _member(owner: Any, name: Any) -> int:
    """Stands for `getattr`, by which Python 3.11.2 stores a member of an enumeration."""
    if owner is not int or not isinstance(name, str):  # the stand-in of the only one
        raise _ForeignError("builtins.getattr")
    return 0


_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    name: type(name, (_Record,), {})
    for name in (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("MetadataIndex", "_StorageInfo"),
    )
}
_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    **{(_METADATA, name): record for name, record in _RECORDS.items()},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _RECORDS["_StorageInfo"],
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    (_METADATA, "_MEM_FORMAT_ENCODING"): int,
    ("builtins", "getattr"): _member,
    (_METADATA, "StorageMeta"): _Ignored,
    **{
        (module, name): _Ignored
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module, name))
        if stand_in is not None:
            return stand_in
        dtype = getattr(torch, name, None) if module == "torch" else None
        if not isinstance(dtype, torch.dtype):
            raise _ForeignError(f"{module}.{name}")
        return dtype


def _metadata(index: Any) -> Metadata:
    fields = _fields(index, "Metadata")
    places = {_key(key): _place(place) for key, place in fields["storage_data"].items()}
    tensors = {name: _tensor(value) for name, value in fields["state_dict_metadata"].items()}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            places[MetadataIndex(name, chunk.offsets)]  # KeyError if it is missing
    return Metadata({**tensors}, planner_data={}, storage_data=places)


def _tensor(record: Any) -> TensorStorageMetadata:
    fields = _fields(record, "TensorStorageMetadata")
    dtype, *_ = _fields(fields["properties"], "TensorProperties")
    size, chunks = _size(fields["size"]), [_chunk(chunk) for chunk in fields["chunks"]]
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError("the parts of a tensor do not make a whole")
    return TensorStorageMetadata(TensorProperties(_is(torch.dtype, dtype)), size, chunks)


def _chunk(record: Any) -> ChunkStorageMetadata:
    fields = _fields(record, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(fields["offsets"]), _size(fields["sizes"]))


def _key(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    return MetadataIndex(_is(str, fields["fqn"]), _size(fields["offset"]))


def _place(record: Any) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    path = _is(str, fields["relative_path"])
    if not is_plain(path) or fields.get("transform_descriptors"):
        raise ValueError("a part is not beside the index, or is packed")
    return _StorageInfo(path, *_size((fields["offset"], fields["length"])))


def is_plain(name: str) -> bool:
    """Whether this is the name of a file beside another: no path, no device."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return name != ".." and all(path.parts == (path.name,) == (name,) for path in paths)


def _fields(record: Any, name: str) -> Any:
    return _is(_RECORDS[name], record).state


def _size(numbers: Any) -> torch.Size:
    return torch.Size(_is(int, number) for number in _is(tuple, numbers))


def _is(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value)} in the place of {kind}")
    return value
