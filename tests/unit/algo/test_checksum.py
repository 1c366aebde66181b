"""The checksum against a slow loop over Python's integers; slices add up; every kind of mistake shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.algo.checksum import add_checksums, checksum

MASK = 2**64 - 1


def splitmix64(place: int) -> int:
    z = place * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return (z ^ z >> 31) | 1


def slow_checksum(bits: list[list[int]]) -> int:
    total = 0
    for r, row in enumerate(bits):
        for c, value in enumerate(row):
            total += splitmix64(r + 1) * splitmix64(c + 1 + 2**40) * value
    return total & MASK


def test_it_is_the_sum_of_factors_times_bits():
    values = torch.tensor([[1.5, -2.0, 0.0], [-1e-3, torch.inf, 3e-40]])
    bits = values.view(torch.int32).tolist()
    assert checksum(values) == slow_checksum(bits)
    assert checksum(values.to(torch.bfloat16)) == slow_checksum(values.to(torch.bfloat16).view(torch.int16).tolist())
    assert checksum(values[0]) == slow_checksum([[value] for value in bits[0]])  # a vector is one column


@given(st.data())
@settings(max_examples=60)
def test_disjoint_slices_add_up_to_the_whole(data: st.DataObject):
    rows, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    whole = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols)).to(dtype)
    row_cut, col_cut = data.draw(st.integers(0, rows)), data.draw(st.integers(0, cols))
    parts = [
        checksum(whole[top:bottom, left:right], top, left)
        for top, bottom in ((0, row_cut), (row_cut, rows))
        for left, right in ((0, col_cut), (col_cut, cols))
    ]
    assert add_checksums(parts) == checksum(whole)


def test_blocks_do_not_change_it(monkeypatch: pytest.MonkeyPatch):
    whole = torch.randn(50, 7)
    plain = checksum(whole)
    monkeypatch.setattr("megatron_dapo.algo.checksum._BLOCK", 21)
    assert checksum(whole) == plain


def test_one_changed_bit_anywhere_changes_it():
    whole = torch.randn(6, 5)
    plain = checksum(whole)
    for place in range(30):
        for bit in (0, 15, 31):
            changed = whole.clone()
            changed.view(torch.int32).view(-1)[place] ^= torch.tensor(1 << bit).to(torch.int32)
            assert checksum(changed) != plain, (place, bit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sign_of_a_zero_does_not_count(dtype: torch.dtype):
    values = torch.tensor([[1.5, -0.0], [0.0, -2.0]], dtype=dtype)
    assert values.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, 1] != 0
    assert checksum(values) == checksum(torch.tensor([[1.5, 0.0], [0.0, -2.0]], dtype=dtype))
    assert values[0, 1].signbit(), "the tensor itself stays"


def test_rows_and_columns_that_changed_places_and_a_transpose_show():
    whole = torch.randn(6, 6)
    sums = {checksum(m) for m in (whole, whole[[1, 0, 2, 3, 4, 5]], whole[:, [0, 1, 3, 2, 4, 5]], whole.T, -whole)}
    assert len(sums) == 5


def test_an_empty_slice_is_nothing():
    assert checksum(torch.zeros(0, 4), 3, 0) == 0
    assert checksum(torch.zeros(4, 4)) == 0
