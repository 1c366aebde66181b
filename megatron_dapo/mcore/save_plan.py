"""Who writes which tensor into which file: Megatron's planning of a save, without its copies and its collectives.

Megatron clones every tensor that is part of a larger buffer while training waits; here the writer does that, in its
own process. Megatron gathers what was written and ends the checkpoint in collectives, in which a rank that raises
leaves the others waiting; here the results travel as values and rank 0 alone ends it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
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
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

FILES = 2  # a rank: written at the same time


@dataclass(frozen=True)
class SavePlanned:
    """`buckets` are this rank's files: (path, name, (bytes items, tensor items)). `metadata` is None but on rank 0."""

    path: Path
    buckets: Sequence[Any]
    writer: FileSystemWriterAsync
    metadata: Metadata | None

    def finish(self, results: Sequence[Sequence[WriteResult]]) -> None:
        """On rank 0: write where each tensor lies, given what each rank has written.

        Raises:
            OSError: the disk is full, for one.
        """
        assert self.metadata is not None
        self.writer.finish(self.metadata, [list(found) for found in results])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.path))


def plan_save(sharded_state: Any, path: Path) -> SavePlanned:
    """Collective; nothing is written. Tensors on a GPU are copied to the host."""
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state, keep_only_main_replica=True)
    writer = _Writer(str(path), thread_count=FILES)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    state = mcore_to_pyt_state_dict(by_key, False)
    (_, metadata, _), *_ = save_state_dict_async_plan(state, writer, None, 0, planner=planner)
    buckets = writer.write_buckets or []
    return SavePlanned(path, FileSystemWriterAsync.preload_tensors(buckets), writer, metadata)


class _Writer(FileSystemWriterAsync):
    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """The files of this rank, each with its items. No tensor is cloned, no process started."""
        self.write_buckets = []
        for items in _split_by_size_and_type(self.thread_count, plan.items):
            data = [(item, planner.resolve_data(item)) for item in items]
            texts = [pair for pair in data if pair[0].type == WriteItemType.BYTE_IO]
            tensors = [(item, it.detach()) for item, it in data if item.type != WriteItemType.BYTE_IO]  # type: ignore
            if data:
                name = f"{plan.storage_data.prefix}{len(self.write_buckets)}.distcp"
                self.write_buckets.append((os.path.join(self.checkpoint_dir, name), name, (texts, tensors)))  # type: ignore
