"""What a step computes before its updates, on a policy whose log-probs are written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from megatron_dapo.algo.advantage import group_advantages
from megatron_dapo.config.tree import (
    ActorConfig,
    AlgorithmConfig,
    FilterGroupsConfig,
    KLControlConfig,
    RewardModelConfig,
    RolloutCorrectionConfig,
)
from megatron_dapo.data.minibatch import Update
from megatron_dapo.data.packing import Plan, plan_micro_batches
from megatron_dapo.obs.timers import Timers
from megatron_dapo.training_step import PreparedStep, StepRules, final_rewards, prepare_step, with_kl_in_reward
from megatron_dapo.types import (
    Completion,
    FloatArray,
    Group,
    IntArray,
    Prompt,
    RewardResult,
    Sample,
    SequenceBatch,
    SequenceRows,
)
from megatron_dapo.workers.reference_group import SharedReference

VERSION = 5
IN_REWARD = AlgorithmConfig(use_kl_in_reward=True, kl_ctrl=KLControlConfig(kl_coef=0.5), kl_penalty="kl")


def group_of(draw: int, rewards: Sequence[float], lengths: Sequence[int], version: int = VERSION) -> Group:
    """Responses of these lengths; token t of sample s of a draw has the engine's log-prob -(draw + s/10 + t/100)."""
    prompt = Prompt(draw, np.array([7, 8]), "", "", "")
    samples = []
    for index, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        logprobs = -(draw + index / 10 + np.arange(length) / 100).astype(np.float32)
        completion = Completion(draw, index, np.arange(length) + 10 * draw, logprobs, "stop", version)
        samples.append(Sample(completion, RewardResult("ok", reward, {"acc": reward}), 0.0, reward))
    return Group(draw, prompt, tuple(samples), version)


GROUPS = (group_of(1, [1, -1], [2, 3]), group_of(2, [-1, 1, 1], [1, 2, 1]), group_of(3, [1, -1], [1, 1]))


def engine_logp(groups: Sequence[Group]) -> FloatArray:
    return np.concatenate([s.completion.logprobs for g in groups for s in g.samples])


@dataclass
class WrittenPolicy:
    """The engine's log-probs and something more, the reference's and something less; one data-parallel rank."""

    groups: Sequence[Group]
    over_engine: float | FloatArray = 0.0
    over_reference: float | FloatArray = 0.0
    skipped: int = 0  # sequences at the step's start that nobody should ask about
    calls: list[str] = field(default_factory=list)

    def log_probs(self, sequences: SequenceRows) -> FloatArray:
        self.calls.append("policy")
        whole = SequenceBatch.from_groups(self.groups)
        asked = sequences.select(range(len(sequences)))
        assert (asked.token_ids == whole.token_ids[whole.cu_seqlens[self.skipped] :]).all()
        return self.true_logp()[whole.cu_responses[self.skipped] :]

    def true_logp(self) -> FloatArray:
        return (engine_logp(self.groups) + self.over_engine).astype(np.float32)

    def reference_log_probs(self, sequences: SequenceRows) -> FloatArray:
        self.calls.append("reference")
        return (engine_logp(self.groups) + self.over_engine - self.over_reference).astype(np.float32)

    def plan(self, lengths: IntArray) -> Plan:
        return plan_micro_batches(lengths, 1, max_sequences=10)


def rules_of(algorithm: AlgorithmConfig | None = None, **actor: object) -> StepRules:
    return StepRules(ActorConfig(**actor), algorithm or AlgorithmConfig(), RewardModelConfig())


def prepare(policy: WrittenPolicy, rules: StepRules) -> PreparedStep:
    return prepare_step(policy.groups, policy, SharedReference(policy), rules, Timers())


def old_logp(updates: Sequence[Update]) -> FloatArray:
    """Of updates of a single micro-batch each, one after the other."""
    found = [update.ranks[0][0].terms.old_logp for update in updates]
    return np.concatenate([logp for logp in found if logp is not None])


def rewards_of(groups: Sequence[Group]) -> list[float]:
    return [sample.reward for group in groups for sample in group.samples]


def test_the_kl_of_a_response_is_taken_off_its_reward():
    """kl_coef 0.5, estimator k1: half the sum over a response's tokens of logp - reference."""
    groups = [group_of(0, [1.0, 2.0], [2, 1]), group_of(1, [-1.0], [3])]
    logp = np.array([-1, -2, -3, -4, -5, -6], np.float32)
    ref = np.array([-2, -2, -5, -3, -5, -6.5], np.float32)
    found = with_kl_in_reward(groups, logp, ref, IN_REWARD)
    assert rewards_of(found) == [1.0 - 0.5 * (1 + 0), 2.0 - 0.5 * 2, -1.0 - 0.5 * (-1 + 0 + 0.5)]
    assert rewards_of(groups) == [1.0, 2.0, -1.0]
    assert [group.draw_index for group in found] == [0, 1]


