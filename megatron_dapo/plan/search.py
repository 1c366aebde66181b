"""The fastest layouts that fit: every sensible split of the policy and size of the engines, planned one by one.

Tried: tensor parallelism inside a node (with sequence parallelism), pipelines with and without virtual stages, context
parallelism, recomputation of nothing or of every layer, one or two longest sequences to a micro-batch, engines of up to
a node. All else stays as configured. Layouts share what their ranks hold and what engines of one size write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_dapo.config.tree import ConfigError, MegatronConfig, RunConfig
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.plan.hardware import Cluster
from megatron_dapo.plan.memory import Held, engine_memory, memory_plan
from megatron_dapo.plan.planner import Plan, Planner
from megatron_dapo.plan.timeline import POLICY, placement

_LAYERS_A_CHUNK = (4, 2)  # of virtual stages: smaller ones fill the pipeline faster and send more
_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class SearchResult:
    best: tuple[Plan, ...]  # fastest first
    fitting: int
    tried: int


def search(planner: Planner, config: RunConfig, most: int = 10, note: Callable[[str], None] = print) -> SearchResult:
    """The `most` fastest plans that fit. `note` hears of progress."""
    shape, cluster = planner.shape, planner.cluster
    found: list[Plan] = []
    tried = 0
    for candidate in candidates(config, shape, cluster):
        tried += 1
        if not _could_fit(candidate, shape, cluster):
            continue
        try:
            placed = planner.on_cluster(candidate)
            if planner.memory(placed).fits:
                found.append(planner.plan(candidate, policies=(POLICY,)))
        except ConfigError:
            continue  # heads, layers, batches or engines that this layout cannot split: not a layout of this run
        if tried % 200 == 0:
            note(f"{tried} layouts looked at, {len(found)} fit")
    found.sort(key=lambda plan: plan.timeline.step_seconds)
    return SearchResult(tuple(found[:most]), len(found), tried)


def candidates(config: RunConfig, shape: ModelShape, cluster: Cluster) -> Iterator[RunConfig]:
    """Configurations with every split that divides the GPUs, the heads and the layers."""
    world, longest = placement(config, cluster).policy, config.data.max_prompt_length + config.data.max_response_length
    for megatron in _splits(config.actor_rollout_ref.actor.megatron, shape, cluster, world):
        cp = megatron.context_parallel_size
        for sequences in (1, 2):
            tokens = -(-sequences * longest // cp)
            for engine in _engine_sizes(config, shape, cluster):
                yield _with(config, megatron, tokens, engine)


def _splits(given: MegatronConfig, shape: ModelShape, cluster: Cluster, world: int) -> Iterator[MegatronConfig]:
    for tp in _SIZES:
        if tp > cluster.gpus_per_node or shape.num_kv_heads % tp or shape.ffn_hidden_size % tp:
            continue
        for pp in _SIZES:
            for cp in _SIZES:
                if shape.num_layers % pp or world % (tp * pp * cp) or cp > 8:
                    continue
                for virtual in _virtual_sizes(shape.num_layers // pp, pp):
                    for recompute in (None, "full"):
                        yield replace(
                            given,
                            tensor_model_parallel_size=tp,
                            pipeline_model_parallel_size=pp,
                            virtual_pipeline_model_parallel_size=virtual,
                            context_parallel_size=cp,
                            sequence_parallel=tp > 1,
                            recompute_granularity=recompute,
                            recompute_method="uniform" if recompute else None,
                            recompute_num_layers=1 if recompute else None,
                        )


def _virtual_sizes(layers: int, stages: int) -> list[int | None]:
    sizes = [layers // size for size in _LAYERS_A_CHUNK if layers % size == 0 and layers // size > 1]
    return [None, *sizes] if stages > 1 else [None]


def _engine_sizes(config: RunConfig, shape: ModelShape, cluster: Cluster) -> list[int]:
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "torch":
        return [rollout.tensor_model_parallel_size]
    return [tp for tp in _SIZES if tp <= cluster.gpus_per_node and shape.num_heads % tp == 0]


def _with(config: RunConfig, megatron: MegatronConfig, tokens: int, engine: int) -> RunConfig:
    section = config.actor_rollout_ref
    actor = replace(section.actor, megatron=megatron, ppo_max_token_len_per_gpu=tokens)
    rollout = replace(section.rollout, tensor_model_parallel_size=engine, log_prob_max_token_len_per_gpu=None)
    ref = replace(section.ref, log_prob_max_token_len_per_gpu=None)
    return replace(config, actor_rollout_ref=replace(section, actor=actor, rollout=rollout, ref=ref))


def _could_fit(config: RunConfig, shape: ModelShape, cluster: Cluster) -> bool:
    """False where not even a middle stage of layers alone would: spares building what is plainly too large."""
    if engine_memory(config, shape, cluster).cache <= 0:
        return False
    megatron = config.actor_rollout_ref.actor.megatron
    layer = shape.hidden_size * (2 * shape.hidden_size + 3 * shape.ffn_hidden_size)
    elements = shape.num_layers * layer / megatron.tensor_model_parallel_size / megatron.pipeline_model_parallel_size
    sharing = placement(config, cluster).policy // (
        megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size
    )
    item = 2 if megatron.params_dtype == "bfloat16" else 4
    held = Held(item * elements, 4 * elements, (12 if item == 2 else 8) * elements / sharing, 0.0)
    if not megatron.use_distributed_optimizer or megatron.optimizer_cpu_offload:
        held = replace(held, optimizer=0.0)
    return memory_plan(config, shape, cluster, lambda _: held, 64).fits
