"""Model tensors come out of a checkpoint whatever layout cut it; what is not whole is refused."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dapo.mcore.dist_read import DistReader, dist_tensors
from megatron_dapo.mcore.families.names import Shard, hf_shapes, pieces
from megatron_dapo.types import CheckpointError
from tests.unit.mcore.helpers import SHAPE

HF = {
    name: torch.arange(math.prod(dims), dtype=torch.float32).view(dims) + 1000 * number
    for number, (name, dims) in enumerate(hf_shapes(SHAPE).items())
}


def save_cut(folder: Path, tp_size: int, padding: float = 0.0, without: str = "") -> None:
    """A checkpoint of SHAPE as `tp_size` tensor-parallel ranks would hold it, each chunk a file."""
    entries: dict[str, TensorStorageMetadata] = {}
    storage = {}
    for tensor in dist_tensors(SHAPE):
        for tp_rank in range(tp_size):
            local = pieces(tensor.name, Shard(SHAPE, tp_rank, tp_size))
            for data, offset in local_chunks(local, tensor.dims, tp_rank, tp_size, padding):
                lead = () if tensor.layer is None else (tensor.layer,)
                rows = SHAPE.padded_vocab_size(tp_size) if tensor.layer is None and data.dim() == 2 else tensor.dims[0]
                size = (*(SHAPE.num_layers,) * len(lead), rows, *tensor.dims[1:])
                entry = entries.setdefault(
                    tensor.key, TensorStorageMetadata(TensorProperties(dtype=data.dtype), torch.Size(size), [])
                )
                where = torch.Size((*lead, *offset))
                if any(chunk.offsets == where for chunk in entry.chunks):
                    continue  # held by every rank
                entry.chunks.append(ChunkStorageMetadata(where, torch.Size((*(1,) * len(lead), *data.shape))))
                file = folder / f"__{len(storage)}_0.distcp"
                torch.save(data.view(*(1,) * len(lead), *data.shape).clone(), file)
                if file.name != without:
                    storage[MetadataIndex(tensor.key, where)] = _StorageInfo(file.name, 0, file.stat().st_size)
                else:
                    entry.chunks.pop()
                    storage[MetadataIndex("lost", where)] = _StorageInfo(file.name, 0, file.stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(dict(entries), storage_data=storage)))


def local_chunks(local, dims, tp_rank, tp_size, padding):  # type: ignore[no-untyped-def]
    """(data, offset of it in the global tensor) of one rank, the gate and the up part of a feed-forward apart."""
    if len(local) == 2 and local[0].hf_name.endswith("gate_proj.weight"):
        for half, piece in enumerate(local):
            data = HF[piece.hf_name][piece.hf_index(2)]
            yield data, (half * dims[0] // 2 + tp_rank * len(data), 0)
        return
    parts = [HF[piece.hf_name][piece.hf_index(len(dims))] for piece in local]
    data = torch.cat(parts)
    if local[0].hf_cols != slice(None):
        yield data, (0, tp_rank * data.size(1))
        return
    if local[0].hf_rows == slice(None):
        yield data, (0,) * len(dims)
        return
    if local[0].hf_name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = SHAPE.padded_vocab_size(tp_size) // tp_size
        data = torch.cat([data, torch.full((rows - len(data), *dims[1:]), padding)])
    yield data, (tp_rank * len(data), *(0,) * (len(dims) - 1))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_chunks_of_any_tensor_parallel_size_are_put_together(tmp_path: Path, tp_size: int):
    save_cut(tmp_path, tp_size)
    assert len(list(tmp_path.glob("*.distcp"))) > 10 * tp_size
    found = dict(DistReader(tmp_path, SHAPE).hf_tensors())
    assert list(found) == list(HF)
    assert [name for name, tensor in HF.items() if not torch.equal(found[name], tensor)] == []


def test_rows_beyond_the_vocabulary_that_are_not_zero_are_refused(tmp_path: Path):
    save_cut(tmp_path, tp_size=2, padding=1.0)
    with pytest.raises(CheckpointError, match=r"embedding\.word_embeddings\.weight has 12 rows.*vocabulary 11"):
        dict(DistReader(tmp_path, SHAPE).hf_tensors())


def test_a_part_that_no_file_holds_is_refused_with_the_parameter(tmp_path: Path):
    save_cut(tmp_path, tp_size=2, without="__5_0.distcp")
    with pytest.raises(CheckpointError, match=r"no file holds all of decoder\.layers\.0\."):
        dict(DistReader(tmp_path, SHAPE).hf_tensors())


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"hidden_size": 8}, {"vocab_size": 13}, {"tied": True}])
def test_a_checkpoint_of_another_model_is_refused_when_it_is_opened(tmp_path: Path, change: dict[str, int]):
    save_cut(tmp_path, tp_size=1)
    with pytest.raises(CheckpointError, match="of another model"):
        DistReader(tmp_path, replace(SHAPE, **change))
