"""Model tensors out of a `torch_dist` checkpoint, one at a time, without Megatron and whatever layout wrote it.

Megatron stacks a parameter of all layers into one tensor with the layer first, cut into chunks as the ranks held
them; put together they are the parameter of one tensor-parallel rank that holds everything. The vocabulary may be
padded below with rows of 0.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.families.names import Piece, Shard, hf_shapes, megatron_names, pieces
from megatron_dapo.mcore.safe_load import refuse_foreign_pickles
from megatron_dapo.types import CheckpointError

_OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class DistTensor:
    """A parameter as a checkpoint has it: the whole of `key`, or its slice `layer`. `dims` are without the layer."""

    name: str  # Megatron's, the layer counted over the model
    key: str
    layer: int | None
    dims: tuple[int, ...]
    pieces: tuple[Piece, ...]


def dist_tensors(shape: ModelShape) -> list[DistTensor]:
    """Every parameter of the model, in the order of its layers; the vocabulary without padding."""
    wanted, found = hf_shapes(shape), []
    for name in megatron_names(shape):
        parts = pieces(name, Shard(shape, 0, 1))
        first = wanted[parts[0].hf_name]
        stops = [piece.local_rows.stop for piece in parts]
        rows = first[0] if None in stops else max(stops)
        words = name.split(".")
        layered = words[:2] == ["decoder", "layers"]
        key = ".".join(words[:2] + words[3:]) if layered else name
        layer = int(words[2]) if layered else None
        found.append(DistTensor(name, key, layer, (rows, *first[1:]), tuple(parts)))
    return found


class DistReader:
    """The model of a checkpoint, checked against `shape` when it is opened.

    Raises:
        CheckpointError: pickles that ask for more than the format has, keys or shapes of another model.
    """

    def __init__(self, folder: Path, shape: ModelShape):
        self.folder, self.shape = folder, shape
        self.metadata = refuse_foreign_pickles(folder)
        check_model(folder, self.metadata, shape)
        self._storage = FileSystemReader(folder)
        self._storage.set_up_storage_reader(self.metadata, is_coordinator=True)

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the Hugging Face checkpoint, in its order. One Megatron parameter is held at a time."""
        holder = {piece.hf_name: tensor for tensor in dist_tensors(self.shape) for piece in tensor.pieces}
        held, data = None, torch.empty(0)
        for name, dims in hf_shapes(self.shape).items():
            if holder[name] is not held:
                del data
                held = holder[name]
                data = self.read(held)
            full = torch.empty(dims, dtype=data.dtype)
            for piece in held.pieces if held is not None else ():
                if piece.hf_name == name:
                    full[piece.hf_index(len(dims))] = data[piece.local_index(len(dims))]
            yield name, full

    def dtypes(self) -> set[torch.dtype]:
        return {self._entry(tensor.key).properties.dtype for tensor in dist_tensors(self.shape)}

    def read(self, tensor: DistTensor) -> torch.Tensor:
        """The parameter, without the vocabulary's padding.

        Raises:
            CheckpointError: a missing, cut off or damaged file, parts that no file has, padding that is not 0.
        """
        entry = self._entry(tensor.key)
        lead = 0 if tensor.layer is None else 1
        rows = entry.size[lead]
        start = (0,) * len(entry.size) if tensor.layer is None else (tensor.layer, *(0,) * (len(entry.size) - 1))
        lengths = (*(1,) * lead, *entry.size[lead:])
        data = torch.empty(lengths, dtype=entry.properties.dtype)
        items = _read_items(tensor.key, entry, start, lengths)
        if sum(math.prod(item.lengths) for item in items) != data.numel():
            raise CheckpointError(f"{self.folder}: no file holds all of {tensor.name}; the checkpoint is not whole")
        self._fill(tensor, data, items)
        data = data[0] if lead else data
        if rows > tensor.dims[0] and bool(data[tensor.dims[0] :].any()):
            raise CheckpointError(
                f"{self.folder}: {tensor.key} has {rows} rows, the model's vocabulary {tensor.dims[0]}, and those "
                "beyond are not 0, so they are no padding: the checkpoint is of another vocabulary"
            )
        return data[: tensor.dims[0]]

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)  # `check_model` has seen to it
        return entry

    def _fill(self, tensor: DistTensor, data: torch.Tensor, items: list[ReadItem]) -> None:
        files = sorted({self._storage.storage_data[item.storage_index].relative_path for item in items})
        planner = DefaultLoadPlanner()
        planner.set_up_planner({tensor.key: data}, self.metadata)
        try:
            self._storage.read_data(LoadPlan(items), planner).wait()
        except (OSError, EOFError, RuntimeError, ValueError, AssertionError, pickle.UnpicklingError) as error:
            what = str(error).split("\n")[0] or repr(error)
            raise CheckpointError(
                f"{self.folder}: {tensor.name} in {', '.join(files)} cannot be read: {what}"
            ) from error


def check_model(folder: Path, metadata: Metadata, shape: ModelShape) -> None:
    """Compare the model's part of a checkpoint with the shape of a model: every key and every size.

    A vocabulary padded for tensor parallelism passes here; `DistReader` sees whether the padding is one.

    Raises:
        CheckpointError: the first key that differs, what was found and what was wanted.
    """
    entries: dict[str, Any] = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith(_OPTIMIZER)
    }
    known = set()
    for tensor in dist_tensors(shape):
        if tensor.key in known:
            continue
        known.add(tensor.key)
        wanted = tensor.dims if tensor.layer is None else (shape.num_layers, *tensor.dims)
        if tensor.key not in entries:
            raise CheckpointError(
                f"{folder} has no {tensor.key} (wanted shape {list(wanted)}); it is of another model than the config"
            )
        found = tuple(entries[tensor.key].size)
        padded = tensor.layer is None and len(found) == len(wanted) == 2 and found[0] > wanted[0]
        if found != wanted and not (padded and found[1:] == wanted[1:]):
            raise CheckpointError(
                f"{folder}: {tensor.key} has shape {list(found)}, the model's config wants {list(wanted)}; "
                "it is of another model or vocabulary"
            )
    if more := sorted(entries.keys() - known):
        raise CheckpointError(
            f"{folder} also holds {', '.join(more[:3])}{' ...' * (len(more) > 3)}, which a {shape.family.name} model "
            f"{'with' if shape.tied else 'without'} tied embeddings does not have; it is of another model"
        )


def _read_items(
    key: str, entry: TensorStorageMetadata, start: tuple[int, ...], lengths: tuple[int, ...]
) -> list[ReadItem]:
    """What to read of each chunk that overlaps the box from `start`."""
    items = []
    for chunk in entry.chunks:
        low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
        ends = zip(start, lengths, chunk.offsets, chunk.sizes, strict=True)
        high = [min(a + n, b + m) for a, n, b, m in ends]
        if all(a < b for a, b in zip(low, high, strict=True)):
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key),
                    dest_offsets=torch.Size(a - b for a, b in zip(low, start, strict=True)),
                    storage_index=MetadataIndex(key, chunk.offsets),
                    storage_offsets=torch.Size(a - b for a, b in zip(low, chunk.offsets, strict=True)),
                    lengths=torch.Size(b - a for a, b in zip(low, high, strict=True)),
                )
            )
    return items
