"""Megatron's `dist_checkpointing.load` with a reader that puts each tensor straight into its destination.

Megatron's own planning (who reads what, in collectives) and torch's reader cost more than the reading: a tensor there
passes through `torch.load`, a copy, and for SwiGLU's two halves a concatenation. Each rank here reads what it holds;
no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dapo.mcore.shard_read import ShardReader
from megatron_dapo.types import CheckpointError


def load_sharded(wanted: dict[str, Any], folder: str | Path, metadata: Metadata) -> dict[str, Any]:
    """Megatron's `dist_checkpointing.load` of the sharded state `wanted`, whose tensors are overwritten.

    `metadata` is that of `folder`, read by `safe_load.py`. Changes `wanted`.

    Raises:
        CheckpointError: a tensor is not in the files, has another shape, or cannot be read.
    """
    dict_list_map_inplace(_merged_in_place, wanted)
    # The integrity check is of the ranks' layout, which the save has checked; it pickles and gathers every shard's.
    strategy = _DirectLoad(metadata)
    return dist_checkpointing.load(wanted, str(folder), strategy, validate_access_integrity=False)  # type: ignore


class _DirectLoad(TorchDistLoadShardedStrategy):
    def __init__(self, metadata: Metadata):
        super().__init__()
        self._metadata = metadata

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        folder = Path(checkpoint_dir)
        with ShardReader(folder, self._metadata) as reader:
            return dict_list_map_outplace(partial(_loaded, reader, folder), sharded_state_dict)


def _loaded(reader: ShardReader, folder: Path, shard: Any) -> Any:
    if isinstance(shard, ShardedObject):
        (value,) = reader.value(shard.unique_key)  # Megatron saves a list of what the rank has under the key
        return value
    assert isinstance(shard, ShardedTensor), type(shard)
    size, wanted = reader.size(shard.key), tuple(shard.global_shape)
    if size != wanted and not shard.allow_shape_mismatch:
        raise CheckpointError(f"{folder}: {shard.key} has shape {list(size)}, wanted {list(wanted)}")
    if shard.data is None:
        shard.init_data("cpu")
    assert shard.data is not None
    data = shard.data.detach()
    if size != wanted:
        data.zero_()  # the vocabulary's padding, of which the file has less
    filled = reader.fill(shard.key, data[(None,) * shard.prepend_axis_num], shard.global_offset)
    if size == wanted and filled != data.numel():
        raise CheckpointError(f"{folder}: the files have {filled} of {data.numel()} elements wanted of {shard.key}")
    return data


def _merged_in_place(shard: Any) -> Any:
    """A factory that gives back the tensor it was made of, if what was loaded are its parts."""
    if isinstance(shard, ShardedTensorFactory):
        return replace(shard, merge_fn=partial(_whole, shard.data, shard.merge_fn))
    return shard


def _whole(data: torch.Tensor, merge: Callable[[Any], torch.Tensor], parts: Any) -> torch.Tensor:
    end = data.data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return merge(parts)
        end += part.nbytes
    return data.detach() if end == data.data_ptr() + data.nbytes else merge(parts)
