"""Buckets in a ring: nothing is written over before it was read, by simulating every byte of random rings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.sync.ring import places, ring_bytes

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def with_room(sizes: list[int]) -> st.SearchStrategy[tuple[list[int], int]]:
    return st.tuples(st.just(sizes), st.integers(max(sizes), 4 * max(sizes)))


@given(SIZES.flatmap(with_room))
@settings(max_examples=300)
def test_no_byte_is_written_before_all_that_lay_there_was_released(given_: tuple[list[int], int]):
    sizes, capacity = given_
    holds: list[int | None] = [None] * capacity  # [byte] the last bucket written there
    for index, (size, place) in enumerate(zip(sizes, places(sizes, capacity), strict=True)):
        assert 0 <= place.start <= capacity - size, "in one piece"
        for byte in range(place.start, place.start + size):
            held = holds[byte]
            assert held is None or held < place.after, f"bucket {index} over bucket {held}"
            holds[byte] = index


@given(SIZES.flatmap(with_room))
@settings(max_examples=300)
def test_a_bucket_waits_for_no_more_than_those_before_it_and_only_where_it_must(given_: tuple[list[int], int]):
    """It never waits for itself or a later one, which would be for ever, and the last it waits for lay there."""
    sizes, capacity = given_
    laid = places(sizes, capacity)
    for index, (size, place) in enumerate(zip(sizes, laid, strict=True)):
        assert place.after <= index
        if place.after:
            last = laid[place.after - 1]
            assert last.start < place.start + size
            assert place.start < last.start + sizes[place.after - 1]


def test_small_buckets_do_not_wait_for_a_large_one_beside_them():
    laid = places([20, 60, 20, 20, 20], 120)
    assert [(place.start, place.after) for place in laid] == [(0, 0), (20, 0), (80, 0), (100, 0), (0, 1)]


def test_one_that_does_not_fit_before_the_end_lies_at_the_start():
    laid = places([50, 40, 30, 60], 110)
    assert [(place.start, place.after) for place in laid] == [(0, 0), (50, 0), (0, 1), (30, 2)]


@pytest.mark.parametrize(
    ("sizes", "wanted"), [([7], 7), ([7, 5], 12), ([16] * 10, 48), ([16, 65, 65, 16], 162), ([16] * 8 + [65], 193)]
)
def test_a_ring_is_three_times_the_largest_bucket_or_the_whole_push(sizes: list[int], wanted: int):
    assert ring_bytes(sizes) == wanted


def test_a_bucket_that_is_larger_than_the_ring_is_refused():
    with pytest.raises(ValueError, match="a bucket of 12 bytes in a ring of 11"):
        places([3, 12], 11)
