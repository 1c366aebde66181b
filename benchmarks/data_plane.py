"""What it costs the driver to give a training step's samples to the ranks: one packed object a shard, or one a sample.

    python benchmarks/data_plane.py --json data_plane.json

Two measurements on a Ray cluster of this machine alone, both with the trainer's own code:

- *driver*: from accepted groups to update shards in the object store (advantages, mini-batches, balancing,
  weights, packing, puts) for 8192 samples of up to 20,480 tokens in 16 mini-batches, over 16 data-parallel ranks. The
  policy's log-probs are there at once. Each step has groups of its own, and begins when Ray has the memory of the one
  before back, as in training, where a step takes longer than that. The first step of a run is told apart: it finds no
  memory that was in use before.
- *throughput*: samples from the driver into an actor that touches every array of token ids. In micro-batches as here,
  one put a shard; against one put a sample, each sample a dataclass of its arrays; both packed before. Short samples
  show the cost of an object, long ones that of its bytes.

Lengths are log-normal (median and clip are printed), for that is what responses look like; `--uniform` draws them
evenly up to the longest, twice as many tokens. Times are wall clock; of `--repeats` the median, and for the driver the
slowest, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from megatron_dapo.config.tree import ActorConfig, AlgorithmConfig, RewardModelConfig
from megatron_dapo.mcore.parallel import RankLayout
from megatron_dapo.obs.timers import Timers
from megatron_dapo.runtime.ray import put
from megatron_dapo.training_step import StepRules, prepare_step
from megatron_dapo.types import (
    Completion,
    FloatArray,
    Group,
    MicroBatch,
    Prompt,
    RewardResult,
    Sample,
    SequenceBatch,
    SequenceRows,
)
from megatron_dapo.workers.passes import MicroBatchLimits
from megatron_dapo.workers.policy import PolicyWorker, UpdateShard
from megatron_dapo.workers.policy_group import PassLimits, PolicyGroup
from megatron_dapo.workers.reference_group import SharedReference

PROMPT, LONGEST, N = 256, 20480, 16
LIMITS = MicroBatchLimits(tokens=40960, sequences=None, quadratic=1 / (12 * 5120))
RULES = StepRules(ActorConfig(ppo_mini_batch_size=32), AlgorithmConfig(), RewardModelConfig())  # 512 samples
RAY_FREES = 3.0  # seconds in which Ray surely gives the memory of dropped objects back; it does so once a second


@dataclass(frozen=True)
class Step:
    """Seconds of the driver in one step."""

    samples: int
    tokens: int
    megabytes: float  # that are put
    planning: float  # advantages, mini-batches, balancing, weights
    puts: float  # in which micro-batches are packed

    @property
    def seconds(self) -> float:
        return self.planning + self.puts


@dataclass(frozen=True)
class Throughput:
    samples: int
    mean_tokens: float
    packed: float  # samples a second
    one_by_one: float

    @property
    def times(self) -> float:
        return self.packed / self.one_by_one


@dataclass(frozen=True)
class LooseSample:
    token_ids: np.ndarray
    weight: np.ndarray
    advantage: np.ndarray
    old_logp: np.ndarray


@ray.remote(num_cpus=1)
class Reader:
    def read(self, shard: Any) -> int:
        """The sum of what comes first in each array of token ids of an update shard or a sample."""
        if isinstance(shard, LooseSample):
            return int(shard.token_ids[0])
        return sum(int(micro.sequences.token_ids[0]) for mini in shard.mini_batches for micro in mini)


def main() -> None:
    arguments = _parser().parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=arguments.store_gb << 30)
    random = np.random.default_rng(1)
    first, *later = [
        step(make_groups(8192, 3000, LONGEST, arguments.uniform, random), 16) for _ in range(arguments.repeats + 1)
    ]
    later.sort(key=lambda each: each.seconds)
    driver = {"first": first, "median of the later": later[len(later) // 2], "slowest of the later": later[-1]}
    compared = [
        throughput(make_groups(2048, median, LONGEST, False, random), arguments.repeats) for median in (128, 3000)
    ]
    ray.shutdown()
    _show(driver, compared)
    if arguments.json:
        found: dict[str, Any] = {
            "driver": {name: asdict(each) | {"seconds": each.seconds} for name, each in driver.items()}
        }
        found |= {"throughput": [asdict(each) | {"times": each.times} for each in compared]}
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")


def make_groups(samples: int, median: int, longest: int, uniform: bool, random: np.random.Generator) -> list[Group]:
    """Groups of N responses, as an engine gives them: arrays of their own."""
    if uniform:
        lengths = random.integers(1, longest + 1, samples)
    else:
        lengths = np.clip(random.lognormal(np.log(median), 0.8, samples), 1, longest).astype(np.int64)
    results = [RewardResult("ok", score, {"score": score, "acc": score}) for score in (-1.0, 1.0)]

    def sample(draw: int, number: int) -> Sample:
        length = int(lengths[draw * N + number])
        tokens = random.integers(0, 150_000, length)
        completion = Completion(draw, number, tokens, -random.random(length, np.float32), "stop", 0)
        result = results[number % 2]
        return Sample(completion, result, 0.0, result.score)

    return [
        Group(draw, Prompt(draw, random.integers(0, 150_000, PROMPT), "", "math", ""), samples, 0)
        for draw, samples in (
            (draw, tuple(sample(draw, number) for number in range(N))) for draw in range(samples // N)
        )
    ]


def step(groups: list[Group], dp_size: int) -> Step:
    """What the driver does for a step's updates, and how long it takes."""
    policy = policy_on(dp_size, groups)
    time.sleep(RAY_FREES)
    started = time.perf_counter()
    updates = prepare_step(groups, policy, SharedReference(policy), RULES, Timers()).updates
    planned = time.perf_counter()
    list(policy.update(updates, lr=1e-6))
    done = time.perf_counter()
    micro_batches = [micro for update in updates for rank in update.ranks for micro in rank]
    return Step(
        samples=sum(len(group.samples) for group in groups),
        tokens=sum(len(micro.sequences.token_ids) for micro in micro_batches),
        megabytes=sum(map(_bytes, micro_batches)) / 1e6,
        planning=planned - started,
        puts=done - planned,
    )


