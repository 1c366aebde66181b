"""A plan: memory, timeline and warnings of one configuration on one cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_dapo.config.check import check
from megatron_dapo.config.tree import ConfigError, MegatronConfig, RunConfig
from megatron_dapo.mcore.families import ModelShape
from megatron_dapo.plan.advice import warnings_of
from megatron_dapo.plan.hardware import Cluster
from megatron_dapo.plan.memory import Held, MemoryPlan, engine_memory, held_by_formula, memory_plan
from megatron_dapo.plan.rollout_sim import POLICIES, PolicyOutcome, simulate
from megatron_dapo.plan.timeline import (
    POLICY,
    Placement,
    Timeline,
    engine_model,
    placement,
    rollout_settings,
    timeline,
    validation_seconds,
    workload_of,
)
from megatron_dapo.plan.training_time import Packer
from megatron_dapo.plan.workload import Workload


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    place: Placement
    workload: Workload
    memory: MemoryPlan
    timeline: Timeline
    policies: Mapping[str, PolicyOutcome]  # those that were asked for
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class RolloutPlan:
    """What depends on the engines alone: layouts of the policy share it."""

    policies: Mapping[str, PolicyOutcome]
    validation_s: float


class Planner:
    """Plans configurations of one model on one cluster. What ranks hold, and rollouts, are computed once each."""

    def __init__(self, shape: ModelShape, cluster: Cluster, workload: Workload | None = None):
        self.shape, self.cluster = shape, cluster
        self._workload = workload
        self._held: dict[tuple[object, ...], Held] = {}
        self._rollouts: dict[tuple[object, ...], RolloutPlan] = {}
        self._packer = Packer()

    def plan(self, config: RunConfig, policies: tuple[str, ...] = tuple(POLICIES), exact: bool = True) -> Plan:
        """`exact`: what ranks hold comes from the model class, else from a formula without the buffers' padding.

        Raises ConfigError where the configuration cannot run on so many GPUs at all; one that does not fit into
        their memory is planned, and said so."""
        config, place = self.on_cluster(config), placement(config, self.cluster)
        memory = self.memory(config, exact)
        workload = self.workload(config)
        rollout = self._rollout(config, place, workload, policies)
        times = timeline(
            config,
            self.shape,
            self.cluster,
            memory,
            rollout.policies[POLICY],
            workload,
            rollout.validation_s,
            self._packer,
        )
        found = warnings_of(config, self.shape, self.cluster, memory, times, workload)
        return Plan(config, place, workload, memory, times, rollout.policies, found)

    def on_cluster(self, config: RunConfig) -> RunConfig:
        """`config` with this cluster's nodes, checked against them."""
        place = placement(config, self.cluster)
        node = self.cluster.gpus_per_node
        trainer = replace(config.trainer, nnodes=place.policy // node, n_gpus_per_node=node)
        config = replace(config, trainer=trainer)
        check(config, place.policy)
        megatron = config.actor_rollout_ref.actor.megatron
        self.shape.check_splits(
            megatron.tensor_model_parallel_size,
            megatron.pipeline_model_parallel_size,
            megatron.virtual_pipeline_model_parallel_size,
        )
        return config

    def workload(self, config: RunConfig) -> Workload:
        return self._workload or workload_of(config, self.cluster)

    def memory(self, config: RunConfig, exact: bool = True) -> MemoryPlan:
        """Of a configuration that `on_cluster` gave."""
        actor, world = config.actor_rollout_ref.actor, placement(config, self.cluster).policy
        ranks = world // actor.megatron.model_parallel_size
        longest = config.data.max_prompt_length + config.data.max_response_length
        tokens = ranks * actor.ppo_max_token_len_per_gpu * actor.megatron.context_parallel_size
        sequences = actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
        most = max(1, -(-sequences * longest // tokens))  # where all responses have full length

        def held(stage: int) -> Held:
            if exact:
                return self.held(actor.megatron, world, stage)
            return held_by_formula(self.shape, actor.megatron, world, stage)

        return memory_plan(config, self.shape, self.cluster, held, most)

    def held(self, megatron: MegatronConfig, world: int, stage: int) -> Held:
        """What a rank holds depends on tensor and pipeline parallelism, the buffers and how many share an optimizer."""
        key = (
            megatron.tensor_model_parallel_size,
            megatron.pipeline_model_parallel_size,
            megatron.virtual_pipeline_model_parallel_size,
            megatron.use_distributed_optimizer,
            megatron.overlap_grad_reduce,
            megatron.params_dtype,
            world,
            stage,
        )
        if key not in self._held:
            # Imports Megatron: seconds that a wrong key need not wait for.
            from megatron_dapo.mcore.footprint import footprint, stage_rank

            found = footprint(self.shape, megatron, world, stage_rank(megatron, world, stage))
            optimizer = 0 if megatron.optimizer_cpu_offload else found.master + found.moments
            self._held[key] = Held(found.parameters, found.gradients, optimizer, found.largest)
        return self._held[key]

    def _rollout(
        self, config: RunConfig, place: Placement, workload: Workload, policies: tuple[str, ...]
    ) -> RolloutPlan:
        engine = engine_model(config, self.shape, self.cluster, engine_memory(config, self.shape, self.cluster))
        longest = workload.prompt + workload.limit
        if engine.cache_tokens < longest:
            raise ConfigError(
                f"an engine of {place.rollout // place.engines} GPUs has room for {engine.cache_tokens} tokens beside "
                f"its weights, and a sequence may have {longest}: raise rollout.gpu_memory_utilization or "
                "rollout.tensor_model_parallel_size"
            )
        settings = rollout_settings(config, place.engines)
        key = (engine, settings, workload, policies, config.trainer.test_freq > 0)
        if key not in self._rollouts:
            found = {policy: simulate(policy, engine, settings, workload) for policy in policies}
            seconds = validation_seconds(config, engine, place.engines, workload, self.cluster)
            self._rollouts[key] = RolloutPlan(found, seconds)
        return self._rollouts[key]