@pytest.mark.parametrize(("penalty", "cost"), [("abs", 0.5 * (2 + 1)), ("mse", 0.5 * (4 + 1) / 2)])
def test_the_kl_in_the_reward_takes_any_estimator(penalty: str, cost: float):
    (group,) = with_kl_in_reward(
        [group_of(0, [1.0], [2])],
        np.array([-1, -2], np.float32),
        np.array([-3, -1], np.float32),
        replace(IN_REWARD, kl_penalty=penalty),
    )
    assert group.samples[0].reward == 1.0 - cost


def test_the_mismatch_with_the_engine_leaves_carried_responses_out():
    """Draw 2 was written by the weights before, so its gap is what was learned since, not an error."""
    groups = (GROUPS[0], group_of(2, [-1, 1, 1], [1, 2, 1], VERSION - 1), GROUPS[2])
    gap = np.array([0.1] * 5 + [9.0] * 4 + [0.3, 0.2], np.float32)
    found = prepare(WrittenPolicy(groups, gap), rules_of()).mismatch(VERSION, None)
    assert found is not None
    assert found.logp_diff_max == pytest.approx(0.3, rel=1e-5)
    assert found.logp_diff_mean == pytest.approx((5 * 0.1 + 0.3 + 0.2) / 7, rel=1e-5)
    assert found.ess_sequences > 0.9


def test_there_is_no_mismatch_where_every_response_was_carried():
    groups = [group_of(1, [1, -1], [2, 3], VERSION - 1)]
    assert prepare(WrittenPolicy(groups), rules_of()).mismatch(VERSION, None) is None


def test_with_the_engines_log_probs_the_trainer_computes_none_and_the_first_update_tells_the_mismatch():
    policy = WrittenPolicy(GROUPS, over_engine=0.25)
    prepared = prepare(policy, rules_of(old_log_prob="rollout", ppo_mini_batch_size=1))
    assert policy.calls == []
    assert prepared.measured_later
    old = old_logp(prepared.updates)
    assert (old == engine_logp(GROUPS)).all()
    found = prepared.mismatch(VERSION, policy.true_logp()[:5])  # of group 1, the first mini-batch
    assert found is not None
    assert found.logp_diff_mean == pytest.approx(0.25, rel=1e-5)
    assert found.logp_diff_max == pytest.approx(0.25, rel=1e-5)


def test_a_first_mini_batch_that_is_its_own_old_policy_needs_no_pass():
    gap = np.array([0.1] * 5 + [0.2] * 4 + [0.3] * 2, np.float32)
    policy = WrittenPolicy(GROUPS, gap, skipped=2)
    prepared = prepare(policy, rules_of(old_log_prob="first_minibatch_free", ppo_mini_batch_size=1))
    assert policy.calls == ["policy"]
    first, *others = prepared.updates
    assert first.ranks[0][0].terms.old_logp is None
    assert first.nonfinite_tokens == 0
    old = old_logp(others)
    assert (old == policy.true_logp()[5:]).all()
    found = prepared.mismatch(VERSION, policy.true_logp()[:5])
    assert found is not None
    assert found.logp_diff_mean == pytest.approx(gap.mean(), rel=1e-5)
    assert found.logp_diff_max == pytest.approx(0.3, rel=1e-5)


def test_a_single_mini_batch_that_is_its_own_old_policy_needs_no_pass_at_all():
    policy = WrittenPolicy(GROUPS)
    prepared = prepare(policy, rules_of(old_log_prob="first_minibatch_free", ppo_mini_batch_size=3))
    assert policy.calls == []
    assert len(prepared.updates) == 1
    assert prepared.mismatch(VERSION, policy.true_logp()) is not None


def test_sequences_that_engine_and_trainer_disagree_about_are_masked_and_counted():
    """Of group 3 both: a gap of log 1.5 a token, of which group 2's longest response has one and 0 beside it."""
    gap = np.array([0.0] * 5 + [0.0, np.log(1.5), 0.0, 0.0] + [np.log(1.5)] * 2, np.float32)
    correction = RolloutCorrectionConfig(mis_high=1.3)
    prepared = prepare(WrittenPolicy(GROUPS, gap), rules_of(rollout_correction=correction))
    assert prepared.left_out() == {"truncated_sequences": 0, "masked_sequences": 2, "nonfinite_tokens": 0}
    weight = prepared.updates[0].ranks[0][0].terms.weight
    np.testing.assert_allclose(weight, [1 / 9] * 5 + [0, 0], rtol=1e-6)


