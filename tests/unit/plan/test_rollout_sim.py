from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_dapo.plan.engine_sim import EngineModel
from megatron_dapo.plan.rollout_sim import POLICIES, RolloutSettings, simulate
from megatron_dapo.plan.workload import Workload

# One second a step, whatever it holds: a batch takes as long as its longest response.
ENGINE = EngineModel(1.0, 0.0, 0.0, 0.0, 0.0, max_sequences=10_000, cache_tokens=10**9)
LOAD = Workload(mean=300.0, sigma=0.9, between=0.3, limit=2000, prompt=10, kept_share=0.5, n=8)
SETTINGS = RolloutSettings(engines=4, wanted=64, batch=192)
EQUAL = replace(LOAD, sigma=0.0, mean=100.0)


def test_rounds_take_whole_batches_and_throw_the_surplus_away() -> None:
    found = simulate("rounds", ENGINE, SETTINGS, EQUAL)
    assert (found.batches, found.prompts, found.seconds) == (1, 192, found.steps[0].seconds)
    assert found.seconds in (99, 100)  # a length is cut to whole tokens
    tokens = found.seconds * 8 * 192
    kept = [192 * 8 * found.seconds - step.dropped for step in found.steps]
    assert [step.discarded for step in found.steps] == [k - 64 * 8 * found.seconds for k in kept]
    assert found.written == tokens


def test_adaptive_draws_what_the_pass_rate_asks_and_throws_nothing_away() -> None:
    found = simulate("adaptive", ENGINE, SETTINGS, LOAD, steps=6)
    assert found.discarded_share == 0
    assert found.prompts < 160
    assert found.written < 0.8 * simulate("rounds", ENGINE, SETTINGS, LOAD, steps=6).written


def test_adaptive_discards_where_the_configuration_says_so() -> None:
    assert simulate("adaptive", ENGINE, replace(SETTINGS, carry=False), LOAD, steps=6).discarded_share > 0


@pytest.mark.parametrize("policy", ["rounds", "adaptive"])
def test_batches_awaited_to_their_end_have_no_length_bias(policy: str) -> None:
    found = simulate(policy, ENGINE, replace(SETTINGS, wanted=512, batch=1536), LOAD, steps=8)
    assert abs(found.length_bias) < 0.02


def test_the_first_to_finish_are_short_and_faster() -> None:
    rounds = simulate("rounds", ENGINE, SETTINGS, LOAD, steps=4)
    first = simulate("oversample", ENGINE, SETTINGS, LOAD, steps=4)
    assert first.seconds < rounds.seconds
    assert first.length_bias < -0.05


def test_what_was_aborted_is_lost_with_oversampling_and_goes_on_with_partial() -> None:
    first = simulate("oversample", ENGINE, SETTINGS, LOAD, steps=8)
    partial = simulate("partial", ENGINE, SETTINGS, LOAD, steps=8)
    assert first.discarded_share > 0.05
    assert partial.discarded_share == 0
    assert abs(partial.length_bias) < abs(first.length_bias)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_token_written_is_trained_on_dropped_discarded_or_left_for_later(policy: str) -> None:
    found = simulate(policy, ENGINE, SETTINGS, LOAD, steps=1)
    (step,) = found.steps
    left = step.written - step.dropped - step.discarded - int(step.lengths.sum())
    assert left >= 0
    assert left == 0 or policy in ("adaptive", "partial")


def test_stopping_when_enough_is_there_loses_and_doubles_no_token() -> None:
    """Times are no round numbers here: the stop must not miss the very step that brings the last group."""
    engine = EngineModel(0.0071, 0.013, 1.7e-4, 3.3e-8, 1e-5, max_sequences=200, cache_tokens=60_000)
    for seed in range(12):
        (step,) = simulate("oversample", engine, SETTINGS, LOAD, steps=1, seed=seed).steps
        assert step.written == step.dropped + step.discarded + int(step.lengths.sum())


def test_without_a_filter_all_policies_but_those_that_abort_draw_what_is_wanted() -> None:
    plain = replace(LOAD, kept_share=1.0)
    for policy in ("rounds", "adaptive"):
        found = simulate(policy, ENGINE, replace(SETTINGS, batch=64), plain)
        assert (found.prompts, found.batches, found.dropped_share) == (64, 1, 0)


def test_a_limit_on_generation_batches_ends_a_step_with_fewer_groups() -> None:
    found = simulate("rounds", ENGINE, replace(SETTINGS, batch=32, max_batches=2), LOAD, steps=1)
    assert (found.batches, found.prompts) == (2, 64)
    assert len(found.steps[0].lengths) < 64 * 8


def test_the_same_seed_gives_the_same_rollout() -> None:
    a, b = (simulate("partial", ENGINE, SETTINGS, LOAD, seed=5) for _ in range(2))
    assert a.seconds == b.seconds
    assert all(np.array_equal(x.lengths, y.lengths) for x, y in zip(a.steps, b.steps, strict=True))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="there are rounds, adaptive, oversample, partial"):
        simulate("lucky", ENGINE, SETTINGS, LOAD)


def test_a_response_that_goes_on_later_is_not_counted_twice() -> None:
    found = simulate("partial", ENGINE, SETTINGS, LOAD, steps=8)
    a_response = found.written / (found.prompts * LOAD.n)  # all but what the last step left
    assert a_response < 1.02 * LOAD.mean
