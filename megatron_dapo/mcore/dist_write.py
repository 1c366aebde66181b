"""A model into the `torch_dist` format of Megatron's `dist_checkpointing`, streaming, without Megatron.

torch's own writer wants all tensors at once, or keeps one of each key; this one holds a single parameter. What it
writes, any layout loads: the format knows global tensors alone. The format is torch's (`torch.distributed.checkpoint`)
with two files of Megatron's beside it: `metadata.json` (backend and version) and `common.pt` (nothing, for a model).
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dapo.mcore.dist_read import DistTensor, dist_tensors
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.hf_read import HfReader
from megatron_dapo.types import CheckpointError

_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_model(
    hf: HfReader, shape: ModelShape, folder: Path, file_bytes: int, on_bytes: Callable[[int], None]
) -> None:
    """Write the model that `hf` reads into the existing, empty `folder`, each tensor in its own type.

    A new file is begun before one would hold more than `file_bytes` (a larger tensor has a file of its own).
    `on_bytes` is told of each tensor's bytes when it is written.
    """
    entries: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    with _Files(folder, file_bytes) as files:
        for tensor, data in _parameters(hf, dist_tensors(shape)):
            lead = () if tensor.layer is None else (1,)
            size = torch.Size(tensor.dims if tensor.layer is None else (shape.num_layers, *tensor.dims))
            offsets = torch.Size([tensor.layer or 0, *[0] * (len(size) - 1)])
            info = files.add(data.view(*lead, *tensor.dims))
            entry = entries.setdefault(
                tensor.key, TensorStorageMetadata(TensorProperties(dtype=data.dtype), size, chunks=[])
            )
            storage[MetadataIndex(tensor.key, offsets, len(entry.chunks))] = info
            entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size((*lead, *tensor.dims))))
            on_bytes(data.nbytes)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_BACKENDS))
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(Metadata(dict(entries), storage_data=storage), file)


def _parameters(hf: HfReader, tensors: Iterable[DistTensor]) -> Iterator[tuple[DistTensor, torch.Tensor]]:
    for tensor in tensors:
        dtypes = {hf.dtype(piece.hf_name) for piece in tensor.pieces}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{hf.path}: {', '.join(sorted({piece.hf_name for piece in tensor.pieces}))} are of several types "
                f"({', '.join(sorted(map(str, dtypes)))}), and Megatron keeps them in one tensor"
            )
        data = torch.empty(tensor.dims, dtype=dtypes.pop())
        for piece in tensor.pieces:
            data[piece.local_index(data.dim())] = hf.read(piece, data.dim())
        yield tensor, data


class _Files:
    """`__0_0.distcp`, `__0_1.distcp`, ...: tensors one behind the other, each as `torch.save` writes it."""

    def __init__(self, folder: Path, file_bytes: int):
        self._folder, self._limit, self._number = folder, file_bytes, 0
        self._stream: BinaryIO | None = None

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, data: torch.Tensor) -> _StorageInfo:
        if self._stream is not None and self._stream.tell() + data.nbytes > self._limit:
            self._close()
            self._number += 1
        name = f"__0_{self._number}.distcp"
        if self._stream is None:
            self._stream = (self._folder / name).open("wb")
        offset = self._stream.tell()
        torch.save(data, self._stream)
        return _StorageInfo(name, offset, self._stream.tell() - offset)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None
