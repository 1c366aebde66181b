"""What it costs the driver to give a training step's samples to the ranks: one packed object a shard, or one a sample.

    python benchmarks/data_plane.py --json data_plane.json

Two measurements on a Ray cluster of this machine alone, both with the trainer's own code:

- *driver*: from accepted groups to update shards in the object store (mini-batches, balancing, packing, weights, puts)
  for 8192 samples of up to 20,480 tokens in 16 mini-batches, over 16 data-parallel ranks.
- *throughput*: samples from the driver into an actor that touches every array. Packed as here, one put a shard;
  against one put a sample, each sample a dataclass of its arrays. Short samples show the cost of an object, long ones
  that of its bytes.

Lengths are log-normal (median and clip are printed), for that is what responses look like; `--uniform` draws them
evenly up to the longest, twice as many tokens. Times are wall clock, the median of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from megatron_dapo.data.minibatch import LossWeighting, MiniBatch, Update, build_update, mini_batches
from megatron_dapo.data.packing import plan_micro_batches
from megatron_dapo.types import Completion, Group, Prompt, RewardResult, Sample
from megatron_dapo.workers.policy import UpdateShard

PROMPT, LONGEST, N = 256, 20480, 16
WEIGHTING = LossWeighting("token-mean", "global", overlong_filtering=False)


@dataclass(frozen=True)
class Step:
    """Seconds of the driver in one step."""

    samples: int
    tokens: int
    megabytes: float  # that are put
    packing: float
    puts: float

    @property
    def seconds(self) -> float:
        return self.packing + self.puts


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
        """The sum over all token ids of an update shard or a sample."""
        if isinstance(shard, LooseSample):
            return int(shard.token_ids[0])
        return sum(int(micro.sequences.token_ids[0]) for mini in shard.mini_batches for micro in mini)


def main() -> None:
    arguments = _parser().parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=arguments.store_gb << 30)
    random = np.random.default_rng(1)
    groups = make_groups(8192, 3000, LONGEST, arguments.uniform, random)
    steps = [step(groups, 512, 16, 40960) for _ in range(arguments.repeats + 1)][1:]  # the first one warms memory up
    driver = sorted(steps, key=lambda each: each.seconds)[len(steps) // 2]
    compared = [
        throughput(make_groups(2048, median, LONGEST, False, random), arguments.repeats) for median in (128, 3000)
    ]
    ray.shutdown()
    _show(driver, compared)
    if arguments.json:
        found = {"driver": asdict(driver) | {"seconds": driver.seconds}}
        found |= {"throughput": [asdict(each) | {"times": each.times} for each in compared]}
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")


def make_groups(samples: int, median: int, longest: int, uniform: bool, random: np.random.Generator) -> list[Group]:
    """Groups of N responses, as an engine gives them: arrays of their own."""
    if uniform:
        lengths = random.integers(1, longest + 1, samples)
    else:
        lengths = np.clip(random.lognormal(np.log(median), 0.8, samples), 1, longest).astype(np.int64)
    result = RewardResult("ok", 1.0, {"score": 1.0, "acc": 1.0})

    def sample(draw: int, number: int) -> Sample:
        length = int(lengths[draw * N + number])
        tokens = random.integers(0, 150_000, length)
        completion = Completion(draw, number, tokens, -random.random(length, np.float32), "stop", 0)
        return Sample(completion, result, 0.0, 1.0)

    return [
        Group(draw, Prompt(draw, random.integers(0, 150_000, PROMPT), "", "math", ""), samples, 0)
        for draw, samples in (
            (draw, tuple(sample(draw, number) for number in range(N))) for draw in range(samples // N)
        )
    ]


def step(groups: list[Group], samples_a_mini_batch: int, dp_size: int, max_tokens: int) -> Step:
    """What the driver does for a step's updates, and how long it takes."""
    old_logp = np.concatenate([sample.completion.logprobs for group in groups for sample in group.samples])
    started = time.perf_counter()
    updates = make_updates(groups, old_logp, samples_a_mini_batch, dp_size, max_tokens)
    shards = [UpdateShard(tuple(update.ranks[rank] for update in updates), 1e-6) for rank in range(dp_size)]
    packed = time.perf_counter()
    references = [ray.put(shard) for shard in shards]
    put = time.perf_counter()
    tokens = sum(len(micro.sequences.token_ids) for shard in shards for mini in shard.mini_batches for micro in mini)
    size = sum(_bytes(micro) for shard in shards for mini in shard.mini_batches for micro in mini)
    del references
    return Step(sum(len(group.samples) for group in groups), tokens, size / 1e6, packed - started, put - packed)


def make_updates(
    groups: list[Group], old_logp: np.ndarray, samples_a_mini_batch: int, dp_size: int, max_tokens: int
) -> list[Update]:
    updates, first_token = [], 0
    for mini in mini_batches(groups, samples_a_mini_batch // N):
        advantages = np.ones(sum(len(group.samples) for group in mini))
        tokens = sum(sample.length for group in mini for sample in group.samples)
        batch = MiniBatch.from_groups(mini, advantages, old_logp[first_token : first_token + tokens])
        first_token += tokens
        plan = plan_micro_batches(batch.sequences.lengths, dp_size, max_tokens=max_tokens, quadratic=1 / (12 * 5120))
        updates.append(build_update(batch, plan, WEIGHTING))
    return updates


def throughput(groups: list[Group], repeats: int) -> Throughput:
    reader: Any = Reader.remote()
    old_logp = np.concatenate([sample.completion.logprobs for group in groups for sample in group.samples])
    updates = make_updates(groups, old_logp, 512, 1, 40960)
    shard = UpdateShard(tuple(update.ranks[0] for update in updates), 1e-6)
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


def _show(driver: Step, compared: list[Throughput]) -> None:
    console = Console()
    table = Table("driver: samples", "tokens", "MB put", "packing s", "puts s", "seconds")
    numbers = (driver.packing, driver.puts, driver.seconds)
    table.add_row(
        str(driver.samples), f"{driver.tokens:,}", f"{driver.megabytes:.0f}", *(f"{each:.3f}" for each in numbers)
    )
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
