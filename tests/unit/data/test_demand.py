"""How many prompts are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.data.demand import PassRate


def test_nothing_seen_or_nothing_passed_draws_a_full_generation_batch() -> None:
    assert PassRate().demand(1, 96) == 96
    assert PassRate().after(96, 0, 96).demand(1, 96) == 96


def test_when_everything_passes_nothing_is_drawn_in_vain() -> None:
    assert PassRate().after(96, 96, 96).demand(17, 96) == 17


@given(
    seen=st.lists(st.tuples(st.integers(1, 96), st.floats(0, 1)), max_size=200),
    missing=st.integers(1, 512),
)
def test_demand_lies_between_what_is_missing_and_a_generation_batch(seen: list, missing: int) -> None:
    rate = PassRate()
    for drawn, share in seen:
        rate = rate.after(drawn, round(drawn * share), 96)
    assert min(missing, 96) <= rate.demand(missing, 96) <= 96


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("missing", [4, 64, 400])
def test_a_generation_batch_brings_enough_about_nine_times_in_ten(rate: float, missing: int) -> None:
    seen = PassRate(1000.0, 1000 * rate)
    accepted = np.random.default_rng(0).binomial(seen.demand(missing, 10**6), rate, 20_000)
    assert 0.86 < (accepted >= missing).mean() < 0.97
    assert accepted.mean() < missing + 2 * np.sqrt(missing) + 2


def test_what_was_seen_counts_half_after_two_generation_batches() -> None:
    rate = PassRate().after(50, 50, 50)
    assert (rate.drawn, rate.accepted) == (50, 50)
    later = rate.after(100, 0, 50)
    assert (later.drawn, later.accepted) == (125, 25)
