"""How whole Hugging Face tensors lie in buckets of a configured size on their way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
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

    In their order, but the larger ones (embedding, output layer) stand behind as many bytes of the others as the
    largest has, or behind half of them: engines read as soon as the first bucket is written, and end soon after the
    last, so neither should be a large one. A ring of three times the largest (`ring.py`) then has room for two of them
    and for all that comes before, so that no writer of these waits.
    """
    sizes = {name: -(-prod(dims) * itemsize // _ALIGNMENT) * _ALIGNMENT for name, dims in shapes.items()}
    fitting = [name for name, size in sizes.items() if size <= bucket_bytes]
    larger = [name for name, size in sizes.items() if size > bucket_bytes]
    ahead = min(max(sizes.values()), sum(sizes[name] for name in fitting) // 2)
    ends = accumulate(sizes[name] for name in fitting)
    first = sum(end <= ahead for end in ends)
    buckets: list[Bucket] = []
    placed: list[Placed] = []
    end = 0
    for name in (*fitting[:first], *larger, *fitting[first:]):
        if placed and end + sizes[name] > bucket_bytes:
            buckets.append(Bucket(tuple(placed), end))
            placed, end = [], 0
        placed.append(Placed(name, shapes[name], end))
        end += sizes[name]
    return (*buckets, Bucket(tuple(placed), end))
