"""How whole Hugging Face tensors lie in buckets of a configured size on their way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a cache line, and any dtype


@dataclass(frozen=True)
class Placed:
    """A tensor in a bucket."""

    name: str
    dims: tuple[int, ...]
    offset: int  # bytes


@dataclass(frozen=True)
class Bucket:
    tensors: tuple[Placed, ...]
    nbytes: int

    def views(self, memory: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors, in order, as views of the bytes `memory`."""
        return {
            placed.name: memory[placed.offset : placed.offset + prod(placed.dims) * dtype.itemsize]
            .view(dtype)
            .view(placed.dims)
            for placed in self.tensors
        }


def make_buckets(shapes: Mapping[str, tuple[int, ...]], itemsize: int, bucket_bytes: int) -> tuple[Bucket, ...]:
    """As many tensors to a bucket as `bucket_bytes` holds; a larger one has a bucket to itself.

    In their order, but the larger ones (embedding, output layer) stand in the middle: engines read as soon as the
    first bucket is written, and end soon after the last, so neither should be a large one.
    """
    sizes = {name: -(-prod(dims) * itemsize // _ALIGNMENT) * _ALIGNMENT for name, dims in shapes.items()}
    fitting = [name for name, size in sizes.items() if size <= bucket_bytes]
    larger = [name for name, size in sizes.items() if size > bucket_bytes]
    half = len(fitting) // 2
    buckets: list[Bucket] = []
    placed: list[Placed] = []
    end = 0
    for name in (*fitting[:half], *larger, *fitting[half:]):
        if placed and end + sizes[name] > bucket_bytes:
            buckets.append(Bucket(tuple(placed), end))
            placed, end = [], 0
        placed.append(Placed(name, shapes[name], end))
        end += sizes[name]
    return (*buckets, Bucket(tuple(placed), end))
