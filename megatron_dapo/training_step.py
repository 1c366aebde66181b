"""What a step computes from its accepted groups before the policy is updated: log-probs, rewards, advantages, weights.

Axes: `S` sequences of the step in accepted order, `N` their response tokens back to back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_dapo.algo.advantage import group_advantages
from megatron_dapo.algo.kl import kl_penalty
from megatron_dapo.config.tree import ActorConfig, AlgorithmConfig, RewardModelConfig
from megatron_dapo.data.minibatch import LossWeighting, MiniBatch, Update, build_update, mini_batches
from megatron_dapo.obs.metrics import Mismatch, mismatch
from megatron_dapo.obs.timers import Timers
from megatron_dapo.types import FloatArray, Group, SequenceRows, take_ragged
from megatron_dapo.workers.policy_group import PolicyGroup
from megatron_dapo.workers.reference_group import Reference


@dataclass(frozen=True)
class StepRules:
    """The sections of the configuration that say how groups become updates."""

    actor: ActorConfig
    algorithm: AlgorithmConfig
    reward: RewardModelConfig

    @property
    def weighting(self) -> LossWeighting:
        return LossWeighting(
            self.actor.loss_agg_mode,
            self.actor.loss_scale,
            self.reward.overlong_filtering,
            self.actor.rollout_correction,
        )


@dataclass(frozen=True)
class PreparedStep:
    groups: tuple[Group, ...]  # with their final rewards
    updates: tuple[Update, ...]  # optimizer updates, epoch by epoch
    trainer_logp: FloatArray  # of the weights before the updates: all response tokens, but for `measured_later`
    measured_later: bool  # the first mini-batch's become known in its own update, and come before `trainer_logp`

    def left_out(self) -> dict[str, int]:
        """What the step's updates do not train on, summed over them."""
        return {
            "truncated_sequences": sum(update.truncated_sequences for update in self.updates),
            "masked_sequences": sum(update.masked_sequences for update in self.updates),
            "nonfinite_tokens": sum(update.nonfinite_tokens for update in self.updates),
        }

    def mismatch(self, weight_version: int, first_logp: FloatArray | None) -> Mismatch | None:
        """Trainer against engine, over the responses that the weights of `weight_version` wrote; None: there are none.

        Of carried responses the two differ by what was learned since. `first_logp`: of the first mini-batch's tokens,
        from its update, where they are `measured_later`.
        """
        parts = [self.trainer_logp] if first_logp is None else [first_logp, self.trainer_logp]
        return _against_engine(self.groups, np.concatenate(parts), weight_version)


def prepare_step(
    groups: Sequence[Group], policy: PolicyGroup, reference: Reference, rules: StepRules, timers: Timers
) -> PreparedStep:
    """Everything up to the updates. Rewards get their KL here unless the sampler has put it in already."""
    sequences = SequenceRows.from_groups(groups)
    kl_in_reward = rules.algorithm.kl_in_reward and not _filters_on_final_reward(rules.algorithm)
    ref_log_probs = None
    if kl_in_reward or rules.actor.kl_in_loss:
        with timers.phase("ref_log_prob"):
            ref_log_probs = reference.start_log_probs(sequences)
    with timers.phase("old_log_prob"):
        trainer_logp = _trainer_log_probs(groups, policy, rules.actor)
    if rules.actor.old_log_prob == "rollout":
        old_logp_N = np.concatenate([sample.completion.logprobs for group in groups for sample in group.samples])
    elif unknown := int(sequences.cu_responses[-1]) - len(trainer_logp):
        old_logp_N = np.concatenate([np.zeros(unknown, np.float32), trainer_logp])
    else:
        old_logp_N = trainer_logp
    ref_logp_N = None
    if ref_log_probs is not None:
        with timers.phase("ref_log_prob"):
            ref_logp_N = ref_log_probs()
    if kl_in_reward:
        assert ref_logp_N is not None
        groups = with_kl_in_reward(groups, old_logp_N, ref_logp_N, rules.algorithm)
    samples = [(group.draw_index, sample) for group in groups for sample in group.samples]
    advantages_S = group_advantages([s.reward for _, s in samples], [draw for draw, _ in samples])
    updates = _updates(
        groups, advantages_S, old_logp_N, ref_logp_N if rules.actor.kl_in_loss else None, sequences, policy, rules
    )
    return PreparedStep(tuple(groups), updates, trainer_logp, measured_later=rules.actor.old_log_prob != "recompute")


