"""Bytes on a GPU in every phase of a step: rollout, weight sync, log-probs, update.

What a rank holds comes from the model class (`mcore/footprint.py`), what a pass keeps from `activations.py`; which
parts are there in which phase is `workers/turns.py`. Transformer Engine's layers are assumed: figures of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_dapo.config.tree import MegatronConfig, RunConfig
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.plan.activations import (
    MicroBatchSize,
    forward_bytes,
    head_bytes,
    saved_peak,
    working_bytes,
)
from megatron_dapo.plan.hardware import Cluster

PHASES = ("rollout", "weight sync", "log-probs", "update")


@dataclass(frozen=True)
class Held:
    """What a policy rank holds, in bytes: `mcore.footprint.Footprint` without what only Megatron knows."""

    weights: float
    gradients: float
    optimizer: float
    largest: float


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on each of an engine's GPUs; `cache_tokens` are those of the whole engine."""

    weights: float
    cache: float
    overhead: float
    asleep: float
    cache_tokens: int

    @property
    def awake(self) -> float:
        return self.weights + self.cache + self.overhead


@dataclass(frozen=True)
class StageMemory:
    """Of a GPU on pipeline stage `stage`: bytes of each part by phase."""

    stage: int
    held: Held
    phases: Mapping[str, Mapping[str, float]]

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        return max(self.total(phase) for phase in self.phases)


@dataclass(frozen=True)
class MemoryPlan:
    stages: tuple[StageMemory, ...]  # the first, one in the middle and the last
    engine: EngineMemory
    colocated: bool
    usable: float  # a card's bytes less the reserve
    host_bytes: float  # of a policy GPU's share in host memory: what is offloaded, and the reference

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable and self.engine.cache > 0

    @property
    def peak(self) -> float:
        engine = 0.0 if self.colocated else self.engine.awake
        return max(engine, *(stage.peak for stage in self.stages))


