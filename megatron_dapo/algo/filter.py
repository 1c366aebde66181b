"""Which groups teach anything: one whose responses all earned the same has no advantage to learn from.

Source: DAPO, arXiv 2503.14476, eq. 11, for any metric. The recipe asks whether the deviation is above 0, which is
the same rule but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence


def is_informative(values: Sequence[float]) -> bool:
    """Whether a group is kept, given its responses' metric: max != min. A group of one is kept, as in the recipe.

    Raises:
        ValueError: no value at all.
    """
    if not values:
        raise ValueError("a group without a response cannot be kept or dropped; count it apart")
    return len(values) == 1 or max(values) != min(values)
