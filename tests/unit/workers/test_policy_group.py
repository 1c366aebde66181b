"""The policy behind one object: on scripted ranks of any layout, and on the real one of a process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dapo.mcore.fused_loss import SUMS
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.mcore.schedule import TokenStats
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.runtime.spmd import SpmdControl
from megatron_dapo.types import MicroBatch, SequenceBatch
from megatron_dapo.workers.policy import UpdateShard, UpdateStats
from megatron_dapo.workers.policy_group import MicroBatchLimits, PassLimits, PolicyGroup
from tests.functional import oracle
from tests.functional.tiny_models import make_rollouts
from tests.unit.workers.one_rank import policy_worker, settings_of, training_batch, update_of

PP_SIZE = 2
PARTS = (0.1, 0.2, 0.3)
SEQUENCES = make_rollouts().sequences
TOKENS = int(SEQUENCES.cu_responses[-1])


@dataclass
class ScriptedRank:
    """A rank whose log-probs are the token ids, and whose sums round differently when added in another order."""

    layout: RankLayout
    held: list[int] = field(default_factory=list)  # sequences in each micro-batch of the last call

    def rank_layout(self, _: None) -> RankLayout:
        return self.layout

    def log_probs(self, micro_batches: tuple[SequenceBatch, ...]) -> list[TokenStats]:
        self.held = [len(batch) for batch in micro_batches]
        return [stats_of(batch) for batch in micro_batches] if self.layout.reports else []

    def reference_log_probs(self, micro_batches: tuple[SequenceBatch, ...]) -> list[TokenStats]:
        return [TokenStats(-stats.logp, stats.entropy) for stats in self.log_probs(micro_batches)]

    def update(self, shard: UpdateShard) -> Iterator[UpdateStats]:
        for number, micro_batches in enumerate(shard.mini_batches):
            self.held = [len(batch.sequences) for batch in micro_batches]
            if self.layout.reports:
                value = PARTS[self.layout.dp_rank] * 2**number
                asked = shard.report_first and number == 0
                tokens = tuple(stats_of(batch.sequences) for batch in micro_batches) if asked else ()
                yield UpdateStats(True, 2.0 + number, shard.lr, dict.fromkeys(SUMS, value), tokens)


def stats_of(batch: SequenceBatch) -> TokenStats:
    spans = zip(batch.cu_seqlens[:-1] + batch.prompt_lengths, batch.cu_seqlens[1:], strict=True)
    logp = np.concatenate([batch.token_ids[begin:end] for begin, end in spans]).astype(np.float32)
    return TokenStats(logp, 0 * logp)


@dataclass
class ScriptedHandle:
    values: list[Any]  # [rank] the returned value, or the generator
    arrival: Sequence[int]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for rank in self.arrival:
            for item in self.values[rank]:
                yield rank, item

    def result(self) -> list[Any]:
        return self.values


@dataclass
class ScriptedGroup:
    """Ranks in this process. What they yield arrives rank by rank in the order `arrival`."""

    ranks: list[ScriptedRank]
    arrival: Sequence[int]

    @property
    def size(self) -> int:
        return len(self.ranks)

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> ScriptedHandle:
        pairs = zip(self.ranks, shards, strict=True)
        return ScriptedHandle([getattr(rank, method.__name__)(shard) for rank, shard in pairs], self.arrival)

    def call(self, method: Callable[..., Any], shards: Sequence[Any]) -> list[Any]:
        return self.start(method, shards).result()

    def call_all(self, method: Callable[..., Any], argument: Any = None) -> list[Any]:
        return self.call(method, [argument] * self.size)


def scripted(dp_size: int, arrival: Sequence[int] | None = None) -> ScriptedGroup:
    layouts = [
        RankLayout(tp_rank=0, tp_size=1, pp_rank=pp, pp_size=PP_SIZE, cp_rank=0, cp_size=1, dp_rank=dp, dp_size=dp_size)
        for pp in range(PP_SIZE)
        for dp in range(dp_size)
    ]
    return ScriptedGroup([ScriptedRank(layout) for layout in layouts], arrival or range(len(layouts)))


def group_over(group: ScriptedGroup, tokens: int | None = 60, sequences: int | None = None) -> PolicyGroup:
    return PolicyGroup(group, one_limit(MicroBatchLimits(tokens, sequences)))


def one_limit(limits: MicroBatchLimits) -> PassLimits:
    return PassLimits(limits, limits, limits)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [(60, None), (None, 1), (10_000, None)])
def test_log_probs_come_back_in_the_order_of_the_sequences(dp_size: int, limit: tuple[int | None, int | None]):
    policy = group_over(scripted(dp_size), *limit)
    assert (policy.log_probs(SEQUENCES) == stats_of(SEQUENCES).logp).all()
    assert (policy.reference_log_probs(SEQUENCES) == -stats_of(SEQUENCES).logp).all()


def test_ranks_with_nothing_to_do_keep_in_step_and_are_not_listened_to():
    group = scripted(dp_size=3)
    two = SEQUENCES.select([0, 4])
    assert (group_over(group).log_probs(two) == stats_of(two).logp).all()
    assert [rank.held for rank in group.ranks] == [[1]] * 6


def test_each_kind_of_pass_has_its_own_limit():
    group = scripted(dp_size=1)
    policy = PolicyGroup(group, PassLimits(*(MicroBatchLimits(None, sequences) for sequences in (9, 5, 3))))
    assert [len(rank) for rank in policy.plan(SEQUENCES.lengths)] == [1]
    policy.log_probs(SEQUENCES)
    assert [len(rank.held) for rank in group.ranks] == [2, 2]
    policy.reference_log_probs(SEQUENCES)
    assert [len(rank.held) for rank in group.ranks] == [3, 3]


def test_every_stage_of_a_replica_gets_the_replicas_own_shard():
    group = scripted(dp_size=2)
    policy = group_over(group, tokens=None, sequences=2)
    plan = policy.plan(SEQUENCES.lengths)
    ranks = [
        [training_batch(SEQUENCES.select(indices), stats_of(SEQUENCES.select(indices)).logp) for indices in rank]
        for rank in plan
    ]
    assert [len(rank) for rank in ranks] == [3, 3]
    list(policy.update([update_of(ranks)], lr=0.5))
    held = [[len(batch.sequences) for batch in rank] for rank in ranks]
    assert [rank.held for rank in group.ranks] == held * PP_SIZE


@pytest.mark.parametrize("arrival", [[0, 1, 2, 3, 4, 5], [5, 0, 4, 1, 3, 2], [3, 5, 4, 2, 1, 0]])
def test_an_update_is_reported_once_with_the_sums_of_all_replicas_in_one_order(arrival: list[int]):
    nothing = update_of([[], [], []])
    found = list(group_over(scripted(3, arrival)).update([nothing, nothing], lr=0.5))
    assert [(stats.applied, stats.grad_norm, stats.lr) for stats in found] == [(True, 2.0, 0.5), (True, 3.0, 0.5)]
    for number, stats in enumerate(found):
        assert stats.sums == dict.fromkeys(SUMS, (PARTS[0] + PARTS[1] + PARTS[2]) * 2**number)
    assert PARTS[0] + PARTS[1] + PARTS[2] != PARTS[2] + PARTS[1] + PARTS[0]


@pytest.mark.parametrize("arrival", [[0, 1, 2, 3], [3, 1, 2, 0]])
def test_the_first_update_tells_its_tokens_log_probs_in_the_order_of_the_mini_batch(arrival: list[int]):
    policy = group_over(scripted(2, arrival), tokens=None, sequences=2)
    plan = policy.plan(SEQUENCES.lengths)
    logp = stats_of(SEQUENCES).logp
    terms = training_batch(SEQUENCES, logp).terms
    ranks = [
        [MicroBatch(SEQUENCES.select(held), terms.select(SEQUENCES.cu_responses, held)) for held in rank]
        for rank in plan
    ]
    update = replace(update_of(ranks), plan=plan, cu_responses=SEQUENCES.cu_responses)
    first, second = policy.update([update, update], lr=0.5, report_first=True)
    assert first.logp is not None
    assert (first.logp == logp).all()
    assert second.logp is None
    assert [found.logp for found in policy.update([update], lr=0.5)] == [None]


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Callable[[MicroBatchLimits], PolicyGroup]]:
    """The real policy in a group of one."""
    with policy_worker(settings_of(model)) as worker, SpmdControl.connect() as control:
        host = WorkerHost()
        host.add(worker)
        yield lambda limits: PolicyGroup(control.group(host), one_limit(limits))


@pytest.mark.parametrize(
    "limits", [MicroBatchLimits(30, None), MicroBatchLimits(None, 2), MicroBatchLimits(1000, None)]
)
def test_a_group_of_one_computes_the_log_probs_of_transformers(
    alone: Callable[[MicroBatchLimits], PolicyGroup], model: Path, limits: MicroBatchLimits
):
    found = alone(limits).log_probs(SEQUENCES)
    assert found.dtype == np.float32
    assert np.abs(found - oracle.all_logp(model, SEQUENCES)).max() < 1e-5


def test_a_group_of_one_updates_mini_batch_by_mini_batch(alone: Callable[[MicroBatchLimits], PolicyGroup]):
    policy = alone(MicroBatchLimits(60, None))
    mini_batches, tokens = [], []
    for indices in ([0, 1, 2, 3], [4, 5, 6, 7, 8]):
        batch = SEQUENCES.select(indices)
        old, offsets = policy.log_probs(batch), batch.cu_responses
        whole = training_batch(batch, old)
        parts = [
            MicroBatch(batch.select(held), whole.terms.select(offsets, held)) for held in policy.plan(batch.lengths)[0]
        ]
        mini_batches.append(update_of([parts]))
        tokens.append(len(old))
    updates = policy.update(mini_batches, lr=0.0)
    assert next(updates).sums["tokens"] == tokens[0]
    (second,) = updates
    assert second.sums["tokens"] == tokens[1]
    assert second.sums["ratio"] == tokens[1]
    assert second.sums["clipped_high"] == second.sums["clipped_low"] == 0


def test_state_and_weights_are_written_through_the_group(
    alone: Callable[[MicroBatchLimits], PolicyGroup], tmp_path: Path
):
    policy = alone(MicroBatchLimits(60, None))
    before = policy.log_probs(SEQUENCES)
    (tmp_path / "state").mkdir()
    policy.start_save(str(tmp_path / "state"), background=True)
    digests = policy.finish_save(wait=True)
    assert digests == policy.digest_files(str(tmp_path / "state"), sorted(digests))
    policy.save_hf(str(tmp_path / "hf"))
    assert np.abs(oracle.all_logp(tmp_path / "hf", SEQUENCES) - before).max() < 1e-5
    batch = training_batch(SEQUENCES, before)
    list(policy.update([update_of([[batch]])], lr=0.1))
    assert (policy.log_probs(SEQUENCES) != before).any()
    policy.load(str(tmp_path / "state"))
    assert (policy.log_probs(SEQUENCES) == before).all()
