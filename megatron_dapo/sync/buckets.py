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
    """Tensors in their order, as many to a bucket as `bucket_bytes` holds; a larger one has a bucket to itself."""
    buckets: list[Bucket] = []
    placed: list[Placed] = []
    end = 0
    for name, dims in shapes.items():
        size = -(-prod(dims) * itemsize // _ALIGNMENT) * _ALIGNMENT
        if placed and end + size > bucket_bytes:
            buckets.append(Bucket(tuple(placed), end))
            placed, end = [], 0
        placed.append(Placed(name, dims, end))
        end += size
    return (*buckets, Bucket(tuple(placed), end)) if placed else tuple(buckets)
