"""Whether the engines hold the policy's weights: checksums of all tensors on both sides, and a probe's log-probs.

Every cell of the model has one rank of the trainer that answers for it. That rank sums its cells' checksums, as they
are in the engine's dtype, and the driver adds up the parts of each tensor: nothing is gathered. Engines sum what they
hold after loading. The probe asks more: that an engine computes with what it holds (no stale prefix cache, no weight
that it keeps twice).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_dapo.algo.checksum import add_checksums, checksum
from megatron_dapo.progress import PROGRESS
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.sync.errors import WeightSyncError
from megatron_dapo.sync.plan import Plan
from megatron_dapo.sync.regions import Region
from megatron_dapo.sync.restoring import RestoringSync
from megatron_dapo.sync.slices import LocalSlices
from megatron_dapo.sync.survey import Ranks
from megatron_dapo.types import Completion, Request, SamplingParams, SequenceBatch
from megatron_dapo.workers.policy import PolicyWorker
from megatron_dapo.workers.policy_group import PolicyGroup
from megatron_dapo.workers.rollout import RolloutWorker


@dataclass(frozen=True)
class Probe:
    """A short prompt of fixed random tokens, continued by every engine.

    Greedily where training samples at temperature 1, and at the training's temperature else: the trainer's log-probs
    are taken at that.
    """

    vocab_size: int
    prompt_tokens: int
    response_tokens: int
    temperature: float
    tolerance: float  # of a log-prob

    @property
    def request(self) -> Request:
        prompt = np.random.default_rng(0).integers(0, self.vocab_size, self.prompt_tokens)
        drawn_at = 0.0 if self.temperature == 1.0 else self.temperature
        return Request(0, 0, prompt, 0, SamplingParams(self.response_tokens, drawn_at))


class VerifiedSync:
    """A `WeightSync` around another: its first push, every `every`th after it and every restart are verified."""

    def __init__(
        self,
        inner: RestoringSync,
        ranks: Ranks,
        policy: PolicyGroup,
        plan: Plan,
        dtype: torch.dtype,
        probe: Probe,
        every: int,
    ):
        """
        Args:
            dtype: of the engines' weights.
            every: 0: the first push alone.
        """
        self.inner, self._ranks, self._policy, self._probe, self._every = inner, ranks, policy, probe, every
        self._shards = [CheckedRegions(regions, dtype) for regions in plan.spoken_for]
        self._pushes, self._version = 0, 0

    def push(self, version: int) -> None:
        """Raises WeightSyncError: an engine refused the weights, or does not have what the policy has."""
        self._version = version
        self.inner.push(version)
        if self._pushes == 0 or (self._every and self._pushes % self._every == 0):
            self._verify()
        self._pushes += 1

    def restore(self) -> None:
        """Start failed engines again, with the weights of the last push. Errors as for `RestoringSync.restore`."""
        self.inner.restore()
        self._verify()

    def _verify(self) -> None:
        """Once more from the start where an engine fails meanwhile."""
        while not (self._sums_agree(self._version) and self._probe_agrees(self._version)):
            self.inner.restore()

    def _sums_agree(self, version: int) -> bool:
        """False if an engine failed."""
        parts: dict[str, list[int]] = defaultdict(list)
        for of_rank in self._ranks.policy.call(policy_checksums, self._shards):
            for name, part in of_rank.items():
                parts[name].append(part)
        wanted = {name: add_checksums(found) for name, found in parts.items()}
        held = self._ranks.engines.call_all(RolloutWorker.weight_checksums)[:: self._ranks.engine_every]
        for engine, found in enumerate(held):
            if found is not None:
                raise_on_difference(wanted, found, engine, version)
        return None not in held

    def _probe_agrees(self, version: int) -> bool:
        """False if an engine failed."""
        request, asked = self._probe.request, self._ranks.engine_ranks
        shards = [[request] if rank in asked else [] for rank in range(self._ranks.engines.size)]
        answers = self._ranks.engines.call(RolloutWorker.generate, shards)
        completions = [completion for of_rank in answers for some in of_rank for completion in some]
        if len(completions) < len(asked):
            return False
        logp = self._policy.log_probs(_sequences(request, completions))
        start = 0
        for engine, completion in enumerate(completions):
            count = len(completion.token_ids)
            gap = float(np.abs(logp[start : start + count] - completion.logprobs).max())
            start += count
            if completion.weight_version != version:
                raise WeightSyncError(
                    f"engine {engine} says that it writes with weights of version {completion.weight_version}; "
                    f"{version} was pushed"
                )
            if not gap <= self._probe.tolerance:  # NaN too
                raise WeightSyncError(
                    f"weights of version {version}: engine {engine} and the policy differ by {gap:.3g} in a probe's "
                    f"log-probs (at most {self._probe.tolerance:g} is allowed), though all tensors' checksums agree: "
                    "the engine computes with something else, such as a prefix cache that was not flushed, or in "
                    "another precision (actor_rollout_ref.rollout.weight_sync.probe_tolerance)"
                )
        return True


@dataclass(frozen=True)
class CheckedRegions:
    regions: tuple[Region, ...]
    dtype: torch.dtype


def policy_checksums(host: WorkerHost, shard: CheckedRegions) -> dict[str, int]:
    """tensor -> the sum over the cells of it that this rank answers for."""
    slices = LocalSlices(host.get(PolicyWorker))
    found: dict[str, int] = {}
    for region in shard.regions:
        PROGRESS.step(f"checksum of {region.name}")
        part = checksum(slices.view(region).to(shard.dtype), region.rows[0], region.cols[0])
        found[region.name] = add_checksums((found.get(region.name, 0), part))
    return found


def raise_on_difference(wanted: Mapping[str, int], found: Mapping[str, int], engine: int, version: int) -> None:
    """Raises WeightSyncError: names the tensors that are not the same on both sides."""
    wrong = [name for name in wanted if name in found and found[name] != wanted[name]]
    absent = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    said = []
    if wrong:
        said.append(f"{_listed(wrong)} differ from the policy's")
    if absent:
        said.append(f"{_listed(absent)} are not there")
    if extra:
        said.append(f"{_listed(extra)} are there, and the policy has none of that name")
    if said:
        raise WeightSyncError(
            f"weights of version {version} in engine {engine}, checksums: {'; '.join(said)}. "
            f"{len(wanted) - len(wrong) - len(absent)} of {len(wanted)} tensors are right. Nothing that this engine "
            "writes could be trained on; try another actor_rollout_ref.rollout.weight_sync.transport"
        )


def _sequences(request: Request, completions: Sequence[Completion]) -> SequenceBatch:
    rows = [np.concatenate([request.prompt_ids, completion.token_ids]) for completion in completions]
    return SequenceBatch(
        token_ids=np.concatenate(rows),
        lengths=np.array([len(row) for row in rows]),
        prompt_lengths=np.full(len(rows), len(request.prompt_ids)),
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