def with_kl_in_reward(
    groups: Sequence[Group], logp_N: FloatArray, ref_logp_N: FloatArray, config: AlgorithmConfig
) -> list[Group]:
    """Each sample's reward less kl_coef x the sum of its tokens' KL to the reference."""
    kl_N, _ = kl_penalty(torch.from_numpy(logp_N).double(), torch.from_numpy(ref_logp_N).double(), config.kl_penalty)
    cost_N = config.kl_ctrl.kl_coef * kl_N.numpy()
    result, start = [], 0
    for group in groups:
        samples = []
        for sample in group.samples:
            stop = start + sample.length
            samples.append(replace(sample, reward=sample.reward - float(cost_N[start:stop].sum())))
            start = stop
        result.append(replace(group, samples=tuple(samples)))
    return result


def final_rewards(
    groups: Sequence[Group], policy: PolicyGroup, reference: Reference, config: AlgorithmConfig
) -> list[Group]:
    """The sampler's log-prob phase for the metric `seq_final_reward`: rewards with their KL, before filtering."""
    sequences = SequenceRows.from_groups(groups)
    ref_log_probs = reference.start_log_probs(sequences)
    return with_kl_in_reward(groups, policy.log_probs(sequences), ref_log_probs(), config)


def _trainer_log_probs(groups: Sequence[Group], policy: PolicyGroup, actor: ActorConfig) -> FloatArray:
    """Of as many of the step's last response tokens as have to be known before the updates."""
    first = {"recompute": 0, "rollout": len(groups), "first_minibatch_free": actor.ppo_mini_batch_size}
    rest = SequenceRows.from_groups(groups[first[actor.old_log_prob] :])
    return policy.log_probs(rest) if len(rest) else np.zeros(0, np.float32)


def _against_engine(groups: Sequence[Group], logp: FloatArray, weight_version: int) -> Mismatch | None:
    """`logp`: of the first whole responses of the step, as many as are known."""
    completions = [sample.completion for group in groups for sample in group.samples]
    offsets = np.concatenate([[0], np.cumsum([len(completion.token_ids) for completion in completions])])
    fresh = [
        i
        for i, completion in enumerate(completions)
        if completion.weight_version == weight_version and offsets[i + 1] <= len(logp)
    ]
    if not fresh:
        return None
    engine_logp = np.concatenate([completions[i].logprobs for i in fresh])
    lengths = offsets[np.array(fresh) + 1] - offsets[fresh]
    return mismatch(take_ragged(logp, offsets, fresh), engine_logp, np.concatenate([[0], np.cumsum(lengths)]))


def _filters_on_final_reward(algorithm: AlgorithmConfig) -> bool:
    return algorithm.filter_groups.enable and algorithm.filter_groups.metric == "seq_final_reward"


def _updates(
    groups: Sequence[Group],
    advantages_S: np.ndarray,
    old_logp_N: FloatArray,
    ref_logp_N: FloatArray | None,
    sequences: SequenceRows,
    policy: PolicyGroup,
    rules: StepRules,
) -> tuple[Update, ...]:
    """Mini-batches of whole groups in accepted order; each epoch goes over the same ones again."""
    own_old_policy = rules.actor.old_log_prob == "first_minibatch_free"
    updates, first = [], 0
    for mini_batch in mini_batches(groups, rules.actor.ppo_mini_batch_size):
        last = first + sum(len(group.samples) for group in mini_batch)
        tokens = slice(int(sequences.cu_responses[first]), int(sequences.cu_responses[last]))
        batch = MiniBatch.from_groups(
            mini_batch,
            advantages_S[first:last],
            None if own_old_policy and first == 0 else old_logp_N[tokens],
            None if ref_logp_N is None else ref_logp_N[tokens],
        )
        updates.append(build_update(batch, policy.plan(batch.sequences.lengths), rules.weighting))
        first = last
    return tuple(updates) * rules.actor.ppo_epochs
