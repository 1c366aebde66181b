"""Where the buckets of a push lie in a ring of bytes, and what must have been read before each is written. Pure code.

A ring holds as many buckets as there is room for, not a fixed number: small ones do not wait for a large one, and
writers are far ahead of the engines before they wait. Every push begins at the ring's start, so that a bucket lies at
the same place in each: one push ends before the next begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LARGEST = 3  # a ring has room for so many of the largest bucket, where the model has as many bytes


@dataclass(frozen=True)
class Place:
    start: int  # bytes
    after: int  # so many buckets, the push's first ones, must have been released before this one is written


def ring_bytes(sizes: Sequence[int]) -> int:
    """Of the ring for buckets of these sizes."""
    return min(LARGEST * max(sizes), sum(sizes))


def places(sizes: Sequence[int], capacity: int) -> tuple[Place, ...]:
    """[bucket] of one push: each after the one before it, in one piece, at the ring's start where the end is too near.

    Raises:
        ValueError: a bucket is larger than the ring.
    """
    if max(sizes) > capacity:
        raise ValueError(f"a bucket of {max(sizes)} bytes in a ring of {capacity}; use ring_bytes")
    found: list[Place] = []
    end = 0
    for size in sizes:
        start = end if end + size <= capacity else 0
        end = start + size
        # Buckets are released in order: with the last of those that lay here, all are.
        under = (n + 1 for n, other in enumerate(found) if other.start < end and start < other.start + sizes[n])
        found.append(Place(start, max(under, default=0)))
    return tuple(found)
