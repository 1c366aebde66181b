"""The fastest layouts that fit: every sensible split of the policy and size of the engines, planned one by one.

Tried: tensor parallelism inside a node (with sequence parallelism), pipelines with and without virtual stages, context
parallelism, recomputation of nothing or of every layer, one or two longest sequences to a micro-batch, engines of up to
a node. All else stays as configured. Layouts share what engines of one size write, and how sequences are packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_dapo.config.tree import ConfigError, MegatronConfig, RunConfig
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.plan.hardware import Cluster
from megatron_dapo.plan.planner import Plan, Planner
from megatron_dapo.plan.timeline import POLICY, placement

_LAYERS_A_CHUNK = (4, 2)  # of virtual stages: smaller ones fill the pipeline faster and send more
_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class SearchResult:
    best: tuple[Plan, ...]  # fastest first
    fitting: int
    tried: int


def search(planner: Planner, config: RunConfig, most: int = 10) -> SearchResult:
    """The `most` fastest plans that fit. All are planned by formula, the best ones then from the model class."""
    found: list[Plan] = []
    tried = 0
    for candidate in candidates(config, planner.shape, planner.cluster):
        tried += 1
        try:
            if planner.memory(planner.on_cluster(candidate), exact=False).fits:
                found.append(planner.plan(candidate, policies=(POLICY,), exact=False))
        except ConfigError:
            continue  # heads, layers, batches or engines that this layout cannot split: not a layout of this run
    found.sort(key=lambda plan: plan.timeline.step_seconds)
    best: list[Plan] = []
    for rough in found:
        exact = planner.plan(rough.config, policies=(POLICY,))
        if exact.memory.fits:
            best.append(exact)
        if len(best) == most:
            break
    return SearchResult(tuple(sorted(best, key=lambda plan: plan.timeline.step_seconds)), len(found), tried)


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
