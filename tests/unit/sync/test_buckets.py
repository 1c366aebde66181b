"""Every tensor has a place of its own in one bucket, in order."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.sync.buckets import make_buckets
from megatron_dapo.sync.ring import places, ring_bytes

DIMS = st.lists(st.tuples(st.integers(1, 40)) | st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1)


@given(DIMS, st.integers(1, 2000), st.sampled_from([torch.bfloat16, torch.float32]))
@settings(max_examples=100)
def test_every_tensor_has_a_place_and_none_overlap(dims: list[tuple[int, ...]], size: int, dtype: torch.dtype):
    shapes = {f"t{number}": shape for number, shape in enumerate(dims)}
    buckets = make_buckets(shapes, dtype.itemsize, size)
    assert sorted(placed.name for bucket in buckets for placed in bucket.tensors) == sorted(shapes)
    memory = [torch.zeros(bucket.nbytes, dtype=torch.uint8) for bucket in buckets]
    for bucket, under in zip(buckets, memory, strict=True):
        for view in bucket.views(under, dtype).values():
            view.view(-1).view(torch.uint8).add_(1)
    assert max(int(under.max()) for under in memory) == 1
    assert sum(int(under.sum()) for under in memory) == dtype.itemsize * sum(map(prod, dims))


@given(DIMS, st.integers(1, 2000))
@settings(max_examples=100)
def test_a_bucket_is_larger_than_asked_for_only_where_one_tensor_is(dims: list[tuple[int, ...]], size: int):
    buckets = make_buckets({f"t{number}": shape for number, shape in enumerate(dims)}, 4, size)
    assert all(bucket.nbytes <= size or len(bucket.tensors) == 1 for bucket in buckets)
    for left, right in pairwise(buckets):
        first = -(-4 * prod(right.tensors[0].dims) // 64) * 64
        assert left.nbytes + first > size, "the next tensor would have found room"


def test_tensors_that_fill_a_bucket_alone_stand_in_the_middle_and_the_others_keep_their_order():
    shapes = {"embedding": (1000,), "a": (16,), "b": (16,), "c": (16,), "d": (16,), "output": (900,)}
    names = [[placed.name for placed in bucket.tensors] for bucket in make_buckets(shapes, 4, 128)]
    assert names == [["a", "b"], ["embedding"], ["output"], ["c", "d"]]


@given(st.lists(st.integers(1, 20), min_size=2, max_size=40), st.integers(21, 100), st.integers(21, 100))
@settings(max_examples=100)
def test_two_larger_tensors_and_all_before_them_are_written_without_a_wait(small: list[int], one: int, two: int):
    shapes = {f"t{number}": (16 * size,) for number, size in enumerate(small)}
    buckets = make_buckets({"embedding": (16 * one,), "output": (16 * two,)} | shapes, 4, 20 * 64)
    sizes = [bucket.nbytes for bucket in buckets]
    laid = places(sizes, ring_bytes(sizes))
    second = next(n for n, bucket in enumerate(buckets) if bucket.tensors[0].name == "output")
    assert [place.after for place in laid[: second + 1]] == [0] * (second + 1)


def test_views_are_the_memory_itself():
    (bucket,) = make_buckets({"a": (2, 3), "b": (4,)}, 4, 10**6)
    memory = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    views = bucket.views(memory, torch.float32)
    views["b"].fill_(1.5)
    assert [placed.offset for placed in bucket.tensors] == [0, 64]
    assert memory[64:80].view(torch.float32).tolist() == [1.5] * 4
    assert views["a"].shape == (2, 3)


@pytest.mark.parametrize("size, count", [(1, 3), (128, 2), (192, 1)])
def test_the_size_decides_how_many_there_are(size: int, count: int):
    assert len(make_buckets({"a": (16,), "b": (16,), "c": (16,)}, 4, size)) == count
