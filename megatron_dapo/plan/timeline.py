"""Seconds of a training step by phase, and what the run costs.

The rollout comes from the simulator, passes from `training_time.py`. Not counted: checkpoints, the start, failures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from megatron_dapo.config.tree import ConfigError, RunConfig
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.plan.engine_sim import EngineModel
from megatron_dapo.plan.hardware import Cluster
from megatron_dapo.plan.memory import EngineMemory, MemoryPlan, cache_bytes_a_token, item_size, model_elements
from megatron_dapo.plan.rollout_sim import PolicyOutcome, RolloutSettings, simulate
from megatron_dapo.plan.training_time import Packer, TrainingModel, TrainingTime
from megatron_dapo.plan.workload import Workload, kept_share

POLICY = "adaptive"  # what this project does


@dataclass(frozen=True)
class Timeline:
    phases: Mapping[str, float]  # seconds of a step
    training: TrainingTime
    rollout: PolicyOutcome
    gpus: int
    steps: int

    @property
    def step_seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def gpu_hours(self) -> float:
        return self.step_seconds * self.steps * self.gpus / 3600


@dataclass(frozen=True)
class Placement:
    """GPUs of each kind."""

    policy: int
    rollout: int  # the same ones where they are colocated
    engines: int
    reference: int  # of its own; 0: it lives on the policy's


def placement(config: RunConfig, cluster: Cluster) -> Placement:
    """Raises ConfigError where nothing is left for the policy, or engines do not divide their GPUs."""
    rollout, ref = config.actor_rollout_ref.rollout, config.actor_rollout_ref.ref
    tp = 1 if rollout.name == "torch" else rollout.tensor_model_parallel_size
    others = {"ref.nnodes": ref.nnodes} if ref.own_ranks else {}
    if not config.runtime.colocate:
        others["rollout.nnodes"] = rollout.nnodes or 1
    policy = cluster.world_size - sum(others.values()) * cluster.gpus_per_node
    gpus = policy if config.runtime.colocate else (rollout.nnodes or 1) * (rollout.n_gpus_per_node or tp)
    if policy < 1 or gpus % tp:
        beside = " and ".join(f"{name} {number}" for name, number in others.items())
        raise ConfigError(
            f"{cluster.nodes} nodes of {cluster.gpus_per_node} GPUs leave {policy} for the policy"
            f"{' beside ' if beside else ''}{beside}, and {gpus} for engines of {tp} GPUs: give more nodes, or engines "
            "that divide"
        )
    return Placement(policy, gpus, gpus // tp, ref.own_ranks)


def workload_of(config: RunConfig, cluster: Cluster) -> Workload:
    """As assumed of a run with this configuration."""
    assumed, n = cluster.assumptions, config.actor_rollout_ref.rollout.n
    limit = config.data.max_response_length
    share = kept_share(assumed.pass_rate, assumed.pass_rate_concentration, n)
    return Workload(
        mean=max(1.0, assumed.response_share * limit),
        sigma=assumed.length_sigma,
        between=assumed.length_between,
        limit=limit,
        prompt=int(min(assumed.prompt_tokens, config.data.max_prompt_length)),
        kept_share=share if config.algorithm.filter_groups.enable else 1.0,
        n=n,
    )


def engine_model(config: RunConfig, shape: ModelShape, cluster: Cluster, memory: EngineMemory) -> EngineModel:
    rollout, assumed, card = config.actor_rollout_ref.rollout, cluster.assumptions, cluster.card
    tp = 1 if rollout.name == "torch" else rollout.tensor_model_parallel_size
    item, elements = item_size(config), model_elements(shape)
    bandwidth = card.hbm * assumed.hbm_efficiency
    layer = assumed.eager_layer_s if rollout.enforce_eager or rollout.name == "torch" else assumed.decode_layer_s
    return EngineModel(
        step_s=assumed.decode_step_s + shape.num_layers * layer,
        weights_s=elements * item / tp / bandwidth,
        sequence_s=2 * elements / tp / (card.bf16_flops * assumed.decode_efficiency),
        token_s=cache_bytes_a_token(shape, item, tp) / bandwidth,
        prefill_token_s=2 * elements / tp / (card.bf16_flops * assumed.prefill_efficiency),
        max_sequences=rollout.max_num_seqs,
        cache_tokens=memory.cache_tokens,
    )


def rollout_settings(config: RunConfig, engines: int) -> RolloutSettings:
    filtering = config.algorithm.filter_groups
    wanted = config.data.train_batch_size
    limit = filtering.max_num_gen_batches if filtering.enable else 0
    batch, carry = config.data.gen_batch_size or wanted, filtering.surplus == "carry"
    return RolloutSettings(engines, wanted, batch, max(0, limit), carry)


def timeline(
    config: RunConfig,
    shape: ModelShape,
    cluster: Cluster,
    memory: MemoryPlan,
    rollout: PolicyOutcome,
    workload: Workload,
    validation_s: float,
    packer: Packer,
) -> Timeline:
    """`validation_s`: seconds of one evaluation's rollout, 0 where there is none."""
    place = placement(config, cluster)
    fullest = max((stage.held for stage in memory.stages), key=lambda held: held.weights)
    model = TrainingModel(config, shape, cluster, place.policy, packer)
    lengths = np.concatenate([step.lengths for step in rollout.steps])
    wanted = config.data.train_batch_size * workload.n
    training = model.step(lengths[-wanted:], workload.prompt, fullest)
    reference = 0.0
    if config.needs_reference:
        on = TrainingModel(config, shape, cluster, place.reference or place.policy, packer)
        reference = on.reference(lengths[-wanted:], workload.prompt)
        if place.reference:  # the policy's own log-probs are computed at the same time
            reference = max(0.0, reference - training.log_probs)
    freq = config.trainer.test_freq
    phases = {
        "rollout": rollout.seconds,
        "old log-probs": training.log_probs,
        "reference log-probs": reference,
        "updates": training.update,
        "weight sync": weight_sync_seconds(config, shape, cluster, place),
        "offloading": 2 * memory.host_bytes / cluster.assumptions.pcie if config.runtime.colocate else 0.0,
        "evaluation": validation_s / freq if freq > 0 else 0.0,
        "all else": cluster.assumptions.step_overhead_s,
    }
    steps = config.trainer.total_training_steps or int(cluster.assumptions.training_steps)
    return Timeline(phases, training, rollout, cluster.world_size, steps)


def validation_seconds(
    config: RunConfig, model: EngineModel, engines: int, workload: Workload, cluster: Cluster
) -> float:
    """Of one evaluation: every prompt at once, lengths as in training."""
    prompts, n = int(cluster.assumptions.validation_prompts), config.actor_rollout_ref.rollout.val_kwargs.n
    if config.trainer.test_freq <= 0 or not prompts:
        return 0.0
    settings = RolloutSettings(engines, prompts, prompts)
    return simulate("rounds", model, settings, replace(workload, n=n, kept_share=1.0), steps=1).seconds


def weight_sync_seconds(config: RunConfig, shape: ModelShape, cluster: Cluster, place: Placement) -> float:
    """docs/weight_sync.md's model: through each node's host memory, in once and out for each engine there."""
    size = model_elements(shape) * item_size(config)
    nodes = max(1, place.rollout // cluster.gpus_per_node)
    through_host = size * (1 + place.engines / nodes) / cluster.assumptions.host_memory
    network = size / (cluster.gpus_per_node * cluster.link(10**6)) if cluster.nodes > 1 else 0.0
    return through_host + network