def memory_plan(
    config: RunConfig, shape: ModelShape, cluster: Cluster, held_by_stage: Callable[[int], Held], micro_batches: int
) -> MemoryPlan:
    """`held_by_stage(stage)` says what a rank of a pipeline stage holds; `micro_batches` an update has on a rank."""
    section = config.actor_rollout_ref
    stages = section.actor.megatron.pipeline_model_parallel_size
    engine = engine_memory(config, shape, cluster)
    chosen = sorted({0, stages // 2 if stages > 2 else 0, stages - 1})
    found = tuple(_stage(config, shape, engine, stage, held_by_stage(stage), micro_batches) for stage in chosen)
    offloaded = [_offloaded(config, stage.held) for stage in found]
    reference = [stage.held.weights if config.shares_reference else 0.0 for stage in found]
    return MemoryPlan(
        stages=found,
        engine=engine,
        colocated=config.runtime.colocate,
        usable=cluster.usable_bytes,
        host_bytes=max(a + b for a, b in zip(offloaded, reference, strict=True)),
    )


def engine_memory(config: RunConfig, shape: ModelShape, cluster: Cluster) -> EngineMemory:
    """An engine's GPUs split its weights and heads; heads of keys and values are repeated where there are too few.

    SGLang takes `gpu_memory_utilization` of the card for weights and cache, vLLM for all it needs, the embedded engine
    what `max_num_seqs` sequences of full length take.
    """
    rollout, item = config.actor_rollout_ref.rollout, item_size(config)
    embedded = rollout.name == "torch"
    tp = 1 if embedded else rollout.tensor_model_parallel_size
    weights = model_elements(shape) * item / tp
    token = cache_bytes_a_token(shape, item, tp)
    if embedded:
        tokens = rollout.max_num_seqs * (config.data.max_prompt_length + config.data.max_response_length)
        cache = tokens * token
    else:
        cache = rollout.gpu_memory_utilization * cluster.card.memory - weights
        if rollout.name == "vllm":  # which counts its activations and graphs in
            cache -= cluster.assumptions.engine_overhead_bytes
        tokens = max(0, int(cache / token))
    assumed = cluster.assumptions
    sleeps = config.runtime.colocate and rollout.free_cache_engine and not embedded
    asleep = assumed.engine_asleep_bytes if sleeps else weights + cache + assumed.engine_overhead_bytes
    return EngineMemory(weights, cache, assumed.engine_overhead_bytes, asleep, int(tokens))


def cache_bytes_a_token(shape: ModelShape, item: int, tp: int) -> float:
    """Keys and values of one token, on one of `tp` GPUs."""
    heads = max(1, shape.num_kv_heads / tp)
    return 2 * shape.num_layers * heads * shape.head_dim * item


def model_elements(shape: ModelShape) -> int:
    """Parameters of the whole model, a tied embedding once."""
    return stage_elements(shape, MegatronConfig(), 0)


def stage_elements(shape: ModelShape, megatron: MegatronConfig, stage: int) -> int:
    """Parameters of a rank on a pipeline stage; a tied embedding is on the first stage and on the last."""
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    hidden, head = shape.hidden_size, shape.head_dim
    q, kv = shape.num_heads * head, shape.num_kv_heads * head
    products = hidden * (2 * q + 2 * kv + 3 * shape.ffn_hidden_size)
    biases = (q + 2 * kv) if shape.family.qkv_bias else 0
    norms = 2 * hidden + (2 * head if shape.family.qk_norm else 0)
    layers = shape.num_layers // pp * ((products + biases) // tp + norms)
    vocabulary = shape.padded_vocab_size(tp) // tp * hidden
    first, last = stage == 0, stage == pp - 1
    copies = int(first) + int(last and not (first and shape.tied))
    return layers + copies * vocabulary + (hidden if last else 0)


def held_by_formula(shape: ModelShape, megatron: MegatronConfig, world_size: int, stage: int) -> Held:
    """What `mcore.footprint` finds, but for the padding of Megatron's buffers."""
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    elements, mixed = stage_elements(shape, megatron, stage), megatron.params_dtype != "float32"
    sharing = world_size // (tp * pp) if megatron.use_distributed_optimizer else 1
    optimizer = 0.0 if megatron.optimizer_cpu_offload else (12 if mixed else 8) * elements / sharing
    item, hidden = 2 if mixed else 4, shape.hidden_size
    largest = item * hidden * max(shape.padded_vocab_size(tp), 2 * shape.ffn_hidden_size) / tp
    return Held(item * elements, 4 * elements, optimizer, largest)


def micro_batch_size(config: RunConfig, limit: int | None = None) -> MicroBatchSize:
    """The fullest micro-batch there can be on a context-parallel rank; all of its tokens counted as responses'.

    `limit`: tokens a GPU, if not those of an update.
    """
    actor = config.actor_rollout_ref.actor
    longest = config.data.max_prompt_length + config.data.max_response_length
    if actor.use_dynamic_bsz or actor.ppo_micro_batch_size_per_gpu is None:
        tokens = limit or actor.ppo_max_token_len_per_gpu
        return MicroBatchSize(tokens, tokens, 2)
    cp = actor.megatron.context_parallel_size
    tokens = -(-actor.ppo_micro_batch_size_per_gpu * longest // cp)
    return MicroBatchSize(tokens, tokens, actor.ppo_micro_batch_size_per_gpu)


def item_size(config: RunConfig) -> int:
    return 2 if config.actor_rollout_ref.actor.megatron.params_dtype == "bfloat16" else 4


def _stage(
    config: RunConfig, shape: ModelShape, engine: EngineMemory, stage: int, held: Held, micro_batches: int
) -> StageMemory:
    section = config.actor_rollout_ref
    megatron, colocated = section.actor.megatron, config.runtime.colocate
    away = section.actor.offload if colocated else ()
    update = micro_batch_size(config)
    log_prob = micro_batch_size(config, section.rollout.log_prob_max_token_len_per_gpu)
    last = stage == megatron.pipeline_model_parallel_size - 1
    weights, gradients = {"weights": held.weights}, {"gradients": held.gradients}
    optimizer = {"optimizer": held.optimizer}
    kept = {k: v for part in (weights, gradients, optimizer) for k, v in part.items() if k not in away}
    awake = _engine_parts(engine) if colocated else {}
    asleep = {"engine asleep": engine.asleep} if colocated else {}
    head = head_bytes(shape, megatron, update, True) if last else 0.0
    plain = head_bytes(shape, megatron, log_prob, False) if last else 0.0
    swap = {"reference swap": held.largest} if config.shares_reference else {}
    saved = saved_peak(shape, megatron, "te", update, stage, micro_batches)
    phases = {
        "rollout": kept | awake,
        "weight sync": kept | weights | awake,
        "log-probs": kept
        | weights
        | asleep
        | swap
        | {"working set": max(forward_bytes(shape, megatron, log_prob), plain)},
        "update": weights
        | gradients
        | optimizer
        | asleep
        | {"activations": saved, "working set": max(working_bytes(shape, megatron, update), head)},
    }
    return StageMemory(stage, held, phases)


def _engine_parts(engine: EngineMemory) -> dict[str, float]:
    return {"engine weights": engine.weights, "engine cache": engine.cache, "engine overhead": engine.overhead}


def _offloaded(config: RunConfig, held: Held) -> float:
    """Gradients are not kept."""
    away = config.actor_rollout_ref.actor.offload if config.runtime.colocate else ()
    return (held.weights if "weights" in away else 0.0) + (held.optimizer if "optimizer" in away else 0.0)
