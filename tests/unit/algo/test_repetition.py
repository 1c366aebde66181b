"""The share of repeated n-grams."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dapo.algo.repetition import ngram_repetition


@pytest.mark.parametrize(
    "tokens, n, share",
    [
        ([1, 2, 3, 4, 5], 4, 0.0),
        ([1] * 5, 4, 1 / 2),  # two 4-grams, one distinct
        ([1, 2] * 4, 2, 1 - 2 / 7),  # 12 21 12 21 12 21 12
        ([1, 2, 3], 4, 0.0),  # too short to repeat
        ([], 4, 0.0),
    ],
)
def test_shares_counted_by_hand(tokens, n, share):
    assert ngram_repetition(tokens, n) == pytest.approx(share)
    assert ngram_repetition(np.array(tokens, np.int64), n) == pytest.approx(share)
