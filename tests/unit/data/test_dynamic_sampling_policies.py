"""What a step does when too few or too many groups are accepted."""

from __future__ import annotations

import pytest

from megatron_dapo.data.dynamic_sampling import SamplingExhausted
from megatron_dapo.types import RewardResult
from tests.unit.data.fakes import assert_sums, draws, failed, graded, sampler, steps


def test_a_pass_rate_of_zero_draws_full_generation_batches_up_to_the_budget() -> None:
    source = sampler(lambda key, text: graded(0.0), max_num_gen_batches=3)
    with pytest.raises(SamplingExhausted, match="0 of 8 groups") as caught:
        source.collect(0)
    assert (caught.value.stats.prompts_drawn, caught.value.stats.generation_batches) == (36, 3)
    assert "36 all wrong" in str(caught.value)
    assert "max_num_gen_batches" in str(caught.value)
    assert "easier" in str(caught.value)


def test_the_budget_counts_prompts_so_that_small_generation_batches_use_it_up_no_sooner() -> None:
    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        return graded(float(key[1] == 0 and (key[0] < 60 or key[0] % 3 == 0)))

    source = sampler(verdict, max_num_gen_batches=1, surplus="discard", train_batch_size=4, mini_batch_size=1)
    taken = [source.collect(version).stats for version in range(14)]
    assert max(stats.generation_batches for stats in taken) > 1
    assert max(stats.prompts_drawn for stats in taken) == 12


def few(key: tuple[int, int], text: str) -> RewardResult:
    """Six of the first 24 groups teach something."""
    return graded(float(key[1] == 0 and key[0] % 4 == 0))


def test_an_exhausted_step_that_carries_trains_on_whole_mini_batches_and_keeps_the_rest() -> None:
    source = sampler(few, max_num_gen_batches=2)
    step = source.collect(0)
    assert draws(step) == [0, 4, 8, 12]
    assert not step.exhausted
    assert step.stats.groups_carried_out == 2
    assert_sums(step.stats)
    assert draws(source.collect(1))[:2] == [16, 20]


def test_surplus_that_is_discarded_is_not_the_rest_of_an_exhausted_step() -> None:
    step = sampler(few, max_num_gen_batches=2, surplus="discard").collect(0)
    assert (step.stats.groups_carried_out, step.stats.groups_discarded) == (2, 0)


def test_an_exhausted_step_with_the_policy_error_raises_and_loses_nothing() -> None:
    source = sampler(few, max_num_gen_batches=2, on_exhausted="error")
    with pytest.raises(SamplingExhausted, match="6 of 8 groups"):
        source.collect(0)
    assert len(source.state_dict()["carried"]) == 6
    assert draws(source.collect(1)) == [0, 4, 8, 12, 16, 20, 24, 28]


def test_an_exhausted_step_without_a_full_mini_batch_raises() -> None:
    source = sampler(few, max_num_gen_batches=1)
    with pytest.raises(SamplingExhausted, match=r"3 of 8 groups are there .a mini-batch has 4."):
        source.collect(0)
    assert_sums(source.total)


def test_an_exhausted_step_with_the_policy_stop_ends_the_run_and_keeps_what_was_accepted() -> None:
    source = sampler(few, max_num_gen_batches=2, on_exhausted="stop")
    step = source.collect(0)
    assert (step.groups, step.exhausted) == ((), True)
    assert len(source.state_dict()["carried"]) == 6


def test_a_dataset_whose_epochs_are_over_ends_the_run_with_its_last_whole_mini_batches() -> None:
    source = sampler(few, prompts=27, epochs=1, on_exhausted="error")
    step = source.collect(0)
    assert draws(step) == [0, 4, 8, 12]
    assert step.exhausted
    assert step.stats.prompts_drawn == 27


def test_surplus_starts_the_next_step() -> None:
    source = sampler(gen_batch_size=20)
    first, second = steps(source, 2)
    assert first.stats.groups_carried_out == second.stats.groups_carried_in > 0
    used = draws(first) + draws(second)
    assert used == sorted(used)
    assert all(draw % 6 in (0, 1, 2) for draw in used)
    assert used == [draw for draw in range(used[-1] + 1) if draw % 6 in (0, 1, 2)]


def test_surplus_can_be_discarded() -> None:
    source = sampler(gen_batch_size=20, surplus="discard")
    first, second = steps(source, 2)
    assert first.stats.groups_discarded == 3
    assert second.stats.groups_carried_in == 0
    assert min(draws(second)) >= 20


def test_a_carried_group_is_dropped_past_the_staleness_that_is_allowed() -> None:
    for version, fresh in [(1, True), (2, False)]:
        source = sampler(gen_batch_size=20, max_staleness=1)
        carried = source.collect(0).stats.groups_carried_out
        source._rollout.engine.version = version
        step = source.collect(version)
        assert step.stats.groups_stale == (0 if fresh else carried)
        assert any(group.weight_version == 0 for group in step.groups) == fresh
        assert_sums(step.stats)


def test_a_redraw_is_made_even_when_the_datasets_epochs_are_over() -> None:
    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        return failed("error") if key == (11, 0) else graded(float(key[1] == 0))

    step = sampler(verdict, prompts=12, epochs=1, train_batch_size=12).collect(0)
    assert draws(step) == [*range(11), 12]
    assert sorted(group.prompt.index for group in step.groups) == list(range(12))
    assert not step.exhausted
