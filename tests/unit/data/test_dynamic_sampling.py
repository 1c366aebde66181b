"""Which groups a step gets, and what is counted, saved and refused. Policies: test_dynamic_sampling_policies.py."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dapo.data.judging import UnknownMetricError
from megatron_dapo.types import Group, RewardResult
from tests.unit.data.fakes import N, assert_sums, bits, draws, failed, graded, mixed, sampler, steps


def one_in_ten(key: tuple[int, int], text: str) -> RewardResult:
    """Nine groups of ten are uniform: all right or all wrong."""
    draw_index, sample_index = key
    if draw_index % 10 == 3:
        return graded(float(sample_index == 1))
    return graded(float(draw_index % 3 == 0))


@settings(max_examples=25)
@given(order_seed=st.integers(0, 2**32))
def test_what_finishes_first_changes_no_bit_of_a_batch(order_seed: int) -> None:
    aborts = {(1, 2): 1, (9, 0): 2, (15, 1): 9}

    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        return failed("timeout") if key in [(4, 1), (20, 3)] else mixed(key, text)

    wanted = steps(sampler(verdict, order_seed=0, aborts=aborts), 4)
    found = steps(sampler(verdict, order_seed=order_seed, aborts=aborts), 4)
    assert list(map(bits, found)) == list(map(bits, wanted))


def test_nine_uniform_groups_in_ten_lose_and_double_nothing() -> None:
    source = sampler(one_in_ten)
    taken = steps(source, 10)
    total = source.total
    informative = [draw for draw in range(total.prompts_drawn) if draw % 10 == 3]
    used = [draw for step in taken for draw in draws(step)]
    assert used == informative[: len(used)]
    assert len(used) == 80
    assert len(informative) - len(used) == taken[-1].stats.groups_carried_out == total.groups_accepted - 80
    assert total.groups_all_right + total.groups_all_wrong == total.groups_uniform
    assert total.groups_uniform_other == 0
    for step in taken:
        assert_sums(step.stats)
    assert_sums(total)


def test_every_group_holds_all_its_responses_in_sample_order() -> None:
    for group in sampler().collect(0).groups:
        assert [s.completion.sample_index for s in group.samples] == list(range(N))


def test_a_prompt_drawn_twice_gives_different_responses() -> None:
    step = sampler(prompts=1, enable=False).collect(0)
    assert len({group.prompt.index for group in step.groups}) == 1
    assert len({s.completion.token_ids.tobytes() for g in step.groups for s in g.samples}) > 8 * N * 0.8


def test_an_all_wrong_group_whose_lengths_differ_is_dropped_by_acc_and_kept_by_seq_reward() -> None:
    def wrong(key: tuple[int, int], text: str) -> RewardResult:
        return graded(0.0) if key[0] == 5 else graded(float(key[1] == 0))

    by_acc = sampler(wrong).collect(0)
    by_reward = sampler(wrong, metric="seq_reward").collect(0)
    assert draws(by_acc) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert draws(by_reward) == [0, 1, 2, 3, 4, 5, 6, 7]
    wrong_group = by_reward.groups[5]
    assert len({s.length for s in wrong_group.samples}) > 1
    assert len({s.reward for s in wrong_group.samples}) > 1
    assert by_acc.stats.groups_all_wrong == by_reward.stats.groups_all_wrong == 1
    assert (by_acc.stats.groups_uniform, by_reward.stats.groups_uniform) == (1, 0)


def test_the_reward_is_the_score_plus_the_overlong_penalty() -> None:
    for group in sampler().collect(0).groups:
        for s in group.samples:
            assert s.overlong_penalty == -s.length / 12
            assert s.reward == s.result.score + s.overlong_penalty


@pytest.mark.parametrize("at", range(1, 6))
def test_a_run_restored_from_its_state_goes_on_like_one_that_was_never_stopped(at: int) -> None:
    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        return failed("error") if key[0] % 7 == 2 and key[1] == 1 else mixed(key, text)

    rule = {"max_staleness": 1, "prompts": 15}
    wanted = steps(sampler(verdict, **rule), 8)
    first = sampler(verdict, **rule)
    steps(first, at)
    state = first.state_dict()
    assert state["carried"] or state["again"]
    second = sampler(verdict, order_seed=99, **rule)
    second.load_state_dict(pickle.loads(pickle.dumps(state)))
    found = [second.collect(version) for version in range(at, 8)]
    assert list(map(bits, found)) == list(map(bits, wanted[at:]))


def test_the_state_is_plain() -> None:
    source = sampler(one_in_ten, train_batch_size=2, gen_batch_size=40)
    source.collect(0)

    def kinds(value: object) -> set[type]:
        if isinstance(value, dict):
            return {str}.union(*(kinds(v) for v in value.values()))
        if isinstance(value, list):
            return set().union(*map(kinds, value))
        return {type(value)}

    state = source.state_dict()
    assert state["carried"]
    assert kinds(state) <= {int, float, str, bool, np.ndarray}


def test_a_state_of_another_dataset_is_refused() -> None:
    state = sampler(prompts=50).state_dict()
    with pytest.raises(ValueError, match="rows was 50, now it is 51; train on the files"):
        sampler(prompts=51).load_state_dict(state)


def test_ctrl_c_leaves_the_sampler_as_it_was_before_the_step() -> None:
    wanted = steps(sampler(), 4)
    source = sampler()
    steps(source, 2)
    engine = source._rollout.engine
    before = pickle.dumps(source.state_dict())
    engine.interrupt_after = 5
    with pytest.raises(KeyboardInterrupt):
        source.collect(2)
    assert pickle.dumps(source.state_dict()) == before
    assert engine.pending == 0
    after = sampler()
    after.load_state_dict(pickle.loads(before))
    assert [bits(after.collect(version)) for version in (2, 3)] == list(map(bits, wanted[2:]))


def test_with_the_filter_off_every_group_is_accepted_and_none_is_drawn_in_vain() -> None:
    step = sampler(one_in_ten, enable=False, gen_batch_size=20).collect(0)
    assert draws(step) == list(range(8))
    assert (step.stats.prompts_drawn, step.stats.generation_batches) == (8, 1)
    assert step.stats.groups_uniform == 0
    assert step.stats.groups_all_right + step.stats.groups_all_wrong == 7


def test_a_group_of_one_is_kept() -> None:
    step = sampler(n=1).collect(0)
    assert draws(step) == list(range(8))


def test_the_first_generation_batch_is_full_and_later_ones_follow_the_pass_rate() -> None:
    source = sampler(lambda key, text: graded(float(key[1] % 2 and key[0] % 2)), gen_batch_size=100, train_batch_size=8)
    first = source.collect(0)
    assert (first.stats.prompts_drawn, first.stats.groups_carried_out) == (100, 42)
    for version in range(1, 6):
        source.collect(version)
    later = source.collect(6)
    assert 8 <= later.stats.prompts_drawn <= 40
    assert later.stats.generation_batches == 1


def test_a_group_with_too_few_scored_responses_is_dropped_and_its_prompt_drawn_once_more() -> None:
    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        is_first_prompt = text.startswith(f"{prompt}:")
        return failed("timeout") if is_first_prompt and key[1] == 2 else graded(float(key[1] == 0))

    prompt = sampler().collect(0).groups[0].prompt.index
    source = sampler(verdict, gen_batch_size=8)
    first, second = steps(source, 2)
    assert draws(first) == [1, 2, 3, 4, 5, 6, 7, 9]
    requests = [r for r in source._rollout.engine.submitted if r.sample_index == 0]
    assert [r.draw_index for r in requests if r.prompt_ids[0] == prompt + 1] == [0, 8]
    assert (first.stats.groups_short, first.stats.prompts_redrawn, first.stats.samples_timeout) == (2, 1, 2)
    assert second.stats.prompts_redrawn == 0
    assert_sums(first.stats)


def test_a_redraw_that_a_full_batch_leaves_over_comes_first_in_the_next_step() -> None:
    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        return failed("error") if key == (11, 0) else graded(float(key[1] == 0))

    source = sampler(verdict, surplus="discard")
    source.collect(0)
    assert len(source.state_dict()["again"]) == 1
    second = source.collect(1)
    assert second.stats.prompts_redrawn == 1
    assert second.groups[0].draw_index == 12
    assert second.groups[0].prompt.index == next(
        r.prompt_ids[0] - 1 for r in source._rollout.engine.submitted if r.draw_index == 11
    )


def test_no_draw_index_is_used_twice() -> None:
    source = sampler(lambda key, text: failed("error") if key[0] % 5 == 1 else mixed(key, text))
    steps(source, 5)
    keys = [(r.draw_index, r.sample_index) for r in source._rollout.engine.submitted]
    assert len(set(keys)) == len(keys) == source.total.prompts_drawn * N
    assert max(keys) == (source.total.prompts_drawn - 1, N - 1)


def test_a_group_may_be_smaller_where_min_valid_allows_it() -> None:
    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        return failed("error") if key == (2, 1) else graded(float(key[1] == 0))

    step = sampler(verdict, min_valid=3).collect(0)
    assert draws(step) == list(range(8))
    assert [s.completion.sample_index for s in step.groups[2].samples] == [0, 2, 3]
    assert (step.stats.groups_short, step.stats.samples_error) == (0, 1)
    assert_sums(step.stats)


def test_an_aborted_response_is_written_again_with_its_own_seed() -> None:
    source = sampler(aborts={(1, 2): 2})
    step = source.collect(0)
    tries = [r for r in source._rollout.engine.submitted if (r.draw_index, r.sample_index) == (1, 2)]
    assert len(tries) == 3
    assert len({r.seed for r in tries}) == 1
    assert (step.stats.aborts_retried, step.stats.samples_abort) == (2, 0)
    assert bits(step)[0] == bits(sampler().collect(0))[0]


def test_a_response_that_is_always_aborted_is_left_out_and_counted() -> None:
    source = sampler(aborts={(1, 2): 99})
    step = source.collect(0)
    assert (step.stats.aborts_retried, step.stats.samples_abort, step.stats.groups_short) == (2, 1, 1)
    assert 1 not in draws(step)


def test_sums_of_acc_and_score_are_over_all_that_was_scored() -> None:
    step = sampler(one_in_ten, train_batch_size=4).collect(0)
    drawn = range(step.stats.prompts_drawn)
    right = sum(one_in_ten((draw, sample), "").metrics["acc"] for draw in drawn for sample in range(N))
    assert step.stats.acc_sum == right
    assert step.stats.score_sum == 2 * right - step.stats.samples_scored


def test_a_metric_that_the_reward_does_not_return_is_refused_with_those_it_does() -> None:
    with pytest.raises(UnknownMetricError, match=r"metric=accuracy.* only acc, score for draw 0"):
        sampler(metric="accuracy").collect(0)


def test_a_metric_of_the_users_own_reward_can_filter() -> None:
    def verdict(key: tuple[int, int], text: str) -> RewardResult:
        return graded(0.0, style=float(key[1] % 2 and key[0] != 1))

    step = sampler(verdict, metric="style").collect(0)
    assert draws(step) == [0, *range(2, 9)]
    assert (step.stats.groups_all_wrong, step.stats.groups_uniform) == (12, 1)


def test_the_final_reward_is_made_once_for_each_generation_batch_before_the_filter() -> None:
    seen: list[list[int]] = []

    def flatten_draw_3(groups: list[Group]) -> list[Group]:
        seen.append([group.draw_index for group in groups])
        flat = {g.draw_index: tuple(replace(s, reward=0.0) for s in g.samples) for g in groups if g.draw_index == 3}
        return [replace(g, samples=flat.get(g.draw_index, g.samples)) for g in groups]

    step = sampler(mixed, enable=True, metric="seq_final_reward", finalize=flatten_draw_3, train_batch_size=12).collect(
        0
    )
    assert seen[0] == list(range(12))
    assert [draw for batch in seen for draw in batch] == list(range(step.stats.prompts_drawn))
    assert len(seen) == step.stats.generation_batches
    assert 3 not in draws(step)
    assert step.stats.groups_uniform == 1


def test_the_final_reward_needs_the_step_that_makes_it() -> None:
    with pytest.raises(ValueError, match=r"seq_final_reward .*needs a finalize"):
        sampler(metric="seq_final_reward")
    with pytest.raises(ValueError, match=r"metric=acc .*came with a finalize"):
        sampler(metric="acc", finalize=lambda groups: groups)


def test_a_finalize_that_loses_a_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="was given 12 groups and returned others"):
        sampler(metric="seq_final_reward", finalize=lambda groups: groups[:-1]).collect(0)


def test_a_min_valid_that_no_group_can_meet_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_valid=5 with rollout.n=4; it must be at most n"):
        sampler(min_valid=N + 1)
