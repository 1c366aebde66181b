"""Weights in from a Hugging Face checkpoint and out under its names, through the one table in `families/names.py`.

Reading takes only the slices that this rank holds. Exporting is collective: every rank walks the checkpoint's names
in the same order and gets each full tensor in turn; no rank ever holds more than one of them besides its own shard.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open

from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.mcore.families.names import Piece, Shard, global_name, hf_shapes, pieces, sharded_dim
from megatron_dapo.mcore.parallel import RankLayout, current_layout

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: names the file or tensor, what was found and what was wanted."""


def load_hf(chunks: Sequence[GPTModel], shape: ModelShape, path: str | Path) -> None:
    """Fill this rank's parameters from the safetensors in `path`; padded vocabulary rows become 0.

    Raises:
        CheckpointError: a missing or broken file, a missing tensor, or one of another shape.
    """
    layout = current_layout()
    with _Reader(Path(path), hf_shapes(shape)) as reader:
        for name, param in local_parameters(chunks):
            data = param.data
            found = pieces(name, Shard(shape, layout.tp_rank, layout.tp_size))
            if _covers_part_only(found, data):
                data.zero_()
            for piece in found:
                data[piece.local_index(data.dim())] = reader.read(piece, data.dim())


def read_hf(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in the safetensors of `path`, one at a time.

    Raises:
        CheckpointError: a missing or broken file.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, file in _tensor_files(Path(path)).items():
        by_file[file].append(name)
    for file, names in by_file.items():
        with _opened(file) as handle:
            for name in names:
                yield name, handle.get_tensor(name)


def export_hf(chunks: Sequence[GPTModel], shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint under its Hugging Face name, in full, in the checkpoint's order, on every rank.

    Collective over tensor and pipeline parallelism: all ranks must consume it in step. The tensors are copies.
    """
    layout = current_layout()
    mine = _pieces_by_hf_name(chunks, shape, layout)
    owners = _owning_stages(mine, layout)
    dtype = next(chunks[0].parameters()).dtype
    for name, dims in hf_shapes(shape).items():
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


@dataclass
class _Reader:
    """Slices of named tensors out of one safetensors file or several."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def __enter__(self) -> _Reader:
        self._open: dict[Path, Any] = {}
        self._file_of = _tensor_files(self.path)
        for name, wanted in self.shapes.items():
            self._check(name, wanted)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)

    def read(self, piece: Piece, dims: int) -> torch.Tensor:
        return self._handle(piece.hf_name).get_slice(piece.hf_name)[piece.hf_index(dims)]

    def _check(self, name: str, wanted: tuple[int, ...]) -> None:
        if name not in self._file_of:
            raise CheckpointError(f"{self.path} has no tensor {name!r} (wanted shape {list(wanted)})")
        found = tuple(self._handle(name).get_slice(name).get_shape())
        if found != wanted:
            raise CheckpointError(
                f"{self._file_of[name]}: tensor {name!r} has shape {list(found)}, its config.json wants {list(wanted)}"
            )

    def _handle(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _opened(file)
        return self._open[file]


def _tensor_files(path: Path) -> dict[str, Path]:
    """tensor name -> the file it is in."""
    index, single = path / _INDEX, path / _SINGLE
    if not index.exists():
        if not single.exists():
            raise CheckpointError(f"{path} has neither {_SINGLE} nor {_INDEX}; wanted a Hugging Face checkpoint")
        return dict.fromkeys(_tensor_names(single), single)
    file_of = {name: path / file for name, file in _weight_map(index).items()}
    held = {}
    for file in sorted(set(file_of.values())):
        if not file.exists():
            raise CheckpointError(f"{index} names {file.name}, which is not there; fetch the checkpoint again")
        held[file] = set(_tensor_names(file))
    for name, file in file_of.items():
        if name not in held[file]:
            raise CheckpointError(f"{file} has no tensor {name!r}, which {_INDEX} says is in it")
    return file_of


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{index} is no index of safetensors, it should hold weight_map: {error!r}") from error


def _tensor_names(file: Path) -> list[str]:
    with _opened(file) as handle:
        return list(handle.keys())


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) cannot be read as safetensors: {error}; fetch the checkpoint again"
        ) from error
