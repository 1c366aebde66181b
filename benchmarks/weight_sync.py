"""Seconds of a weight push from TP2 x PP2 into engines of one and of two ranks, all in processes of their own.

    OMP_NUM_THREADS=1 python benchmarks/weight_sync.py --json weight_sync.json

Real Megatron ranks (gloo), and engine processes that copy what arrives into weights of their own, as slices where the
engine has two ranks. In turns, in the same processes:

- the plan through shared memory: two copies in all, trainer to shared memory, shared memory to engine;
- plain copies: the same processes copy as many bytes, contiguous, into and out of shared memory of the same size, and
  wait for nobody: what the machine needs for the same bytes copied the same number of times;
- gathering everything: every trainer rank gets every full tensor by collectives (`export_hf`), the first one writes
  them into shared memory, the engines copy their part out.

After each push of the plan, checksums of all tensors are compared on both sides.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from support.pipe_group import PipeGroup
from torch import Tensor

from megatron_dapo.algo.checksum import add_checksums, checksum
from megatron_dapo.algo.loss import PolicyLossConfig
from megatron_dapo.config.tree import MegatronConfig, OptimConfig
from megatron_dapo.mcore.families import ModelShape, shape_of
from megatron_dapo.mcore.families.names import hf_shapes
from megatron_dapo.mcore.fused_loss import Objective
from megatron_dapo.mcore.weights import export_hf
from megatron_dapo.runtime.host import WorkerHost
from megatron_dapo.sync.buckets import make_buckets
from megatron_dapo.sync.plan import EngineRank, Plan, Topology, make_plan, megatron_ranks
from megatron_dapo.sync.regions import Region, wanted_regions
from megatron_dapo.sync.ring import ring_bytes
from megatron_dapo.sync.staged import StagedSync
from megatron_dapo.sync.stores import HostHandle, make_host_memory
from megatron_dapo.sync.survey import Ranks, survey
from megatron_dapo.sync.verify import CheckedRegions, policy_checksums
from megatron_dapo.workers.policy import PolicySettings, PolicyWorker
from megatron_dapo.workers.rollout import RolloutWorker

TP, PP = 2, 2
BUCKET_BYTES = 16 * 2**20
COPIES = 2


class SliceEngine:
    """Weights of one rank of an engine, and nothing else of it."""

    def __init__(self, shape: ModelShape, tp_rank: int, tp_size: int):
        dims = hf_shapes(shape)
        self._regions = {region.name: region for region in wanted_regions(shape, tp_rank, tp_size)}
        self._own = {name: torch.zeros(_size(r, len(dims[name]))) for name, r in self._regions.items()}

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        for name, tensor in tensors:
            self._own[name].copy_(tensor[self._regions[name].index(tensor.dim())])

    def checksums(self) -> list[tuple[Region, int]]:
        return [(r, checksum(self._own[name], r.rows[0], r.cols[0])) for name, r in self._regions.items()]


def _size(region: Region, dims: int) -> tuple[int, ...]:
    return (region.rows[1] - region.rows[0], region.cols[1] - region.cols[0])[:dims]


class Copier:
    """Private memory and shared memory between which a process copies."""

    def __init__(self, handle: HostHandle, nbytes: int):
        self._shared = handle.open()
        self._own = torch.ones(nbytes, dtype=torch.uint8)

    def copy(self, out: bool) -> None:
        """All of its own memory, a bucket's worth at a time, round and round through the shared memory."""
        place = 0
        for piece in self._own.split(BUCKET_BYTES // TP // PP):
            place = place if place + len(piece) <= len(self._shared) else 0
            shared = self._shared[place : place + len(piece)]
            piece.copy_(shared) if out else shared.copy_(piece)
            place += len(piece)


class Gatherer:
    """Whole tensors, one after the other, in one shared memory as large as the model."""

    def __init__(self, handle: HostHandle, shape: ModelShape):
        shapes = hf_shapes(shape)
        (bucket,) = make_buckets(shapes, 4, 2**60)
        self._whole = bucket.views(handle.open(), torch.float32)

    def write(self, worker: PolicyWorker, first: bool) -> None:
        for name, tensor in export_hf(worker.chunks, worker.shape):
            if first:
                self._whole[name].copy_(tensor)

    def read(self, engine: SliceEngine) -> None:
        engine.load_weights(self._whole.items(), 0)


# What the processes run. Module-level functions get the process's host.


def build_policy(host: WorkerHost, path: str) -> None:
    torch.set_num_threads(1)
    settings = PolicySettings(
        model_path=path,
        packed=True,
        megatron=MegatronConfig(tensor_model_parallel_size=TP, pipeline_model_parallel_size=PP),
        optim=OptimConfig(),
        grad_clip=1.0,
        objective=Objective(PolicyLossConfig(0.2, 0.28, 10.0), temperature=1.0),
        seed=1,
        with_reference=False,
    )
    host.add(PolicyWorker(settings))


@dataclass(frozen=True)
class EngineShard:
    path: str
    tp_rank: int
    tp_size: int


def build_engine(host: WorkerHost, shard: EngineShard) -> None:
    torch.set_num_threads(1)
    shape = shape_of(transformers.AutoConfig.from_pretrained(shard.path))
    host.add(RolloutWorker(SliceEngine(shape, shard.tp_rank, shard.tp_size)))  # type: ignore[arg-type]


def own_engine(host: WorkerHost) -> SliceEngine:
    return host.get(RolloutWorker).engine  # type: ignore[return-value]


def engine_sums(host: WorkerHost, _: None) -> list[tuple[Region, int]]:
    return own_engine(host).checksums()


class Keeper:
    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors


def make_memories(host: WorkerHost, sizes: list[int] | None) -> list[HostHandle]:
    made = [make_host_memory(size) for size in sizes or ()]
    host.add(Keeper([tensor for tensor, _ in made]))
    return [handle for _, handle in made]


def prepare_others(host: WorkerHost, job: tuple[HostHandle, int, HostHandle, ModelShape]) -> None:
    host.add(Copier(job[0], job[1]))
    host.add(Gatherer(job[2], job[3]))


def copy_plainly(host: WorkerHost, out: bool) -> None:
    host.get(Copier).copy(out)


def gather(host: WorkerHost, first: bool) -> None:
    host.get(Gatherer).write(host.get(PolicyWorker), first)


def read_gathered(host: WorkerHost, _: None) -> None:
    host.get(Gatherer).read(own_engine(host))


# The driver.


@dataclass(frozen=True)
class Result:
    engine_ranks: int
    model_bytes: int
    copies: int
    written_bytes: int
    lower_bound_bytes: int
    read_bytes: int
    planned_seconds: float  # medians
    plain_seconds: float
    gather_seconds: float
    planned_over_plain: float  # median of the rounds' ratios
    gather_over_planned: float
    setup_seconds: float


def save_model(path: Path) -> ModelShape:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    return shape_of(transformers.AutoConfig.from_pretrained(path))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(policy: PipeGroup, path: Path, shape: ModelShape, engine_ranks: int, rounds: int) -> Result:
    shards = [EngineShard(str(path), rank, engine_ranks) for rank in range(engine_ranks)]
    engines = PipeGroup(build_engine, shards, {})
    engines.wait_until_built()
    began = time.perf_counter()
    topology = Topology(
        megatron_ranks(TP, PP, [0] * TP * PP),
        tuple(EngineRank(0, rank, engine_ranks, 0) for rank in range(engine_ranks)),
        TP,
        PP,
    )
    plan = make_plan(shape, topology, 4)
    ranks = Ranks(policy, engines)
    sync = StagedSync(ranks, plan, survey(ranks), "host", BUCKET_BYTES)
    setup = time.perf_counter() - began
    reads = [4 * sum(t.region.count for t in plan.transfers if rank in t.readers) for rank in range(engine_ranks)]
    prepare(policy, engines, plan, shape, reads)

    def planned() -> None:
        sync.push(0)

    def plain() -> None:
        writing = policy.start(copy_plainly, [False] * policy.size)
        reading = engines.start(copy_plainly, [True] * engines.size)
        writing.result()
        reading.result()

    def gathering() -> None:
        policy.call(gather, [rank == 0 for rank in range(policy.size)])
        engines.call_all(read_gathered)

    seconds = in_turns({"planned": planned, "plain": plain, "gather": gathering}, rounds, ranks, plan)
    engines.close()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return Result(
        engine_ranks=engine_ranks,
        model_bytes=model_bytes(shape),
        copies=COPIES,
        written_bytes=plan.written_bytes,
        lower_bound_bytes=model_bytes(shape),  # one node whose engines want the whole model
        read_bytes=sum(reads),
        planned_seconds=medians["planned"],
        plain_seconds=medians["plain"],
        gather_seconds=medians["gather"],
        planned_over_plain=median_ratio(seconds["planned"], seconds["plain"]),
        gather_over_planned=median_ratio(seconds["gather"], seconds["planned"]),
        setup_seconds=setup,
    )


def prepare(policy: PipeGroup, engines: PipeGroup, plan: Plan, shape: ModelShape, reads: list[int]) -> None:
    (bucket,) = make_buckets(hf_shapes(shape), 4, 2**60)
    ring = ring_bytes([b.nbytes for b in make_buckets(hf_shapes(shape), 4, BUCKET_BYTES)])
    sizes: list[Any] = [None] * engines.size
    sizes[0] = [ring, bucket.nbytes]
    copied, gathered = engines.call(make_memories, sizes)[0]
    for group, amounts in ((policy, plan.sent_bytes), (engines, reads)):
        group.call(prepare_others, [(copied, amount, gathered, shape) for amount in amounts])
    for handle in (copied, gathered):
        handle.forget_name()


def in_turns(runs: dict[str, Callable[[], None]], rounds: int, ranks: Ranks, plan: Plan) -> dict[str, list[float]]:
    """Wall seconds of each run, `rounds` times after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
        if number == 0:
            compare_checksums(ranks, plan)  # of what the gathering brought
            runs["planned"]()
            compare_checksums(ranks, plan)
    return seconds


def compare_checksums(ranks: Ranks, plan: Plan) -> None:
    wanted: dict[str, int] = {}
    for found in ranks.policy.call(policy_checksums, [CheckedRegions(r, torch.float32) for r in plan.spoken_for]):
        for name, part in found.items():
            wanted[name] = add_checksums((wanted.get(name, 0), part))
    parts: dict[Region, int] = {}
    for found in ranks.engines.call_all(engine_sums):
        parts |= dict(found)  # what two ranks hold whole counts once
    sums: dict[str, int] = {}
    for region, part in parts.items():
        sums[region.name] = add_checksums((sums.get(region.name, 0), part))
    wrong = [name for name in wanted if sums.get(name) != wanted[name]]
    assert not wrong, f"checksums differ: {wrong[:5]}"


def model_bytes(shape: ModelShape) -> int:
    return 4 * sum(prod(dims) for dims in hf_shapes(shape).values())


def median_ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="A weight push against plain copies and against gathering everything.")
    parser.add_argument("--json", type=Path, help="write the same numbers to this file")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        shape = save_model(path)
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        policy_of: list[Result] = []
        for engine_ranks in (1, 2):
            environment["MASTER_PORT"] = str(free_port())
            policy = PipeGroup(build_policy, [str(path)] * TP * PP, environment)
            policy.wait_until_built()
            policy_of.append(measure(policy, path, shape, engine_ranks, arguments.rounds))
            policy.close()

    table = Table(
        title=f"TP{TP} x PP{PP}, {policy_of[0].model_bytes / 1e6:.0f} MB, medians of {arguments.rounds} rounds"
    )
    for column in ("engine", "plan, s", "plain copies, s", "plan / plain", "gather all, s", "gather / plan"):
        table.add_column(column, justify="right")
    console = Console()
    for r in policy_of:
        table.add_row(
            f"TP{r.engine_ranks}",
            f"{r.planned_seconds:.3f}",
            f"{r.plain_seconds:.3f}",
            f"{r.planned_over_plain:.2f}",
            f"{r.gather_seconds:.3f}",
            f"{r.gather_over_planned:.2f}",
        )
    console.print(table)
    for r in policy_of:
        console.print(
            f"TP{r.engine_ranks}: {r.copies} copies; {r.written_bytes} bytes written into the node, lower bound "
            f"{r.lower_bound_bytes}; {r.read_bytes} read by engines; setup {r.setup_seconds:.2f} s"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in policy_of], indent=1) + "\n")


if __name__ == "__main__":
    main()
