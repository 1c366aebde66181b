"""Soft overlong punishment: a response that comes near the length limit pays for it, little by little.

Overlong *filtering* (a truncated response's tokens get weight 0) is another thing and needs no arithmetic.
Source: DAPO, arXiv 2503.14476, eq. 13, as the public recipe reads it.
"""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import NDArray


@overload
def overlong_penalty(length: int, max_response_length: int, buffer_len: int, penalty_factor: float) -> float: ...
@overload
def overlong_penalty(
    length: NDArray[np.integer], max_response_length: int, buffer_len: int, penalty_factor: float
) -> NDArray[np.float64]: ...
def overlong_penalty(
    length: int | NDArray[np.integer], max_response_length: int, buffer_len: int, penalty_factor: float
) -> float | NDArray[np.float64]:
    """0 up to max_response_length - buffer_len tokens, then falling in a line to -penalty_factor at the maximum.

    Args:
        length: the response's own tokens, never the prompt's; one number or an array.

    Raises:
        ValueError: a buffer that is empty or longer than the response may be.
    """
    if not 0 < buffer_len <= max_response_length:
        raise ValueError(
            f"overlong_buffer.len is {buffer_len}; it must lie in 1..max_response_length = {max_response_length}; "
            "set overlong_buffer.enable=false for no penalty"
        )
    excess = length - (max_response_length - buffer_len)
    if isinstance(excess, int):
        return min(-excess / buffer_len * penalty_factor, 0.0)
    return np.minimum(-excess / buffer_len * penalty_factor, 0.0)