def test_mini_batches_are_whole_groups_in_accepted_order():
    prepared = prepare(WrittenPolicy(GROUPS, over_engine=0.25), rules_of(ppo_mini_batch_size=2))
    assert prepared.groups == GROUPS
    advantages_S = group_advantages(rewards_of(GROUPS), [1, 1, 2, 2, 2, 3, 3])
    for update, groups, first in zip(prepared.updates, (GROUPS[:2], GROUPS[2:]), (0, 5), strict=True):
        ((micro_batch,),) = update.ranks
        wanted = SequenceBatch.from_groups(groups)
        assert (micro_batch.sequences.token_ids == wanted.token_ids).all()
        advantages = advantages_S[first : first + len(wanted)]
        np.testing.assert_allclose(micro_batch.terms.advantage, advantages, rtol=1e-6)
        np.testing.assert_allclose(old_logp([update]), engine_logp(groups) + 0.25, rtol=1e-6)
        np.testing.assert_allclose(micro_batch.terms.weight, 1 / wanted.response_lengths.sum(), rtol=1e-6)
        assert micro_batch.terms.ref_logp is None


def test_every_epoch_goes_over_the_same_mini_batches():
    once = prepare(WrittenPolicy(GROUPS), rules_of(ppo_mini_batch_size=2)).updates
    twice = prepare(WrittenPolicy(GROUPS), rules_of(ppo_mini_batch_size=2, ppo_epochs=2)).updates
    assert len(once) == 2
    assert len(twice) == 4
    assert twice[0] is twice[2]
    assert twice[1] is twice[3]


def test_without_a_kl_term_there_is_no_pass_of_the_reference():
    policy = WrittenPolicy(GROUPS, over_reference=1.0)
    prepared = prepare(policy, rules_of(use_kl_loss=True, kl_loss_coef=0.0))
    assert policy.calls == ["policy"]
    assert prepared.groups == GROUPS


def test_a_kl_in_the_loss_goes_to_the_loss_alone():
    policy = WrittenPolicy(GROUPS, over_reference=1.0)
    prepared = prepare(policy, rules_of(use_kl_loss=True, kl_loss_coef=0.1, ppo_mini_batch_size=2))
    assert prepared.groups == GROUPS
    for update, groups in zip(prepared.updates, (GROUPS[:2], GROUPS[2:]), strict=True):
        ref_logp = update.ranks[0][0].terms.ref_logp
        assert ref_logp is not None
        np.testing.assert_allclose(ref_logp, engine_logp(groups) - 1.0, rtol=1e-6)


def test_a_kl_in_the_reward_changes_rewards_and_advantages_alone():
    """One nat a token over the reference at coefficient 0.5: the longer response of a group loses more."""
    prepared = prepare(WrittenPolicy(GROUPS, over_reference=1.0), rules_of(IN_REWARD))
    wanted = [1 - 1.0, -1 - 1.5, -1 - 0.5, 1 - 1.0, 1 - 0.5, 1 - 0.5, -1 - 0.5]
    assert rewards_of(prepared.groups) == pytest.approx(wanted, abs=1e-5)
    ((micro_batch,),) = prepared.updates[0].ranks
    advantages_S = group_advantages(wanted, [1, 1, 2, 2, 2, 3, 3])
    np.testing.assert_allclose(micro_batch.terms.advantage, advantages_S, atol=1e-5)
    assert micro_batch.terms.ref_logp is None


def test_rewards_that_the_sampler_made_final_get_no_second_kl():
    algorithm = replace(IN_REWARD, filter_groups=FilterGroupsConfig(enable=True, metric="seq_final_reward"))
    policy = WrittenPolicy(GROUPS, over_reference=1.0)
    final = final_rewards(GROUPS, policy, SharedReference(policy), algorithm)
    assert rewards_of(final)[0] == pytest.approx(0.0, abs=1e-5)
    again = WrittenPolicy(final, over_reference=1.0)
    assert prepare(again, rules_of(algorithm)).groups == tuple(final)
    assert again.calls == ["policy"]


def test_the_time_of_each_pass_is_its_own_phase():
    timers = Timers()
    policy = WrittenPolicy(GROUPS)
    prepare_step(GROUPS, policy, SharedReference(policy), rules_of(IN_REWARD), timers)
    assert {"seconds/old_log_prob", "seconds/ref_log_prob"} <= timers.flush().keys()


class BusyReference:
    """Has ranks of its own: it works from when it is started."""

    def __init__(self, calls: list[str]):
        self.calls = calls

    def start_log_probs(self, sequences: SequenceBatch) -> Callable[[], FloatArray]:
        self.calls.append("reference starts")
        return lambda: self.calls.append("reference ends") or np.zeros(int(sequences.cu_responses[-1]), np.float32)


def test_a_reference_with_ranks_of_its_own_works_while_the_policy_does():
    policy, timers = WrittenPolicy(GROUPS), Timers()
    prepare_step(GROUPS, policy, BusyReference(policy.calls), rules_of(IN_REWARD), timers)
    final_rewards(GROUPS, policy, BusyReference(policy.calls), IN_REWARD)
    assert policy.calls == ["reference starts", "policy", "reference ends"] * 2
