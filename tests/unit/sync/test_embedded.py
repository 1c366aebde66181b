"""After a push the engine writes with the policy's weights, and its log-probs are the policy's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdGroup
from megatron_dapo.sync.embedded import EmbeddedSync, load_checkpoint_weights
from megatron_dapo.types import Completion, FloatArray, Request, SequenceBatch
from megatron_dapo.workers.policy import PolicyWorker
from megatron_dapo.workers.policy_group import MicroBatchLimits, PassLimits, PolicyGroup
from megatron_dapo.workers.rollout import RolloutFleet
from tests.unit.workers.one_rank import (
    requests_of,
    training_batch,
    update_of,
)


def no_failures() -> None:
    raise AssertionError("no engine has failed")


def write(group: SpmdGroup, requests: Sequence[Request]) -> list[Completion]:
    fleet = RolloutFleet(group, lambda: None, no_failures)
    fleet.submit(requests)
    found = []
    while fleet.pending:
        found += fleet.poll()
    return sorted(found, key=lambda c: (c.draw_index, c.sample_index))


def sequences_of(requests: Sequence[Request], completions: Sequence[Completion]) -> SequenceBatch:
    rows = [(r.prompt_ids, c.token_ids) for r, c in zip(requests, completions, strict=True)]
    return SequenceBatch(
        np.concatenate([part for row in rows for part in row]),
        np.array([len(prompt) + len(response) for prompt, response in rows]),
        np.array([len(prompt) for prompt, _ in rows]),
    )


def policy_over(group: SpmdGroup) -> PolicyGroup:
    limits = MicroBatchLimits(1000, None)
    return PolicyGroup(group, PassLimits(limits, limits, limits))


def engine_logp(completions: Sequence[Completion]) -> FloatArray:
    return np.concatenate([completion.logprobs for completion in completions])


def test_after_every_update_engine_and_policy_agree(group: SpmdGroup):
    sync, policy, requests = EmbeddedSync(group), policy_over(group), requests_of(draws=3, n=2)
    for version in (0, 1, 2):
        sync.push(version)
        completions = write(group, requests)
        assert {completion.weight_version for completion in completions} == {version}
        sequences = sequences_of(requests, completions)
        logp = policy.log_probs(sequences)
        assert np.abs(logp - engine_logp(completions)).max() < 1e-5
        list(policy.update([update_of([[training_batch(sequences, logp)]])], lr=0.02))
        assert np.abs(policy.log_probs(sequences) - logp).max() > 1e-2


def test_weights_come_from_the_policy_and_not_from_its_checkpoint(group: SpmdGroup, model: Path):
    requests = requests_of(draws=2, n=1)
    group.call_all(load_checkpoint_weights, (str(model), 0))
    before = write(group, requests)
    assert {completion.weight_version for completion in before} == {0}
    batch = training_batch(sequences_of(requests, before), engine_logp(before))
    list(policy_over(group).update([update_of([[batch]])], lr=0.1))
    EmbeddedSync(group).push(1)
    after = write(group, requests)
    assert (after[0].logprobs[0], after[1].logprobs[0]) != (before[0].logprobs[0], before[1].logprobs[0])
    group.call_all(load_checkpoint_weights, (str(model), 0))
    again = write(group, requests)
    assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in before]
    assert (engine_logp(again) == engine_logp(before)).all()


def test_a_push_gives_the_engine_copies(group: SpmdGroup):
    """The engine keeps the weights of its version while the policy trains on."""
    requests = requests_of(draws=2, n=1)
    EmbeddedSync(group).push(7)
    before = write(group, requests)
    for worker in group.call_all(parameters_of):
        for param in worker:
            param.data.zero_()
    assert (engine_logp(write(group, requests)) == engine_logp(before)).all()


def parameters_of(host: WorkerHost, _: None) -> list:
    return [param for chunk in host.get(PolicyWorker).chunks for param in chunk.parameters()]
