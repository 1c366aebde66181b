"""Who writes which tensor into which file: Megatron's planning of a save, done once, without its copies.

Megatron plans every save anew, in collectives, though only the tensors' values have changed; and it clones every tensor
that is part of a larger buffer while training waits. Here a plan is kept (`Planning`), and the writer clones, in its
own process. Megatron gathers what was written and ends the checkpoint in collectives, in which a rank that raises
leaves the others waiting; here the results travel as values and rank 0 alone ends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dapo.mcore.parallel import device

FILES = 2  # a rank: written at the same time


@dataclass(frozen=True)
class SavePlanned:
    """`buckets` are this rank's files: (path, name, (bytes items, tensor items)). `metadata` is None but on rank 0."""

    path: Path
    buckets: Sequence[Any]
    metadata: Metadata | None

    def finish(self, results: Sequence[Sequence[WriteResult]]) -> None:
        """On rank 0: write where each tensor lies, given what each rank has written.

        Raises:
            OSError: the disk is full, for one.
        """
        assert self.metadata is not None
        FileSystemWriterAsync(str(self.path)).finish(self.metadata, [list(found) for found in results])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.path))


class Planning:
    """Plans the saves of one model and its optimizer.

    A plan is used again as long as each rank has the same things to save at the same places: what `_described` says.
    """

    def __init__(self) -> None:
        self._placement: _Placement | None = None

    def plan(self, sharded: Any, common: dict[str, Any], path: Path) -> SavePlanned:
        """Collective; nothing is written. Tensors on a GPU are copied to the host.

        `sharded` and `common` are what Megatron's `save_preprocess` makes of a state.

        Raises:
            CheckpointingException: the ranks' tensors overlap, or leave a part of the whole out.
        """
        described = _described(sharded)
        known = self._placement is not None and self._placement.described == described
        if not _on_all_ranks(known) or self._placement is None:
            validate_sharding_integrity(determine_global_metadata(sharded)[1], common)
            self._placement = _place(sharded, described, path)
        buckets = _fill(self._placement, _by_key(sharded), path)
        return SavePlanned(path, FileSystemWriterAsync.preload_tensors(buckets), self._placement.metadata)


@dataclass(frozen=True)
class _Placement:
    """What of a plan holds for all saves: what it was made of, this rank's files and the items of each, and on rank 0
    the metadata of the whole."""

    described: list[Any]
    files: Mapping[str, Sequence[WriteItem]]
    metadata: Metadata | None


def _described(sharded: Any) -> list[Any]:
    """All that a plan is made of: what there is to save on this rank, but for the values."""
    return [
        (type(shard), {name: value for name, value in vars(shard).items() if name != "data"})
        for shard in nested_values(sharded)
    ]


def _on_all_ranks(holds: bool) -> bool:
    everywhere = torch.tensor([int(holds)], device=device())
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere.item())


def _place(sharded: Any, described: list[Any], path: Path) -> _Placement:
    """Megatron's plan. Collective."""
    writer = _Writer(str(path), thread_count=FILES)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    state = mcore_to_pyt_state_dict(_by_key(sharded), False)
    (_, metadata, _), *_ = save_state_dict_async_plan(state, writer, None, 0, planner=planner)
    return _Placement(described, writer.files, metadata)


class _Writer(FileSystemWriterAsync):
    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """The files of this rank, each with its items. No tensor is looked at, no process started."""
        filled = [items for items in _split_by_size_and_type(self.thread_count, plan.items) if items]
        self.files = {f"{plan.storage_data.prefix}{number}.distcp": items for number, items in enumerate(filled)}  # type: ignore


def _by_key(sharded: Any) -> dict[str, list[ShardedBase]]:
    """What this rank is the one to write."""
    return _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)[0]


def _fill(placement: _Placement, by_key: Mapping[str, Sequence[ShardedBase]], path: Path) -> list[Any]:
    """This rank's files with the present values in them: the buckets of `SavePlanned`."""
    shards = [shard for found in by_key.values() for shard in found if isinstance(shard, ShardedTensor)]
    tensors = {(shard.key, tuple(shard.global_offset)): shard.data for shard in shards}
    objects = {key: list(found) for key, found in by_key.items() if isinstance(found[0], ShardedObject)}
    texts = mcore_to_pyt_state_dict(objects, False)
    buckets = []
    for name, items in placement.files.items():
        own_texts = [(item, texts[item.index.fqn]) for item in items if item.type == WriteItemType.BYTE_IO]
        own_tensors = [(item, _shaped(item, tensors)) for item in items if item.type != WriteItemType.BYTE_IO]
        buckets.append((str(path / name), name, (own_texts, own_tensors)))
    return buckets


def _shaped(item: WriteItem, tensors: Mapping[tuple[str, tuple[int, ...]], torch.Tensor | None]) -> torch.Tensor:
    """With the axes that it has in the file: a layer's number comes before its own."""
    assert item.index.offset is not None
    assert item.tensor_data is not None
    tensor = tensors[item.index.fqn, tuple(item.index.offset)]
    assert tensor is not None
    return tensor.detach().view(item.tensor_data.chunk.sizes)
