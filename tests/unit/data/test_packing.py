"""Sequences over ranks and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dapo.data.packing import Plan, plan_micro_batches

LENGTHS = st.lists(st.integers(2, 100), min_size=1, max_size=120).map(np.array)


def all_sequences(plan: Plan) -> list[int]:
    return sorted(index for rank in plan for held in rank for index in held)


def rank_cost(plan: Plan, cost_S: np.ndarray) -> list[float]:
    return [float(sum(cost_S[list(held)].sum() for held in rank)) for rank in plan]


@given(LENGTHS, st.integers(1, 9), st.integers(100, 400), st.integers(1, 4), st.sampled_from([0.0, 0.01]))
def test_every_sequence_once_within_the_limit_and_as_many_micro_batches_on_each_rank(
    lengths: np.ndarray, dp_size: int, max_tokens: int, multiple_of: int, quadratic: float
) -> None:
    plan = plan_micro_batches(lengths, dp_size, max_tokens=max_tokens, multiple_of=multiple_of, quadratic=quadratic)
    assert len(plan) == dp_size
    assert all_sequences(plan) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) > 0
    assert len(plan[0]) % multiple_of == 0
    assert all(lengths[list(held)].sum() <= max_tokens for rank in plan for held in rank)


@given(LENGTHS, st.integers(1, 9), st.sampled_from([0.0, 0.01]))
def test_ranks_differ_in_cost_by_at_most_one_sequence(lengths: np.ndarray, dp_size: int, quadratic: float) -> None:
    plan = plan_micro_batches(lengths, dp_size, max_tokens=200, quadratic=quadratic)
    cost_S = lengths + quadratic * lengths**2
    costs = rank_cost(plan, cost_S)
    assert max(costs) - min(costs) <= cost_S.max() + 1e-9


@given(LENGTHS, st.integers(1, 9), st.integers(1, 7))
def test_with_a_limit_on_sequences_no_rank_has_more_micro_batches_than_the_counts_call_for(
    lengths: np.ndarray, dp_size: int, most: int
) -> None:
    plan = plan_micro_batches(lengths, dp_size, max_sequences=most)
    assert all_sequences(plan) == list(range(len(lengths)))
    assert all(len(held) <= most for rank in plan for held in rank)
    per_rank = -(-len(lengths) // dp_size)
    assert {len(rank) for rank in plan} == {-(-per_rank // most)}


@given(LENGTHS, st.integers(1, 4))
def test_the_number_of_micro_batches_is_near_the_fewest(lengths: np.ndarray, dp_size: int) -> None:
    plan = plan_micro_batches(lengths, dp_size, max_tokens=150)
    fullest = max(rank_cost(plan, lengths))
    assert len(plan[0]) <= max(np.ceil(2 * fullest / 150), 1)


def test_long_tailed_responses_fill_nearly_all_of_the_limit() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(8.3, 0.7, 8192).astype(int) + 100, 22528)
    plan = plan_micro_batches(lengths, 16, max_tokens=32768)
    assert len(plan[0]) == int(np.ceil(lengths.sum() / 16 / 32768))
    costs = rank_cost(plan, lengths)
    assert max(costs) / np.mean(costs) < 1.001


def test_a_small_plan_worked_by_hand() -> None:
    lengths = np.array([3, 8, 5, 4, 6, 2])
    # By length 8 6 5 4 3 2: rank 0 takes 8, rank 1 6, rank 1 5 (11), rank 0 4 (12), rank 1 3 (14), rank 0 2 (14).
    assert plan_micro_batches(lengths, 2, max_tokens=8) == (((1,), (3, 5)), ((0, 2), (4,)))
    assert plan_micro_batches(lengths, 2, max_tokens=14) == (((1, 3, 5),), ((0, 2, 4),))


def test_attention_moves_sequences_away_from_the_rank_with_the_longest() -> None:
    lengths = np.array([100] + [10] * 14)
    by_tokens = plan_micro_batches(lengths, 2, max_tokens=100)
    by_cost = plan_micro_batches(lengths, 2, max_tokens=100, quadratic=0.01)
    assert rank_cost(by_tokens, lengths) == [120, 120]
    assert rank_cost(by_cost, lengths) == [100, 140]  # costs 200 and 14 x 11


def test_a_rank_without_work_has_empty_micro_batches_at_the_end() -> None:
    plan = plan_micro_batches(np.array([5, 6]), 3, max_tokens=10, multiple_of=2)
    assert plan == (((1,), ()), ((0,), ()), ((), ()))


def test_micro_batches_of_a_rank_are_evened_out() -> None:
    [rank] = plan_micro_batches(np.array([10] * 9), 1, max_tokens=80)
    assert sorted(map(len, rank)) == [4, 5]


def test_a_packing_that_evening_out_would_break_stays_as_tight_as_it_was() -> None:
    assert plan_micro_batches(np.array([3, 3, 2, 2, 2]), 1, max_tokens=6) == (((0, 1), (2, 3, 4)),)


def test_the_plan_is_a_function_of_its_arguments() -> None:
    lengths = np.random.default_rng(1).integers(1, 50, 200)
    assert plan_micro_batches(lengths, 4, max_tokens=90) == plan_micro_batches(lengths.copy(), 4, max_tokens=90)


def test_a_sequence_over_the_limit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"2 of 4 sequences .* 100 tokens \(sequence 2 has 150\); raise"):
        plan_micro_batches(np.array([5, 101, 150, 7]), 2, max_tokens=100)


def test_no_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="no sequence to pack"):
        plan_micro_batches(np.zeros(0, np.int64), 2, max_tokens=100)


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 10, "max_sequences": 2}])
def test_one_limit_is_needed_and_only_one(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        plan_micro_batches(np.array([5]), 2, **limits)