class KnownPolicy(PolicyGroup):
    """Its log-probs of all groups are there before anybody asks."""

    known: FloatArray  # [N]

    def log_probs(self, sequences: SequenceRows | SequenceBatch) -> FloatArray:
        return self.known


def policy_on(dp_size: int, groups: Sequence[Group]) -> PolicyGroup:
    """A policy whose log-probs are the engine's."""
    group: Any = StoreGroup(dp_size)
    policy = KnownPolicy(group, PassLimits(LIMITS, LIMITS, LIMITS))
    policy.known = np.concatenate([sample.completion.logprobs for each in groups for sample in each.samples])
    return policy


class StoreGroup:
    """A worker group whose ranks, data-parallel all, are given their shards and do nothing with them."""

    def __init__(self, dp_size: int):
        self.size = dp_size
        self.references: list[ray.ObjectRef] = []

    def call_all(self, method: Callable[..., Any], argument: Any = None) -> list[Any]:
        assert method is PolicyWorker.rank_layout
        return [RankLayout(0, 1, 0, 1, 0, 1, dp_rank, self.size) for dp_rank in range(self.size)]

    def start(self, method: Callable[..., Any], shards: Sequence[Any]) -> Any:
        assert method is PolicyWorker.update
        self.references = put(shards)
        return ()


def throughput(groups: list[Group], repeats: int) -> Throughput:
    reader: Any = Reader.remote()
    policy = policy_on(1, groups)
    updates = prepare_step(groups, policy, SharedReference(policy), RULES, Timers()).updates
    packed_already = [[MicroBatch(each.sequences, each.terms) for each in update.ranks[0]] for update in updates]
    shard = UpdateShard(tuple(map(tuple, packed_already)), 1e-6)
    loose = _loose_samples(groups)
    ray.get(reader.read.remote(shard))
    packed = _median(lambda: ray.get(reader.read.remote(ray.put(shard))), repeats)
    one_by_one = _median(lambda: ray.get([reader.read.remote(ray.put(each)) for each in loose]), repeats)
    mean = sum(len(each.token_ids) for each in loose) / len(loose)
    return Throughput(len(loose), mean, len(loose) / packed, len(loose) / one_by_one)


def _loose_samples(groups: list[Group]) -> list[LooseSample]:
    ids = [
        np.concatenate([group.prompt.token_ids, each.completion.token_ids])
        for group in groups
        for each in group.samples
    ]
    logps = [each.completion.logprobs for group in groups for each in group.samples]
    return [
        LooseSample(token_ids, np.ones_like(logp), np.ones(1, np.float32), logp)
        for token_ids, logp in zip(ids, logps, strict=True)
    ]


def _median(action: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _bytes(micro: Any) -> int:
    arrays = [*vars(micro.terms).values(), *vars(micro.sequences).values()]
    return sum(array.nbytes for array in arrays if array is not None)


def _show(driver: dict[str, Step], compared: list[Throughput]) -> None:
    console = Console()
    table = Table("driver: step", "samples", "tokens", "MB put", "planning s", "packing and puts s", "seconds")
    for name, each in driver.items():
        seconds = (each.planning, each.puts, each.seconds)
        sizes = (f"{each.samples:,}", f"{each.tokens:,}", f"{each.megabytes:.0f}")
        table.add_row(name, *sizes, *(f"{value:.3f}" for value in seconds))
    console.print(table)
    table = Table("throughput: samples", "mean tokens", "packed, samples/s", "one by one, samples/s", "times")
    for each in compared:
        row = (each.mean_tokens, each.packed, each.one_by_one, each.times)
        table.add_row(str(each.samples), *(f"{value:,.0f}" for value in row))
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--uniform", action="store_true", help="lengths drawn evenly up to the longest")
    parser.add_argument("--store-gb", type=int, default=3, help="size of the object store")
    return parser


if __name__ == "__main__":
    main()
