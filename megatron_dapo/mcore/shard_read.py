"""Tensors out of the files of a `torch_dist` checkpoint, each read straight into the memory where it belongs.

Each entry of a file is what `torch.save` wrote of one tensor: an uncompressed zip archive of a small pickle (shape,
strides, type) and of the bytes. `torch.load` reads those into memory of its own, from which they are copied once more;
here the operating system puts them where they belong. Files are read, not mapped: a file that is cut short under a
mapping kills the process.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.storage import _dtype_to_storage_type_map

from megatron_dapo.types import CheckpointError

_DTYPES = {name: dtype for dtype, name in _dtype_to_storage_type_map().items()}  # "FloatStorage": torch.float32
_LOCAL_HEADER = struct.Struct("<26xHH")  # a zip's record begins so: the last two are the lengths of what follows
_TAIL = 4096  # bytes at an archive's end, which hold its directory
_DAMAGE = (struct.error, zipfile.BadZipFile, NotImplementedError, pickle.UnpicklingError, EOFError, RuntimeError)
_UNREADABLE = (*_DAMAGE, OSError, KeyError, ValueError, TypeError, AttributeError, IndexError)


@dataclass(frozen=True)
class _Storage:
    name: str  # of its record in the archive
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in its storage, as for `torch.as_strided`."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class ShardReader:
    """The tensors and objects of one checkpoint. As a context, so that its files are closed."""

    def __init__(self, folder: Path, metadata: Metadata):
        self._folder, self._metadata = folder, metadata
        self._files: dict[str, int] = {}
        self._sizes = {  # of each tensor's chunks, by where they begin in it
            key: {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def size(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self._folder} has no tensor {key}; it is of another model, optimizer or format")
        return tuple(entry.size)

    def fill(self, key: str, target: torch.Tensor, start: Sequence[int]) -> int:
        """Put the part of tensor `key` from `start` on that `target` has the shape of into it; on any device, of any
        type. Returns how many elements the files had of it.

        Raises:
            CheckpointError: a file is missing, cut off or not what `torch.save` writes.
        """
        self.size(key)
        wanted, filled = tuple(start), 0
        if self._sizes[key].get(wanted) == tuple(target.shape):
            self._read(key, wanted, (slice(None),) * target.ndim, target)
            return target.numel()
        for offsets, sizes in self._sizes[key].items():
            low = [max(a, b) for a, b in zip(wanted, offsets, strict=True)]
            ends = zip(wanted, target.shape, offsets, sizes, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if all(a < b for a, b in zip(low, high, strict=True)):
                part = target[_box(low, high, wanted)]
                self._read(key, offsets, _box(low, high, offsets), part)
                filled += part.numel()
        return filled

    def value(self, key: str) -> Any:
        """The object `key`, read without running code from the file. Errors as for `fill`."""
        info = self._metadata.storage_data.get(MetadataIndex(key))
        if info is None:
            raise CheckpointError(f"{self._folder} has no {key}; it is of another model, optimizer or format")
        with self._reading(key, info):
            content = io.BytesIO(self._bytes(info, 0, info.length))
            return torch.load(content, map_location="cpu", weights_only=True)

    @contextmanager
    def _reading(self, key: str, info: _StorageInfo) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            what = str(error).split("\n")[0] or repr(error)
            raise CheckpointError(f"{self._folder / info.relative_path}: {key} cannot be read: {what}") from error

    def _read(self, key: str, offsets: tuple[int, ...], box: tuple[slice, ...], part: torch.Tensor) -> None:
        """`box` of the chunk of `key` at `offsets` into `part`."""
        info, size = self._metadata.storage_data[MetadataIndex(key, torch.Size(offsets))], self._sizes[key][offsets]
        with self._reading(key, info):
            layout, start = self._layout(info)
            if layout.size != size:
                raise ValueError(f"it has shape {list(layout.size)}, .metadata says {list(size)}")
            storage = layout.storage
            whole = storage.count == part.numel() == math.prod(size) and _in_order(layout)
            if whole and part.dtype is storage.dtype and part.is_contiguous() and part.device.type == "cpu":
                self._read_into(info, start, part)
                return
            content = torch.empty(storage.count, dtype=storage.dtype)
            self._read_into(info, start, content)
            part.copy_(content.as_strided(layout.size, layout.stride, layout.offset)[box])

    def _layout(self, info: _StorageInfo) -> tuple[_Layout, int]:
        """Of the tensor at `info`, and where its bytes begin there."""
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"it was written through {info.transform_descriptors}, which is not read here")
        tail = self._bytes(info, max(0, info.length - _TAIL), min(info.length, _TAIL))
        with zipfile.ZipFile(io.BytesIO(tail)) as archive:  # which counts offsets from where `tail` begins
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        order = self._record(info, records["byteorder"]).decode() if "byteorder" in records else sys.byteorder
        if order != sys.byteorder:
            raise ValueError(f"its bytes are in {order}-endian order, this machine's are {sys.byteorder}-endian")
        layout = _Header(io.BytesIO(self._record(info, records["data.pkl"]))).load()
        record = records[f"data/{layout.storage.name}"]
        wanted = layout.storage.count * layout.storage.dtype.itemsize
        if record.file_size != wanted:
            raise ValueError(f"it has {record.file_size} bytes, its shape wants {wanted}")
        return layout, self._start(info, record)

    def _record(self, info: _StorageInfo, record: zipfile.ZipInfo) -> bytes:
        return self._bytes(info, self._start(info, record), record.file_size)

    def _start(self, info: _StorageInfo, record: zipfile.ZipInfo) -> int:
        """Where the record's content begins in the entry."""
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{record.filename} is compressed, which torch.save does not do")
        begin = record.header_offset + max(0, info.length - _TAIL)
        header = self._bytes(info, begin, _LOCAL_HEADER.size)
        return begin + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))

    def _bytes(self, info: _StorageInfo, start: int, length: int) -> bytes:
        content = bytearray(length)
        self._read_bytes(info, start, memoryview(content))
        return bytes(content)

    def _read_into(self, info: _StorageInfo, start: int, tensor: torch.Tensor) -> None:
        if tensor.numel():
            self._read_bytes(info, start, tensor.detach().view(-1).view(torch.uint8).numpy().data)

    def _read_bytes(self, info: _StorageInfo, start: int, into: memoryview) -> None:
        if start < 0 or start + len(into) > info.length:
            raise ValueError(f"it ends after {info.length} bytes, {start + len(into)} were wanted")
        name, done = info.relative_path, 0
        if name not in self._files:
            self._files[name] = os.open(self._folder / name, os.O_RDONLY)
        while done < len(into):
            count = os.preadv(self._files[name], [into[done:]], info.offset + start + done)
            if count == 0:
                raise EOFError("the file is cut off")
            done += count


class _Header(pickle.Unpickler):
    """Reads a tensor's pickle as its `_Layout`; knows nothing else, so nothing of the file is run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Layout(storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a tensor has no use for")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, name, _, count = pid
        return _Storage(name, dtype, count)

    def load(self) -> _Layout:
        found = super().load()
        if not isinstance(found, _Layout):
            raise pickle.UnpicklingError(f"it is a {type(found).__name__}, wanted a tensor")
        return found


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _in_order(layout: _Layout) -> bool:
    """The elements lie one after the other, from the storage's start on."""
    step = 1
    for length, stride in zip(reversed(layout.size), reversed(layout.stride), strict=True):
        if length > 1 and stride != step:
            return False
        step *= length
    return layout.offset == 0
