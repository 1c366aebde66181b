"""What is wrong with a plan, or will hurt: each warning with its numbers and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dapo.config.tree import RunConfig
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.plan.hardware import Cluster
from megatron_dapo.plan.memory import MemoryPlan
from megatron_dapo.plan.timeline import Timeline
from megatron_dapo.plan.workload import Workload

_BUBBLE = 0.2
_GB = 1e9


def warnings_of(
    config: RunConfig, shape: ModelShape, cluster: Cluster, memory: MemoryPlan, times: Timeline, workload: Workload
) -> tuple[str, ...]:
    return (
        *_memory(config, memory),
        *_pipeline(config, times),
        *_links(config, cluster),
        *_engines(config, memory, workload),
        *_sampling(config, times, workload),
    )


def _memory(config: RunConfig, memory: MemoryPlan) -> Iterator[str]:
    remedies = {
        "rollout": "lower rollout.gpu_memory_utilization, or offload more (actor.offload)",
        "weight sync": "lower rollout.gpu_memory_utilization, or offload gradients and optimizer (actor.offload)",
        "log-probs": "lower rollout.log_prob_max_token_len_per_gpu, or raise context_parallel_size",
        "update": "raise tensor, pipeline or context parallelism, recompute (recompute_granularity=full), or lower "
        "actor.ppo_max_token_len_per_gpu",
    }
    for phase in memory.stages[0].phases:
        stage = max(memory.stages, key=lambda stage: stage.total(phase))
        over = stage.total(phase) - memory.usable
        if over > 0:
            yield (
                f"does not fit: {phase} takes {stage.total(phase) / _GB:.1f} GB on pipeline stage {stage.stage}, "
                f"{over / _GB:.1f} GB more than there is; {remedies[phase]}"
            )
    if not memory.colocated and memory.engine.awake > memory.usable:
        over = memory.engine.awake - memory.usable
        yield f"does not fit: an engine takes {over / _GB:.1f} GB more than there is; {remedies['rollout']}"


def _pipeline(config: RunConfig, times: Timeline) -> Iterator[str]:
    megatron, update = config.actor_rollout_ref.actor.megatron, times.training.update_pass
    stages = megatron.pipeline_model_parallel_size
    if stages == 1:
        return
    if update.bubble > _BUBBLE:
        yield (
            f"pipeline bubble: stages wait for {update.bubble:.0%} of an update; fewer stages, smaller "
            "actor.ppo_max_token_len_per_gpu, a larger mini-batch or a virtual pipeline make it smaller"
        )
    if update.micro_batches < stages:
        yield (
            f"{update.micro_batches} micro-batches an update for {stages} pipeline stages: some stages are never all "
            "at work; use fewer stages or smaller micro-batches"
        )


def _links(config: RunConfig, cluster: Cluster) -> Iterator[str]:
    megatron = config.actor_rollout_ref.actor.megatron
    if megatron.tensor_model_parallel_size > cluster.gpus_per_node:
        yield (
            f"tensor_model_parallel_size {megatron.tensor_model_parallel_size} crosses nodes of "
            f"{cluster.gpus_per_node} GPUs: every layer waits for the network; use at most {cluster.gpus_per_node}"
        )
    if megatron.tensor_model_parallel_size > 1 and not megatron.sequence_parallel:
        yield "tensor parallelism without sequence_parallel=true keeps norms' activations whole on every rank"


def _engines(config: RunConfig, memory: MemoryPlan, workload: Workload) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    fits = int(memory.engine.cache_tokens / (workload.prompt + workload.mean))
    if fits < rollout.max_num_seqs:
        yield (
            f"an engine's cache holds {memory.engine.cache_tokens:,} tokens, about {fits} sequences of mean length, "
            f"and rollout.max_num_seqs is {rollout.max_num_seqs}: sequences will be sent away and computed again; "
            "raise rollout.gpu_memory_utilization or tensor_model_parallel_size, or lower max_num_seqs"
        )


def _sampling(config: RunConfig, times: Timeline, workload: Workload) -> Iterator[str]:
    filtering, data = config.algorithm.filter_groups, config.data
    if not filtering.enable:
        return
    batch = data.gen_batch_size or data.train_batch_size
    needed = data.train_batch_size / workload.kept_share
    most = filtering.max_num_gen_batches * batch
    if 0 < most < needed:
        yield (
            f"dynamic sampling keeps {workload.kept_share:.0%} of groups: {needed:.0f} prompts a step are needed, and "
            f"max_num_gen_batches {filtering.max_num_gen_batches} x {batch} allow {most}"
        )
    elif needed > batch:
        yield (
            f"dynamic sampling keeps {workload.kept_share:.0%} of groups: about {times.rollout.batches:.1f} generation "
            f"batches a step, each as long as its longest response; a gen_batch_size of {-(-needed // 64) * 64:.0f} "
            "would mostly need one"
        )
