"""avg@k, pass@k, cons@k and their intervals: against enumeration, simulation and known values."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from megatron_dapo.algo.estimates import consensus, evaluate_problem_set, mean_over_problems, pass_at_k


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (8, 1)])
def test_pass_at_k_equals_the_share_of_all_draws_that_hold_a_right_response(n, c):
    responses = [i < c for i in range(n)]
    for k in range(1, n + 1):
        draws = [any(draw) for draw in combinations(responses, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (4, 5, 2), (4, 2, 0)])
def test_pass_at_k_refuses_counts_that_cannot_be(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k} from {n}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    "preds, correct, chance",
    [
        (["3", "3", "4"], [True, True, False], 1.0),
        (["3", "4", "4"], [True, False, False], 0.0),
        (["3", "4"], [True, False], 1 / 2),
        (["3", "4", "5"], [False, True, False], 1 / 3),
        (["[INVALID]", "[INVALID]", "4"], [False, False, True], 0.0),  # a missing answer votes too
    ],
)
def test_consensus_takes_the_expected_value_over_tied_predictions(preds, correct, chance):
    assert consensus(np.array(correct), preds) == pytest.approx(chance)


def test_a_set_of_problems_worked_by_hand():
    correct = [np.array([True, False, False, False]), np.array([True, True, True, False]), np.zeros(4, bool)]
    preds = [["1", "2", "2", "2"], ["7", "7", "7", "8"], ["a", "b", "c", "d"]]
    found = evaluate_problem_set(correct, preds)
    assert (found.problems, found.k) == (3, 4)
    assert found.avg.value == pytest.approx((1 / 4 + 3 / 4 + 0) / 3)
    assert list(found.pass_at) == [1, 2, 4]
    assert found.pass_at[1].value == pytest.approx(found.avg.value)
    assert found.pass_at[2].value == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found.pass_at[4].value == pytest.approx(2 / 3)
    assert found.cons.value == pytest.approx(1 / 3)


def test_problems_with_unequal_numbers_of_responses_use_the_smallest_for_k():
    found = evaluate_problem_set([np.array([True, False, True]), np.array([True] * 6)], [["1", "2", "1"], ["1"] * 6])
    assert (found.k, list(found.pass_at)) == (3, [1, 2, 3])
    assert found.avg.value == pytest.approx((2 / 3 + 1) / 2)


def test_the_interval_of_independent_trials_is_wilsons():
    # 8 of 10, z = 1.96: 0.4902 to 0.9433 (Newcombe 1998); ours has one trial fewer, by ddof = 1.
    estimate = mean_over_problems([1.0] * 8 + [0.0] * 2)
    assert (estimate.low, estimate.high) == pytest.approx((0.4902, 0.9433), abs=0.02)


def test_the_interval_has_a_width_and_stays_in_range_where_every_problem_agrees():
    none, all_ = mean_over_problems([0.0] * 30), mean_over_problems([1.0] * 30)
    assert (none.low, none.high) == pytest.approx((0.0, 0.1135), abs=1e-4)  # z² / (n + z²)
    assert (all_.low, all_.high) == pytest.approx((1 - 0.1135, 1.0), abs=1e-4)


def test_the_interval_counts_problems_and_not_responses():
    """Responses to a problem agree fully: 32 of each teach no more than one."""
    right = [i % 2 == 0 for i in range(40)]
    many = evaluate_problem_set([np.array([r] * 32) for r in right], [["x"] * 32 for _ in right])
    one = evaluate_problem_set([np.array([r]) for r in right], [["x"] for _ in right])
    assert many.avg == one.avg


def test_the_interval_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        chances_P = rng.beta(0.5, 0.8, size=60)  # hard and easy problems, as a policy in training has them
        values_P = rng.binomial(16, chances_P) / 16
        estimate = mean_over_problems(values_P.tolist())
        held += estimate.low <= 0.5 / 1.3 <= estimate.high
    assert 930 <= held <= 970


@pytest.mark.parametrize(
    "correct, preds, named",
    [
        ([], [], "0 problems"),
        ([np.array([True])], [], "1 problems with 0"),
        ([np.array([True]), np.zeros(0, bool)], [["1"], []], "problem 1 has 0"),
        ([np.array([True])], [["1", "2"]], "1 judged responses and 2"),
    ],
)
def test_a_set_that_cannot_be_judged_is_refused(correct, preds, named):
    with pytest.raises(ValueError, match=named):
        evaluate_problem_set(correct, preds)
