"""How much a response repeats itself: the first sign of a policy that has gone astray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nltk.util import ngrams
from numpy.typing import NDArray


def ngram_repetition(token_ids: Sequence[int] | NDArray[np.integer], n: int = 4) -> float:
    """The share of a response's n-grams that are repeats: 1 - distinct / total; 0 for fewer than n tokens."""
    tokens = token_ids.tolist() if isinstance(token_ids, np.ndarray) else token_ids
    total = len(tokens) - n + 1
    if total <= 0:
        return 0.0
    return 1 - len(set(ngrams(tokens, n))) / total
