"""A checksum of a matrix that slices of it add up to: sum over r, c of a[r] · b[c] · bits[r, c], modulo 2^64.

a and b are fixed pseudo-random odd numbers of a row's and a column's place in the whole tensor (splitmix64). So the
owner of a slice computes its part alone, in any order, and parts are added; nothing is gathered. One changed element
always changes the sum: odd factors can be divided out modulo 2^64, and bits fit in 32. Several changes cancel with a
chance of about 2^-32 at worst (only sign bits of 32-bit numbers), 2^-60 in general. It finds mistakes, not forgeries.

-0 counts as 0: an engine that keeps a matrix packed can only tell what it multiplies with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_MODULUS = 1 << 64
_BLOCK = 1 << 22  # elements that are widened to 64 bits at once
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_ROW_STREAM, _COLUMN_STREAM = 0, 1 << 40


def checksum(tensor: Tensor, first_row: int = 0, first_col: int = 0) -> int:
    """Of the elements' bits, as they lie in the tensor's dtype, -0 as 0. In [0, 2^64).

    Args:
        tensor: one- or two-dimensional, elements of 1, 2 or 4 bytes; a whole tensor or a rectangle of it.
        first_row, first_col: where in the whole tensor it begins.
    """
    matrix = tensor.detach().reshape(-1, 1) if tensor.dim() == 1 else tensor.detach()
    rows, cols = matrix.shape
    if rows == 0 or cols == 0:
        return 0
    row_factors = _odd_factors(first_row, rows, _ROW_STREAM, matrix.device)
    col_factors = _odd_factors(first_col, cols, _COLUMN_STREAM, matrix.device)
    total = 0
    height = max(1, _BLOCK // cols)
    for start in range(0, rows, height):
        as_bits = matrix[start : start + height].contiguous().view(_BITS[matrix.element_size()])
        bits = as_bits.to(torch.int64)
        bits.masked_fill_(bits == torch.iinfo(as_bits.dtype).min, 0)
        row_sums = bits.mul_(col_factors).sum(1)
        total += int((row_sums * row_factors[start : start + height]).sum())
    return total % _MODULUS


def add_checksums(parts: Iterable[int]) -> int:
    """The checksum of what disjoint slices make up together."""
    return sum(parts) % _MODULUS


def _odd_factors(first: int, count: int, stream: int, device: torch.device) -> Tensor:
    """splitmix64 of the places first, first + 1, ..., made odd; arithmetic wraps around."""
    place = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device) + stream
    mixed = place * _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    return number - _MODULUS if number >= _MODULUS // 2 else number
