"""Weights in from a Hugging Face checkpoint and out under its names, through the one table in `families/names.py`.

Reading takes only the slices that this rank holds. Exporting is collective: every rank walks the checkpoint's names
in the same order and gets each full tensor in turn; no rank ever holds more than one of them besides its own shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.families.names import Piece, Shard, global_name, hf_shapes, pieces, sharded_dim
from megatron_dapo.mcore.hf_read import HfReader
from megatron_dapo.mcore.parallel import RankLayout, current_layout
from megatron_dapo.progress import PROGRESS


def load_hf(chunks: Sequence[GPTModel], shape: ModelShape, path: str | Path) -> None:
    """Fill this rank's parameters from the safetensors in `path`; padded vocabulary rows become 0.

    Raises:
        CheckpointError: a missing or broken file, a missing tensor, or one of another shape.
    """
    layout = current_layout()
    with HfReader(Path(path), hf_shapes(shape)) as reader:
        for name, param in local_parameters(chunks):
            data = param.data
            found = pieces(name, Shard(shape, layout.tp_rank, layout.tp_size))
            if _covers_part_only(found, data):
                data.zero_()
            for piece in found:
                data[piece.local_index(data.dim())] = reader.read(piece, data.dim())


def export_hf(chunks: Sequence[GPTModel], shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint under its Hugging Face name, in full, in the checkpoint's order, on every rank.

    Collective over tensor and pipeline parallelism: all ranks must consume it in step. The tensors are copies.
    """
    layout = current_layout()
    mine = _pieces_by_hf_name(chunks, shape, layout)
    owners = _owning_stages(mine, layout)
    dtype = next(chunks[0].parameters()).dtype
    for name, dims in hf_shapes(shape).items():
        PROGRESS.step(f"weight {name}")
        full = torch.zeros(dims, dtype=dtype, device=next(chunks[0].parameters()).device)
        for piece, data in mine.get(name, ()) if owners[name] == layout.pp_rank else ():
            full[piece.hf_index(len(dims))] = data[piece.local_index(len(dims))]
        yield name, _shared(full, mine.get(name), owners[name], layout)


def local_parameters(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(global Megatron name, parameter) of every parameter on this rank."""
    for chunk in chunks:
        layers = chunk.decoder.layers
        offset = cast(int, layers[0].layer_number) - 1 if len(layers) else 0
        for name, param in chunk.named_parameters():
            yield global_name(name, offset), param


def _covers_part_only(found: list[Piece], data: torch.Tensor) -> bool:
    stops = [piece.local_rows.stop for piece in found]
    return None not in stops and max(stops) < data.size(0)


_Mine = dict[str, list[tuple[Piece, torch.Tensor]]]


def _pieces_by_hf_name(chunks: Sequence[GPTModel], shape: ModelShape, layout: RankLayout) -> _Mine:
    mine: _Mine = defaultdict(list)
    for name, param in local_parameters(chunks):
        for piece in pieces(name, Shard(shape, layout.tp_rank, layout.tp_size)):
            mine[piece.hf_name].append((piece, param.data))
    return mine


def _owning_stages(mine: _Mine, layout: RankLayout) -> dict[str, int]:
    """The first pipeline stage that holds each tensor (a tied embedding is on two)."""
    if layout.pp_size == 1:
        return dict.fromkeys(mine, 0)
    names: list[Any] = [None] * layout.pp_size
    dist.all_gather_object(names, sorted(mine), group=parallel_state.get_pipeline_model_parallel_group())
    return {name: stage for stage in reversed(range(layout.pp_size)) for name in names[stage]}


def _shared(
    full: torch.Tensor, held: list[tuple[Piece, torch.Tensor]] | None, owner: int, layout: RankLayout
) -> torch.Tensor:
    """The owner stage's tensor-parallel shards put together (disjoint, so a sum), then sent to the other stages.

    A tensor that every tensor-parallel rank holds whole is not summed.
    """
    split = held is not None and sharded_dim([piece for piece, _ in held]) is not None
    if owner == layout.pp_rank and layout.tp_size > 1 and split:
        dist.all_reduce(full, group=parallel_state.get_tensor_model_parallel_group())
    if layout.pp_size > 1:
        group = cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())
        dist.broadcast(full, dist.get_global_rank(group, owner), group=group)
    return full
